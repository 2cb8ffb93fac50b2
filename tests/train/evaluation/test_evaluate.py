"""The evaluation: which numbers it leaves under which names, measured how, and what it refuses before the work."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conf.errors import UserError
from data.datasets import ImageDataset
from data.manifest import Manifest
from models.features import weights_sha256
from train.engine.runtime import Runtime
from train.evaluation import evaluate, probe

FRECHET = {"eval/fd_efficientnet", "eval/fd_efficientnet_floor"}
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
        patch.setattr(probe, "STEPS", 20)
        evaluate.run(config(project, folder), start(RuntimeConfig(device=Device.cpu)))
    return folder


def test_metrics_stand_under_their_names(evaluated: Path) -> None:
    metrics = read(evaluated / "metrics.json")
    assert metrics.keys() == FRECHET | FOLLOWING
    assert all(0 <= metrics[name] <= 1 for name in FOLLOWING)
    assert metrics["eval/fd_efficientnet"] > 0


def test_protocol_says_how_they_were_measured(project: Any, evaluated: Path) -> None:
    facts = read(evaluated / "protocol.json")
    extractors = facts.pop("extractors")
    assert facts == {
        "samples": 7,  # 16 were asked for, so many are held out
        "reference": Manifest.load(project.folder / "shards" / "heldout").digest(),
        "reference_samples": 7,
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
        "prompt_syntax": False,
        "weights": "ema",
        "seed": 0,
    }
    assert extractors == {
        "fd_efficientnet": {"sha256": weights_sha256(), "resize": "bilinear to 128 pixels, larger pictures to 224"}
    }


def test_same_numbers_are_recorded_at_the_samples_that_the_unet_had_seen(evaluated: Path) -> None:
    rows = [json.loads(line) for line in (evaluated / "metrics.jsonl").read_text().splitlines()]
    (row,) = [{k: v for k, v in row.items() if k != "time"} for row in rows]
    assert row == {"samples_seen": 960, **read(evaluated / "metrics.json")}
    assert (evaluated / "samples" / "evaluation-000000000960.png").is_file()
    with Image.open(evaluated / "grid.png") as grid:
        assert grid.width >= 7 * 128


def test_evaluation_joins_the_wandb_run_of_its_unet(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = tmp_path / "unet"
    shutil.copytree(project.folder / "unet", unet)
    (unet / "wandb_run_id").write_text("abc123")
    evaluate.run(config(project, tmp_path / "out", f"unet={unet}/export", "prompt_following=false"), runtime)
    assert (tmp_path / "out" / "wandb_run_id").read_text() == "abc123"
    assert read(tmp_path / "out" / "metrics.json").keys() == FRECHET


def test_probe_learns_from_training_images_and_is_measured_on_held_out_ones(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[str] = []
    judged: list[list[str]] = []

    class Recorder(probe.Probe):
        def correct(self, images: torch.Tensor, metas: Any) -> dict[str, torch.Tensor]:
            judged.append([meta["caption"] for meta in metas])
            return {name: torch.tensor([len(judged) == 2] * len(metas)) for name in ATTRIBUTES}

    def train(dataset: ImageDataset, seed: int, device: torch.device) -> probe.Probe:
        learnt.extend(dataset.at(i)["caption"] for i in range(dataset.samples))
        return Recorder(probe.ProbeNet({"kind": 1}), {})

    monkeypatch.setattr(evaluate, "train_probe", train)
    evaluate.run(config(project, tmp_path), runtime)
    heldout = ImageDataset(project.folder / "shards" / "heldout", project.config("evaluate").images, 0)
    captions = [heldout.at(i)["caption"] for i in range(7)]
    assert judged == [captions, captions]  # pictures drawn of them, then the real ones
    assert len(learnt) == 53 and not set(learnt) & set(captions)
    metrics = read(tmp_path / "metrics.json")
    assert {metrics[f"eval/prompt_following/{name}"] for name in ATTRIBUTES} == {0.0}
    assert {metrics[f"probe/accuracy/{name}"] for name in ATTRIBUTES} == {1.0}


def test_same_caption_twice_is_drawn_as_two_pictures(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[tuple[str, int]] = []
    draw = evaluate.pictures

    def noted(model: Any, cfg: Any, wanted: Any) -> Any:
        jobs.extend(wanted)
        return draw(model, cfg, wanted)

    monkeypatch.setattr(evaluate, "pictures", noted)
    evaluate.run(config(project, tmp_path, "prompt_following=false", "samples=4"), runtime)
    assert [number for _, number in jobs] == [0, 1, 2, 3]


def test_rank_without_prompts_adds_nothing(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    facts = {name: getattr(runtime, name) for name in ("local_rank", "device", "precision", "accelerator")}

    class First(Runtime):
        def gather_objects(self, value: Any) -> list[Any]:
            sent.append(value)
            return [value]

        def sum(self, values: Any) -> dict[str, float]:
            sent.append(values)
            return dict(values)

    class Last(Runtime):
        """Rank 8 of 9, of which seven have a picture each; the first one here stands for all of them."""

        def gather_objects(self, value: Any) -> list[Any]:
            return [sent.pop(0), value]

        def sum(self, values: Any) -> dict[str, float]:
            first = sent.pop(0)
            assert first.keys() == values.keys()
            return {name: first[name] + values[name] for name in first}

    compared: list[tuple[int, int]] = []
    compare = evaluate.compare

    def noted(extractor: Any, generated: Any, reference: Any) -> dict[str, float]:
        compared.append((generated.count, reference.count))
        return compare(extractor, generated, reference)

    monkeypatch.setattr(evaluate, "compare", noted)
    monkeypatch.setattr(probe, "STEPS", 2)
    evaluate.run(config(project, tmp_path / "first"), First(rank=0, world=1, **facts))
    evaluate.run(config(project, tmp_path / "last"), Last(rank=8, world=9, **facts))
    assert compared == [(7, 7), (7, 7)]
    assert not (tmp_path / "last").exists()


def test_export_without_a_finished_training_is_refused_before_the_work(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(project.folder / "unet" / "export", tmp_path / "unet" / "export")
    monkeypatch.setattr(evaluate, "load_model", lambda *_: pytest.fail("the networks were loaded"))
    with pytest.raises(UserError, match=r"^unet=.*: no DONE beside it"):
        evaluate.run(config(project, tmp_path / "out", f"unet={tmp_path}/unet/export"), runtime)
    assert not (tmp_path / "out").exists()


def test_images_without_attributes_are_refused_before_a_picture_is_drawn(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in ("train", "heldout"):
        shutil.copytree(project.folder / "shards" / side, tmp_path / "shards" / side)
    at = ImageDataset.at
    monkeypatch.setattr(ImageDataset, "at", lambda *given: at(*given) | {"meta": {}})
    monkeypatch.setattr(evaluate, "pictures", lambda *_: pytest.fail("pictures were drawn"))
    with pytest.raises(UserError, match=r"^prompt_following=true: sample '.*' names no kind"):
        evaluate.run(config(project, tmp_path / "out", f"shards={tmp_path}/shards"), runtime)
    assert not (tmp_path / "out").exists()
