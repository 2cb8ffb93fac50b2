"""Other averages of a trained U-Net become exports that sampling takes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conf.entry import compose
from conf.errors import UserError
from conf.schema import AverageRun, Device, RuntimeConfig
from models.unet import UNet
from train.engine import trainer
from train.engine.runtime import start
from train.exporting import average
from train.latents.provenance import UNetInfo
from train.training.unet import UNetStage


@pytest.fixture(scope="module")
def trained(latents: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A U-Net after 10 steps that left copies of its averages at every second."""
    folder, runtime = tmp_path_factory.mktemp("averages"), start(RuntimeConfig(device=Device.cpu))
    options = ["loop.samples=160", "loop.checkpoint_every=32", "loop.evaluate_every=100000", "loop.keep_checkpoints=1"]
    averages = ["ema.half_life_samples=50", "ema.more_half_lives=[20]", "ema.posthoc=[0.1,0.2]"]
    cfg = latents.config("unet", f"output_dir={folder}/unet", "sample_prompts=0", *options, *averages)
    trainer.fit(UNetStage(cfg, runtime), cfg, runtime)
    return folder / "unet"


def made(trained: Path, folder: Path, *options: str) -> dict[str, torch.Tensor]:
    cfg = compose(
        "average", AverageRun, [f"run_dir={folder}", f"trained={trained}", f"output_dir={folder}/x", *options]
    )
    average.export_average(cfg)
    assert UNetInfo.load(f"{folder}/x").weights in options
    assert UNetInfo.load(f"{folder}/x").process == UNetInfo.load(f"{trained}/export").process
    return {f"unet.{name}": tensor for name, tensor in UNet.from_pretrained(folder / "x").state_dict().items()}


def stored(trained: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(trained / "checkpoints" / "000000000160" / "unet" / f"{name}.safetensors")


@pytest.mark.parametrize(("half_life", "name"), [(50, "ema"), (20, "ema-20")])
def test_tracked_half_life_is_exported(trained: Path, tmp_path: Path, half_life: int, name: str) -> None:
    found = made(trained, tmp_path, f"half_life_samples={half_life}")
    assert all(torch.equal(found[key], tensor) for key, tensor in stored(trained, name).items())


def test_widths_are_put_together_from_the_copies(trained: Path, tmp_path: Path) -> None:
    assert len(list((trained / "averages").iterdir())) == 5
    narrow, between = (made(trained, tmp_path, f"sigma_rel={width}") for width in ("0.1", "0.15"))
    wide = stored(trained, "posthoc-0.2")
    for key, tensor in stored(trained, "posthoc-0.1").items():
        torch.testing.assert_close(narrow[key], tensor, rtol=0, atol=1e-6)
    key = "unet.conv_in.weight"
    apart = (wide[key] - narrow[key]).norm()
    assert 0 < (between[key] - narrow[key]).norm() < apart and 0 < (between[key] - wide[key]).norm() < apart


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "set either sigma_rel, such as 0.08, or half_life_samples"),
        (["sigma_rel=0.3"], r"sigma_rel=0\.3: in \(0, 0\.28\)"),
        (["half_life_samples=21"], "half_life_samples=21: not in .*, which has ema, ema-20$"),
        (["half_life_samples=20", "samples_seen=128"], "samples_seen=128: no checkpoint of it; choose one of 160"),
        (["sigma_rel=0.15", "samples_seen=16"], "no averages in"),
    ],
)
def test_average_that_is_not_there_is_refused(trained: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(trained, tmp_path, *options)
    assert not (tmp_path / "x").exists()


def test_other_folders_are_left_alone(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "unet")
    for folder in ("checkpoints", "export"):
        with pytest.raises(UserError, match="holds something else"):
            made(tmp_path / "unet", tmp_path, "sigma_rel=0.15", f"output_dir={tmp_path}/unet/{folder}")
