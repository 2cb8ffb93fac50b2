"""The published networks that `model=` names: their sizes, that a choice is whole, and that it fits its command."""

from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from conf.entry import CONF, compose, register
from conf.errors import UserError
from conf.schema import AutoencoderRun, UNetRun
from conf.schema.networks import AutoencoderConfig, UNetConfig
from models.autoencoder import Autoencoder
from models.unet import UNet

NAMES = sorted(path.stem for path in (Path(CONF) / "model").glob("*.yaml") if path.stem != "none")
PARAMETERS = {  # counted in the published implementations
    "kl_f8": 83_653_863,
    "ldm_celebahq": 274_056_163,
    "ldm_text": 872_300_484,
    "sd1": 859_520_964,
    "sd2": 865_910_724,
    "sd2_mlperf": 865_910_724,
    "sdxl": 2_567_463_684,
}
MILLIONS = {"ldm_celebahq": 274, "ldm_churches": 294, "ldm_imagenet": 400, "ldm_inpainting": 387}  # as the paper says
TASKS = {"unconditional": "ldm_celebahq", "class": "ldm_imagenet", "layout": "ldm_layout", "semantic": "ldm_semantic"}


def chosen(name: str, *overrides: str) -> Any:
    """The network's dataclass as its command composes it, before the command's own checks."""
    command, schema, kind = ("train_unet", UNetRun, UNetConfig)
    if name.startswith(("kl_", "vq_")):
        command, schema, kind = ("train_autoencoder", AutoencoderRun, AutoencoderConfig)  # type: ignore[assignment]
    register(command, schema, overrides)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        node = hydra.compose(command, [f"model={name}", *overrides]).model
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), node))


def parameters(name: str) -> int:
    cfg = chosen(name)
    with torch.device("meta"):
        network = UNet(cfg) if isinstance(cfg, UNetConfig) else Autoencoder(cfg)
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_every_published_network_is_built_with_its_number_of_parameters(name: str) -> None:
    count = parameters(name)
    assert count == PARAMETERS.get(name, count) and count // 10**6 == MILLIONS.get(name, count // 10**6)
    assert count > 5e7


def test_the_defaults_of_the_schema_are_stable_diffusion_1() -> None:
    assert chosen("sd1") == UNetConfig() and chosen("kl_f8") == AutoencoderConfig()


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_leaves_nothing_of_an_experiment(name: str) -> None:
    assert chosen(name, "experiment=demo") == chosen(name)


@pytest.mark.parametrize("experiment", TASKS)
def test_a_task_of_the_paper_trains_the_network_of_the_paper(experiment: str) -> None:
    assert compose("train_unet", UNetRun, [f"experiment={experiment}"]).model == chosen(TASKS[experiment])


def test_a_single_size_can_still_be_changed() -> None:
    assert chosen("sd2", "model.sample_size=96").sample_size == 96


def test_a_network_of_another_command_is_refused() -> None:
    with pytest.raises(UserError, match=r"model/kl_f8 is not for this command: Key 'latent_channels' not in"):
        compose("train_unet", UNetRun, ["model=kl_f4", "run_dir=unused"])


def test_an_unknown_network_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(UserError, match=r"choose one of .*sd2"):
        compose("train_unet", UNetRun, ["model=sd3", "run_dir=unused"])
