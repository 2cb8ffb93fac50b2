"""Weights that are not finite are named when they are read, and never written."""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.errors import UserError
from conf.schema import LoraConfig
from conf.schema.networks import AutoencoderConfig, ClipConfig, UNetConfig
from models.autoencoder import Autoencoder
from models.clip import Clip
from models.diffusion.process import Process, read_scheduler
from models.formats.compvis import UNET, to_compvis, unet_pairs
from models.formats.lora import add_adapters, load_adapters, save_adapters
from models.formats.single_file import read_unet_file
from models.formats.weights import is_finite, metadata_of, save_file_atomic
from models.unet import UNet

LEVELS: dict[str, Any] = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
UNET_CFG = UNetConfig(**LEVELS, down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], attention_head_dim=[4])
CLIP_CFG = ClipConfig(
    embed_dim=8,
    image_size=16,
    patch_size=8,
    vision_width=32,
    vision_layers=1,
    text_width=8,
    text_heads=1,
    text_layers=1,
)


def unet(folder: Path) -> Callable[[], Any]:
    UNet(UNET_CFG).save_pretrained(folder)
    return lambda: UNet.from_pretrained(folder)


def autoencoder(folder: Path) -> Callable[[], Any]:
    Autoencoder(AutoencoderConfig(**LEVELS)).save_pretrained(folder)
    return lambda: Autoencoder.from_pretrained(folder)


def clip(folder: Path) -> Callable[[], Any]:
    Clip(CLIP_CFG).save_pretrained(folder)
    return lambda: Clip.from_pretrained(folder)


def adapters(folder: Path) -> Callable[[], Any]:
    network = UNet(UNET_CFG)
    add_adapters(network, LoraConfig(rank=2))
    save_adapters(folder, {f"unet.{name}": weight for name, weight in network.state_dict().items()}, LoraConfig(rank=2))
    return lambda: load_adapters(str(folder))


def single_file(folder: Path) -> Callable[[], Any]:
    weights = to_compvis(unet_pairs(UNET_CFG), UNet(UNET_CFG).state_dict())
    folder.mkdir()
    save_file({UNET + name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    return lambda: read_unet_file(folder / "model.safetensors", UNET_CFG)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("write", [unet, autoencoder, clip, adapters, single_file], ids=lambda write: write.__name__)
def test_one_weight_that_is_not_finite_is_named_with_its_file(
    tmp_path: Path, write: Callable[[Path], Callable[[], Any]], value: float
) -> None:
    read = write(tmp_path / "x")
    read()
    path = next((tmp_path / "x").glob("*.safetensors"))
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name].view(-1)[-1] = value
    save_file(weights, path)
    with pytest.raises(UserError, match=rf"{path.name}: its '{name.removeprefix(UNET)}' holds NaN or infinity"):
        read()


@pytest.mark.parametrize("write", [unet, autoencoder, clip], ids=lambda write: write.__name__)
def test_no_value_of_a_configuration_is_more_than_a_line(
    tmp_path: Path, write: Callable[[Path], Callable[[], Any]]
) -> None:
    read, path = write(tmp_path / "x"), tmp_path / "x" / "config.json"
    sound = json.loads(path.read_text())
    for name in sound:
        for value in (None, "x", [], {}, [None], -1, 0, 1.5, math.nan, True):
            path.write_text(json.dumps(sound | {name: value}))
            try:
                read()
            except UserError as error:
                assert "\n" not in str(error)
        path.write_text(json.dumps({key: value for key, value in sound.items() if key != name}))
        with suppress(UserError):
            read()


@pytest.mark.parametrize("flow", [True, False])
def test_no_value_of_a_scheduler_is_more_than_a_line(tmp_path: Path, flow: bool) -> None:
    numbers = {"num_train_timesteps": 1000, "beta_start": 0.1, "beta_end": 0.2, "flow_shift": 1.0}
    sound = {"use_flow_sigmas": flow, "beta_schedule": "linear", "prediction_type": "epsilon", **numbers}
    for name in sound:
        for value in (None, "x", [], {}, [None], -1, 0, 1e300, math.nan, True):
            (tmp_path / "x.json").write_text(json.dumps(sound | {name: value}))
            with suppress(UserError):
                Process(read_scheduler(tmp_path / "x.json"))


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    too_large = {"a": torch.zeros(3), "b": torch.tensor([1e6]).half()}
    with pytest.raises(UserError, match=r"x\.safetensors is not written: its 'b' would hold NaN .*: set dtype=fp32"):
        save_file_atomic(tmp_path / "x.safetensors", too_large)
    assert not list(tmp_path.iterdir())


def test_whole_numbers_and_eight_bits_are_looked_at_without_an_error() -> None:
    assert is_finite(torch.tensor([1, 2])) and is_finite(torch.ones(2).to(torch.float8_e4m3fn))
    assert not is_finite(torch.tensor([math.nan]).to(torch.float8_e4m3fn))


def test_a_file_says_what_was_put_beside_its_tensors(tmp_path: Path) -> None:
    save_file_atomic(tmp_path / "x", {"a": torch.zeros(1)}, {"b": "c"})
    assert metadata_of(tmp_path / "x") == {"format": "pt", "b": "c"}
    (tmp_path / "broken").write_bytes(b"no tensors")
    assert metadata_of(tmp_path / "broken") == metadata_of(tmp_path / "nowhere") == {}
