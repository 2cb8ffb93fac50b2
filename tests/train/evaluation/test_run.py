"""The evaluation: which numbers it leaves under which names, measured how, and what it refuses before the work."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conf.errors import UserError
from conf.schema import ImageConfig
from data.image_dataset import ImageDataset
from data.shards.manifest import Manifest
from models.autoencoder import Autoencoder
from models.features import weights_sha256
from train.engine.runtime import Runtime
from train.evaluation import run as evaluate
from train.evaluation import targets as subjects
from train.evaluation.extractors import INCEPTION, LOGITS, Extractor, efficientnet
from train.evaluation.judges import judge
from train.evaluation.judges.probe import CaptionProbe, ClassProbe
from train.evaluation.judges.segments import SegmentJudge
from train.evaluation.reference import reference_of
from train.latents.provenance import weights_digest
from train.sampling import run as sampling
from train.sampling.load import load_model

DISTANCES = {"fd_efficientnet", "fd_efficientnet_low", "fd_efficientnet_high", "fd_efficientnet_floor"}
DISTANCES |= {"kd_efficientnet", "kd_efficientnet_std", "precision_efficientnet", "recall_efficientnet"}
CLIP = {name.replace("efficientnet", "clip_own") for name in DISTANCES} | {"clip_score_own"}
SPEED = {"perf/evaluation_s", "perf/pictures_per_s"}
ATTRIBUTES = ("kind", "background", "color")
FOLLOWING = {f"eval/prompt_following/{name}" for name in ATTRIBUTES} | {f"probe/accuracy/{name}" for name in ATTRIBUTES}


def config(project: Any, folder: Path, *overrides: str) -> Any:
    return project.config("evaluate", f"output_dir={folder}", *overrides)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture(scope="module")
def evaluated(project: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves, with a probe that is trained in a moment."""
    from conf.schema import Device, RuntimeConfig
    from train.engine.runtime import start

    folder = tmp_path_factory.mktemp("evaluation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CaptionProbe, "steps", 20)
        others = f"others={project.folder}/shards/train"
        evaluate.evaluate_run(config(project, folder, others), start(RuntimeConfig(device=Device.cpu)))
    return folder


def test_metrics_stand_under_their_names(evaluated: Path) -> None:
    metrics = read(evaluated / "metrics.json")
    nearest = {"nearest_efficientnet", "nearest_clip_own"}
    assert metrics.keys() == {f"eval/{name}" for name in DISTANCES | CLIP | nearest} | FOLLOWING | SPEED
    assert all(0 <= metrics[name] <= 1 for name in FOLLOWING)
    assert metrics["eval/fd_efficientnet_low"] < metrics["eval/fd_efficientnet"] < metrics["eval/fd_efficientnet_high"]
    assert not (evaluated / "measured").exists()


def test_protocol_says_how_they_were_measured(project: Any, evaluated: Path) -> None:
    facts = read(evaluated / "protocol.json")
    shards, extractors = project.folder / "shards", facts.pop("extractors")
    digest = Manifest.load(shards / "heldout").digest()
    assert facts == {
        "samples": 16,
        "captions": digest,
        "reference": digest,
        "reference_samples": 7,
        "others": Manifest.load(shards / "train").digest(),
        "resolution": 32,
        "sampler": "dpmpp_2m",
        "steps": 4,
        "eta": None,
        "spacing": "trailing",
        "shift": None,
        "guidance_scale": 3.0,
        "guidance_rescale": 0.0,
        "guidance_interval": [],
        "negative_prompt": "",
        "size": [],
        "prompt_syntax": False,
        "weighting": "difference",
        "weights": "ema",
        "weights_sha256": weights_digest(str(project.folder / "unet" / "export")),
        "precision": "fp32",
        "seed": 0,
        "bootstrap_replicates": 50,
        "kernel_features": 50_000,
        "manifold_features": 10_000,
        "manifold_neighbours": 3,
    }
    assert extractors == {
        "fd_efficientnet": {"sha256": weights_sha256(), "resize": "bilinear to 128 pixels, larger pictures to 224"},
        "fd_clip_own": {
            "sha256": weights_digest(str(project.folder / "clip/export")),
            "resize": "bicubic to 32 pixels",
        },
    }


def test_same_numbers_are_recorded_at_the_samples_that_the_unet_had_seen(evaluated: Path) -> None:
    rows = [json.loads(line) for line in (evaluated / "metrics.jsonl").read_text().splitlines()]
    (row,) = [{k: v for k, v in row.items() if k != "time"} for row in rows]
    assert row == {"samples_seen": 960, **read(evaluated / "metrics.json")}
    assert (evaluated / "samples" / "evaluation-000000000960.png").is_file()
    with Image.open(evaluated / "grid.png") as grid:
        assert grid.width >= 8 * 128


def toy_inception(weights: str, device: torch.device) -> Extractor:
    """In the place of Inception: colours of the corners, and three logits."""

    def look(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        corners = pixels[:, :, ::31, ::31].float().flatten(1)  # [B, 12]
        return {INCEPTION: corners, LOGITS: corners[:, :3] / 64}

    return Extractor(name=INCEPTION, size=12, weights_sha256="toy", resize="none", network=look)


def test_wandb_has_the_fid_the_images_and_the_protocol_in_the_run_of_the_unet(
    project: Any,
    runtime: Runtime,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wandb_history: Any,
    wandb_run: Any,
) -> None:
    unet = tmp_path / "unet"
    shutil.copytree(project.folder / "unet", unet)
    (unet / "wandb_run_id").write_text("abc123")
    monkeypatch.setattr(subjects, "inception", toy_inception)
    small = ["samples=14", "prompt_following=false", "clip_score=null", "wandb.mode=offline", "inception=toy"]
    small += [f"unet={unet}/export", f"statistics_dir={tmp_path}/statistics"]
    evaluate.evaluate_run(config(project, tmp_path / "out", *small), runtime)
    assert (tmp_path / "out" / "wandb_run_id").read_text() == "abc123"
    metrics = read(tmp_path / "out" / "metrics.json")
    names = {"fid", "fid_low", "fid_high", "fid_floor", "kid", "kid_std", "precision", "recall"}
    names |= {"inception_score", "inception_score_std"} | DISTANCES
    assert metrics.keys() == {f"eval/{name}" for name in names} | SPEED
    (row,) = wandb_history(tmp_path / "out")
    assert {name: row[name] for name in metrics} == pytest.approx(metrics)
    assert row["samples_seen"] == 960 and row["samples/evaluation/caption"] == "held-out captions"
    facts = read(tmp_path / "out" / "protocol.json")
    run = wandb_run(tmp_path / "out")
    assert run["config"]["protocol"] == facts
    names = {"name": f"{project.folder.name}/unet", "group": project.folder.name, "job_type": "unet"}
    assert {name: run[name] for name in names} == names  # as its training called it
    assert facts["extractors"]["fid"] == {"sha256": "toy", "resize": "none"}
    evaluate.evaluate_run(
        config(project, tmp_path / "own", *small, "samples=10", "bootstrap=0", "wandb.name=mine"), runtime
    )
    assert (tmp_path / "own" / "wandb_run_id").read_text() != "abc123"
    assert wandb_run(tmp_path / "own")["name"] == "mine"


def test_file_of_statistics_serves_the_first_extractor_and_the_others_go_without(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `protocol=mlperf`: the FID against statistics of others, with a CLIP score."""
    monkeypatch.setattr(subjects, "inception", toy_inception)
    images, extractor = project.config("evaluate").images, toy_inception("", torch.device("cpu"))
    reference_of(f"{project.folder}/shards/heldout", extractor, images, tmp_path / "kept", runtime)
    (kept,) = (tmp_path / "kept").rglob("statistics.safetensors")
    np.savez(tmp_path / "others.npz", mu=np.full(12, 127.0), sigma=1000 * np.eye(12))
    small = ["samples=10", "prompt_following=false", "bootstrap=0", "inception=toy"]
    for number, (source, further) in enumerate({str(kept): {"fid_floor"}, f"{tmp_path}/others.npz": set()}.items()):
        metrics = evaluate.evaluate_run(config(project, tmp_path / str(number), *small, f"reference={source}"), runtime)
        names = {"fid", "inception_score", "inception_score_std", "clip_score_own"} | further
        assert metrics.keys() == {f"eval/{name}" for name in names} | SPEED


def test_measurements_of_other_extractors_are_not_gone_on_with(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    given = ["prompt_following=false", "clip_score=null"], ["prompt_following=false"]
    asked = [config(project, tmp_path, *options) for options in given]
    drawn = [subjects.GeneratedImages(cfg, runtime, load_model(cfg, runtime.device), {}) for cfg in asked]
    folders = {evaluate.feature_cache_of(cfg, subject).folder for cfg, subject in zip(asked, drawn, strict=True)}
    assert len(folders) == 2


def test_probe_learns_from_training_images_and_is_measured_on_held_out_ones(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[str] = []
    judged: list[list[str]] = []
    train = judge.train_judge

    def noted(kind: type[judge.Judge], dataset: ImageDataset, seed: int, device: torch.device) -> judge.Judge:
        learnt.extend(dataset.at(i)["caption"] for i in range(dataset.samples))
        return train(kind, dataset, seed, device)

    def correct(self: CaptionProbe, images: torch.Tensor, items: Any) -> dict[str, torch.Tensor]:
        judged.append([item["caption"] for item in items])
        return {name: torch.tensor([len(judged) == 2] * len(items)) for name in ATTRIBUTES}

    monkeypatch.setattr(CaptionProbe, "steps", 2)
    monkeypatch.setattr(judge, "train_judge", noted)
    monkeypatch.setattr(CaptionProbe, "correct", correct)
    given = [f"statistics_dir={tmp_path}/statistics", "samples=7", "clip_score=null"]
    metrics = evaluate.evaluate_run(config(project, tmp_path / "first", *given), runtime)
    heldout = ImageDataset(project.folder / "shards" / "heldout", project.config("evaluate").images, 0)
    captions = [heldout.at(i)["caption"] for i in range(7)]
    assert judged == [captions, captions]  # images drawn of them, then the real ones
    assert len(learnt) == 53 and not set(learnt) & set(captions)
    assert {metrics[f"eval/prompt_following/{name}"] for name in ATTRIBUTES} == {0.0}
    assert {metrics[f"probe/accuracy/{name}"] for name in ATTRIBUTES} == {1.0}
    evaluate.evaluate_run(config(project, tmp_path / "second", *given), runtime)
    assert len(learnt) == 53  # kept


def test_judges_stand_beside_each_other(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (ClassProbe, SegmentJudge):
        monkeypatch.setattr(kind, "steps", 2)
    given = ["prompt_following=false", "judges=[classes,segments]", "samples=4", "clip_score=null", "bootstrap=0"]
    metrics = evaluate.evaluate_run(config(project, tmp_path, *given, f"statistics_dir={tmp_path}/kept"), runtime)
    names = {"class", "pixel", "segment"}
    judged = {f"eval/label_following/{name}" for name in names} | {f"probe/accuracy/{name}" for name in names}
    assert judged == {name for name in metrics if "following" in name or name.startswith("probe/")}
    assert all(0 <= metrics[name] <= 1 for name in judged)


def test_captions_are_used_again_with_other_noise(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    cfg = config(project, tmp_path, "prompt_following=false", "clip_score=null", "samples=9")
    drawn = subjects.GeneratedImages(cfg, runtime, load_model(cfg, runtime.device), {})
    assert drawn.captions(range(9))[7:] == drawn.captions(range(2))
    first, again = (drawn.measure(range(start, start + 1))["image"] for start in (0, 7))
    assert not torch.equal(first, again)


def test_captions_that_are_cut_are_told(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = config(project, tmp_path, "samples=7")
    drawn = subjects.GeneratedImages(cfg, runtime, load_model(cfg, runtime.device), {})
    drawn.say_cut()
    assert capfd.readouterr().out == ""
    monkeypatch.setattr(subjects, "captions_of", lambda *_: ["a red planet", "a red planet " * 40])
    drawn.say_cut()
    told = capfd.readouterr().out.splitlines()
    assert "1 of 2 captions are longer than the 32 tokens" in told[0] and "left out: 'a red planet" in told[0]
    assert len(told) == 1 + (drawn.clip is not None)


def test_image_is_the_same_in_every_chunk(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    cfg = config(project, tmp_path, "prompt_following=false", "clip_score=null")
    drawn = subjects.GeneratedImages(cfg, runtime, load_model(cfg, runtime.device), {})
    together, alone = drawn.measure(range(0, 4)), drawn.measure(range(3, 4))
    assert (together["image"][3:].int() - alone["image"].int()).abs().max() <= 1


def test_autoencoder_is_judged_by_what_it_gives_back(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    metrics = evaluate.evaluate_run(config(project, tmp_path, "subject=autoencoder", f"output_dir={tmp_path}"), runtime)
    compared = {"eval/psnr", "eval/ssim", "eval/efficientnet"}
    assert metrics.keys() == compared | {f"eval/r{name}" for name in DISTANCES} | SPEED
    stage = project.rows("autoencoder")[-1]  # its own evaluation, of the same held-out images
    assert {name: metrics[name] for name in ("eval/psnr", "eval/ssim")} == pytest.approx(
        {name: stage[name] for name in ("eval/psnr", "eval/ssim")}, rel=1e-4
    )
    assert metrics["eval/rfd_efficientnet"] > metrics["eval/rfd_efficientnet_floor"] / 2
    facts = read(tmp_path / "protocol.json")
    assert facts["samples"] == 7 and "sampler" not in facts
    assert (tmp_path / "grid.png").is_file()


def test_broken_images_are_named_before_a_metric_is_made(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, latents: torch.Tensor) -> torch.Tensor:
        return torch.full((len(latents), 3, 32, 32), float("nan"))

    monkeypatch.setattr(sampling.DiffusionPipeline, "decode", broken)
    with pytest.raises(UserError, match=r"^images of '.*' … are NaN or infinite, 16 in all: set runtime.precision"):
        evaluate.evaluate_run(config(project, tmp_path, "prompt_following=false", "clip_score=null"), runtime)
    assert not (tmp_path / "metrics.json").exists()
    monkeypatch.setattr(Autoencoder, "decode", broken)
    with pytest.raises(UserError, match=r"^7 of 7 images that the autoencoder gives back contain NaN or infinity"):
        evaluate.evaluate_run(config(project, tmp_path, "subject=autoencoder", f"output_dir={tmp_path}"), runtime)


def test_bias_of_few_images_is_said(project: Any, evaluated: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from train.evaluation.metrics import warn_of_bias

    warn_of_bias(efficientnet(), {"fd_efficientnet": 5400.0, "fd_efficientnet_floor": 1472.7}, 16)
    said = " ".join(capfd.readouterr().out.split())
    assert "rests on 16 images for 976 features: perfect images would score about 1472.7" in said


def test_export_without_a_finished_training_is_refused_before_the_work(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(project.folder / "unet" / "export", tmp_path / "unet" / "export")
    monkeypatch.setattr(evaluate, "load_model", lambda *_: pytest.fail("the networks were loaded"))
    with pytest.raises(UserError, match=r"^unet=.*: no DONE beside it"):
        evaluate.evaluate_run(config(project, tmp_path / "out", f"unet={tmp_path}/unet/export"), runtime)
    assert not (tmp_path / "out").exists()


def test_real_images_of_another_size_are_refused(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^images.resolution=64: this U-Net draws 32 pixels, .* set images.resolution=32"
    ):
        evaluate.evaluate_run(config(project, tmp_path / "out", "images.resolution=64"), runtime)


def test_fewer_images_than_a_metric_needs_are_refused_before_the_work(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"samples=3": 4, "samples=9 inception=FILE": 10}
    for given, fewest in few.items():
        with pytest.raises(UserError, match=rf"^samples=.: the metrics need at least {fewest} images"):
            config(project, tmp_path, *given.split())
    with pytest.raises(UserError, match=r"^evaluation.samples=3: the metrics need at least 4 images"):
        project.config("unet", "evaluation.samples=3")
    monkeypatch.setattr(subjects, "inception", toy_inception)
    with pytest.raises(UserError, match=r"^captions=.* holds 7: the metrics need at least 10 images with inception"):
        evaluate.evaluate_run(config(project, tmp_path, "subject=autoencoder", "inception=toy"), runtime)
    monkeypatch.setattr("data.shards.manifest.Manifest.samples", property(lambda _: 3))
    with pytest.raises(UserError, match=r"^reference=.* holds 3: the metrics need at least 4 images"):
        reference_of(f"{project.folder}/shards/heldout", efficientnet(), ImageConfig(resolution=32), tmp_path, runtime)
    assert not list(tmp_path.iterdir())


def test_clip_that_is_not_there_is_told_by_its_option(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^clip_score: clip 'nobody/nothing' is neither a folder"):
        subjects.load_clip("nobody/nothing")
    with pytest.raises(UserError, match=r"^clip_score: .*config.json is missing"):
        subjects.load_clip(str(tmp_path))


def test_images_without_attributes_are_refused_before_a_image_is_drawn(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in ("train", "heldout"):
        shutil.copytree(project.folder / "shards" / side, tmp_path / "shards" / side)
    at = ImageDataset.at
    monkeypatch.setattr(ImageDataset, "at", lambda *given: at(*given) | {"meta": {}})
    monkeypatch.setattr(subjects, "generate_images", lambda *_: pytest.fail("images were drawn"))
    with pytest.raises(UserError, match=r"^prompt_following=true: sample '.*' names no kind"):
        here = [f"shards={tmp_path}/shards", f"statistics_dir={tmp_path}/statistics"]
        evaluate.evaluate_run(config(project, tmp_path / "out", *here), runtime)
    assert not (tmp_path / "out").exists()
