"""What was not made together is not used together, and the message says which part is the stranger."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from conf.errors import UserError
from conf.schema import Prediction, ProcessConfig
from conf.schema.networks import AutoencoderConfig
from data.shards.manifest import Manifest
from models.autoencoder import Autoencoder
from models.clip import Clip
from models.formats.lora import Adapters
from models.formats.weights import WEIGHTS_NAME, save_file_atomic
from train.latents.provenance import UNetInfo, check_latents, require_same, trained_otherwise, weights_digest


def check(project: Any, *overrides: str) -> UNetInfo:
    return check_latents(project.config("unet", *overrides), Manifest.load(project.folder / "latents" / "train"))


def test_info_of_a_fitting_cache(latents: Any) -> None:
    info = check(latents)
    stats = Manifest.load(latents.folder / "latents" / "train").stats
    assert (info.latent_mean, info.latent_std) == (stats["mean"], stats["std"])
    assert info.autoencoder == weights_digest(str(latents.folder / "autoencoder" / "export"))


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("model.out_channels=8", r"model\.out_channels is 8, the cache was made with 4"),
        ("model.sample_size=16", r"model\.sample_size is 16, the cache was made with 8"),
        ("model.cross_attention_dim=32", r"model\.cross_attention_dim is 32, the cache was made with 16"),
    ],
)
def test_network_that_does_not_fit_the_cache_is_refused_by_its_field(latents: Any, override: str, field: str) -> None:
    with pytest.raises(UserError, match=rf"^latents=.* does not fit this run: {field}"):
        check(latents, override)


@pytest.mark.parametrize("stats", [{}, {"mean": [0.0] * 4}, {"mean": [0.0] * 4, "std": [float("nan")] * 4}])
def test_a_cache_without_finite_statistics_is_refused(latents: Any, stats: dict[str, Any]) -> None:
    manifest = replace(Manifest.load(latents.folder / "latents" / "train"), stats=stats)
    with pytest.raises(UserError, match=r"^latents=.*: its manifest has no finite mean and std of each channel"):
        check_latents(latents.config("unet"), manifest)


def test_a_cache_that_does_not_say_how_it_was_made_is_refused(latents: Any) -> None:
    manifest = Manifest.load(latents.folder / "latents" / "train")
    for facts in ({}, {name: value for name, value in manifest.provenance.items() if name != "latent_size"}):
        with pytest.raises(UserError, match=r"^latents=.*: its manifest does not say .*latent_size.*: run data/"):
            check_latents(latents.config("unet"), replace(manifest, provenance=facts))


@pytest.mark.parametrize("option", ["autoencoder", "clip"])
def test_other_weights_than_those_that_made_the_cache_are_refused(latents: Any, tmp_path: Path, option: str) -> None:
    torch.manual_seed(1)
    network: Any = Autoencoder if option == "autoencoder" else Clip.from_config
    network(latents.config(option).model).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"does not fit this run: {option} \(weights\) is [0-9a-f]{{12}}\.\.\."):
        check(latents, f"{option}={tmp_path}")
    with pytest.raises(UserError, match=r"no weights in '.*nowhere'"):
        check(latents, f"{option}={tmp_path}/nowhere")


def test_a_pretrained_name_counts_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "open_clip_model.safetensors"
    weights.write_bytes(b"weights")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda known: str(weights))
    assert weights_digest("ViT-B-32/laion2b_s34b_b79k") == weights_digest(str(tmp_path))


def test_caches_from_before_there_were_shapes_hold_squares(latents: Any) -> None:
    manifest = Manifest.load(latents.folder / "latents" / "train")
    del manifest.provenance["shapes"]
    check_latents(latents.config("unet"), manifest)


def test_images_are_not_taken_for_latents(latents: Any) -> None:
    manifest = Manifest.load(latents.folder / "shards" / "train")
    with pytest.raises(UserError, match=r"^latents=.*: holds images, not latents"):
        check_latents(latents.config("unet"), manifest)


def test_copied_export_is_the_same_network(latents: Any, tmp_path: Path) -> None:
    shutil.copytree(latents.folder / "autoencoder" / "export", tmp_path / "copy")
    check(latents, f"autoencoder={tmp_path}/copy")


def test_info_survives_its_file(tmp_path: Path) -> None:
    process = {"prediction": "v", "min_snr_gamma": 5.0, "train_timesteps": 500}
    info = UNetInfo(process=process, latent_mean=[0.5], latent_std=[2.0], autoencoder="a", clip="c", weights="ema")
    info.save(tmp_path)
    assert UNetInfo.load(str(tmp_path)) == info
    expected = ProcessConfig(prediction=Prediction.v, min_snr_gamma=5.0, train_timesteps=500)
    assert info.process_config() == expected
    with pytest.raises(UserError, match=r"no latentline\.json in .*: train the U-Net first"):
        UNetInfo.load(str(tmp_path / "nowhere"))


def test_missing_null_text_is_asked_for(latents: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no null_text\.safetensors in .*: run data/precompute_latents\.py again"):
        check(latents).null_text(str(tmp_path))


def test_first_difference_of_two_architectures_is_named() -> None:
    ours, theirs = asdict(AutoencoderConfig(layers_per_block=1)), asdict(AutoencoderConfig())
    with pytest.raises(UserError, match=r"init_from: its layers_per_block is 2, model\.layers_per_block is 1"):
        require_same("init_from", ours, theirs)
    require_same("init_from", ours, dict(ours))


SOUND = UNetInfo(
    process={"prediction": "v"}, latent_mean=[0.5], latent_std=[2.0], autoencoder="a", clip="c", weights="ema"
)


@pytest.mark.parametrize(
    "wrong",
    [
        {"latent_mean": None},
        {"latent_mean": [math.nan]},
        {"latent_std": [0.0]},
        {"latent_std": [1.0, 1.0]},
        {"conditions": {"colour": {}}},
        {"conditions": None},
        {"process": {"prediction": "w"}},
        {"names": []},
    ],
    ids=str,
)
def test_facts_that_no_training_writes_are_one_line(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (tmp_path / "latentline.json").write_text(json.dumps(asdict(SOUND) | wrong))
    with pytest.raises(UserError, match=r"latentline\.json' is not of this version \(.+\): train or export"):
        UNetInfo.load(str(tmp_path))


def test_facts_of_other_weights_are_refused(tmp_path: Path) -> None:
    save_file_atomic(tmp_path / WEIGHTS_NAME, {"a": torch.zeros(1)}, SOUND.metadata())
    SOUND.save(tmp_path)
    assert UNetInfo.load(str(tmp_path)) == SOUND
    replace(SOUND, process={"prediction": "eps", "schedule": "linear"}).save(tmp_path)
    told = r"process\.prediction was v, is eps; process\.schedule was scaled_linear, is linear"
    with pytest.raises(UserError, match=rf"latentline\.json' is not that of the weights beside it \({told}\): copy"):
        UNetInfo.load(str(tmp_path))


def test_adapters_of_another_prediction_are_refused() -> None:
    flow = replace(SOUND, process={"prediction": "flow"})
    SOUND.check_adapters(Adapters("x", metadata=SOUND.metadata()))
    SOUND.check_adapters(Adapters("x"))  # others do not say
    with pytest.raises(UserError, match=r"^lora=x: process\.prediction was v, is flow of unet=; name the U-Net"):
        flow.check_adapters(Adapters("x", metadata=SOUND.metadata()))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, ""),
        ({"process": {"prediction": "v", "min_snr_gamma": 5.0}}, ""),  # how errors count is no one's meaning
        ({"process": {"prediction": "x0"}}, "process.prediction was x0, is v"),
        ({"process": {"prediction": "flow"}}, "process.prediction was flow, is v"),
        ({"process": {"prediction": "v", "beta_end": 0.02}}, "process.beta_end was 0.02, is 0.012"),
        ({"autoencoder": "b"}, "its latents were those of another autoencoder, normalised otherwise"),
        ({"clip": "d"}, "its text states were those of another clip"),
        ({"conditions": {"caption": {}, "masked": {}}}, "conditions were caption, masked, are caption"),
        ({"names": {"classes": ["a", "b"]}}, "its classes had other names"),
    ],
    ids=str,
)
def test_what_a_network_was_trained_for_otherwise_is_named(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    now = replace(SOUND, names={"classes": ["b", "a"]})
    replace(now, **changed).save(tmp_path)
    assert "; ".join(trained_otherwise(str(tmp_path), now)) == told


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        (None, "it does not say what it predicts, which must be process.prediction=v"),
        ({"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "beta_start": 0.00085}, "beta_end"),
        ({"prediction_type": "epsilon", "beta_schedule": "scaled_linear"}, "process.prediction was eps, is v"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "process.prediction was flow, is v"),
        ({"trained_betas": [0.1]}, "it does not say what it predicts"),
    ],
    ids=str,
)
def test_a_pipeline_of_diffusers_says_by_its_scheduler_what_its_network_predicts(
    tmp_path: Path, scheduler: dict[str, Any] | None, told: str
) -> None:
    (tmp_path / "unet").mkdir()
    if scheduler is not None:
        (tmp_path / "scheduler").mkdir()
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    assert told in "; ".join(trained_otherwise(str(tmp_path / "unet"), SOUND))


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"clip": "c", "colour": 1}'])
def test_facts_of_another_version_are_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "latentline.json").write_text(content)
    with pytest.raises(UserError, match=r"latentline\.json' is not of this version"):
        UNetInfo.load(str(tmp_path))
