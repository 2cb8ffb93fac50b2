"""A folder of diffusers' StableDiffusionPipeline, ours (`train/export.py`) or one in the format of the Hub."""

from pathlib import Path

import torch

from conf.errors import UserError
from conf.schema import ConditionsConfig
from conf.schema.networks import UNetConfig
from models.autoencoder import Autoencoder
from models.conditions import ConditionContext, Conditions, Embedders
from models.denoiser import Denoiser
from models.diffusion.process import SCHEDULER, Process, read_scheduler
from models.formats.weights import CONFIG_NAME, read_json
from models.pipeline import DiffusionPipeline
from models.text import load_text_tower

INDEX = "model_index.json"
CLASS = "StableDiffusionPipeline"
SCALE = 0.18215  # of the latents, where the autoencoder does not say: that of Stable Diffusion


def is_exported(folder: str) -> bool:
    """Whether a folder is one of diffusers' pipelines."""
    return (Path(folder) / INDEX).is_file()


def load_exported(folder: str, device: torch.device, tile: int = 0) -> DiffusionPipeline:
    """The networks of the folder, which samples as a run does.

    Raises:
        UserError: another pipeline than Stable Diffusion's, or parts that we do not have.
    """
    path = Path(folder)
    name = read_json(path / INDEX, INDEX).get("_class_name")
    if name != CLASS:
        raise UserError(f"{path}: holds a {name}; only {CLASS} is read, from a run everything that was trained here")
    autoencoder, tower = Autoencoder.from_pretrained(path / "vae"), load_text_tower(path / "text_encoder")
    scale = read_json(path / "vae" / CONFIG_NAME, CONFIG_NAME).get("scaling_factor", SCALE)
    if type(scale) not in (int, float) or not 0 < scale < 1e6:
        raise UserError(f"{path / 'vae' / CONFIG_NAME}: scaling_factor={scale!r} is not supported, it must be positive")
    channels = autoencoder.cfg.latent_channels
    mean, std = torch.zeros(channels), torch.full((channels,), 1 / scale)

    def conditions(model: UNetConfig) -> Embedders:
        context = ConditionContext.of(model, downscale=autoencoder.cfg.downscale, latent_mean=mean, latent_std=std)
        return Embedders(Conditions(ConditionsConfig()), context)

    denoiser = Denoiser.from_pretrained(path / "unet", conditions)
    process = Process(read_scheduler(path / "scheduler" / SCHEDULER))
    for network in (denoiser, autoencoder, tower):
        network.eval().requires_grad_(False).to(device)
    return DiffusionPipeline(denoiser, autoencoder, tower, process, mean, std, tile)
