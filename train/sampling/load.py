"""Models that draw, with all their networks: of a run, of its export, of a folder in the Hub's format."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from conf.errors import UserError
from conf.files import sha256
from conf.schema import ConditionsConfig, ModelRun
from conf.schema.networks import UNetConfig
from models.autoencoder import Autoencoder
from models.conditions import ConditionContext, Conditions, Embedders
from models.denoiser import Denoiser
from models.diffusion.process import SCHEDULER, Process, read_scheduler
from models.diffusion.samplers import Student
from models.formats.autoencoder import scaling_factor
from models.formats.lora import FILE_NAME as ADAPTERS
from models.formats.lora import adapter_file, load_adapters
from models.formats.weights import read_json
from models.pipeline import DiffusionPipeline
from models.text import load_text_tower
from train.engine.metric_log import CONFIG, read_config
from train.engine.precision import round_weights
from train.latents.provenance import UNetInfo, info_of_trained

INDEX = "model_index.json"
CLASS = "StableDiffusionPipeline"


def load(folder: str | Path, device: torch.device | str = "cpu") -> DiffusionPipeline:
    """The model of a run such as `runs/demo`, or of a folder of diffusers' StableDiffusionPipeline.

    Of a run it is the exported U-Net, with the autoencoder and the CLIP that its training was given.

    Raises:
        UserError: neither of both, or networks that were not trained together.
    """
    if is_exported(folder):
        return load_exported(folder, device)
    run, trained = Path(folder), Path(folder) / "unet"
    if not (trained / CONFIG).is_file():
        raise UserError(f"{run}: holds neither {INDEX} nor unet/{CONFIG}; name a run or a folder of {CLASS}")
    recorded = read_config(trained)

    def place(option: str) -> str:
        path, before = (Path(OmegaConf.select(recorded, name)) for name in (option, "run_dir"))
        return str(run / path.relative_to(before) if path.is_relative_to(before) else path)  # it may have moved since

    cfg = ModelRun(run_dir=str(run), unet=str(trained / "export"), autoencoder=place("autoencoder"), clip=place("clip"))
    return load_model(cfg, device)


def load_model(cfg: ModelRun, device: torch.device | str) -> DiffusionPipeline:
    """The exported U-Net with its autoencoder and CLIP; refuses a pair that was not trained together."""
    info = info_of_trained(cfg.unet, cfg.autoencoder, cfg.clip)
    autoencoder = Autoencoder.from_pretrained(cfg.autoencoder)
    conditions_of = partial(info.build_conditions, downscale=autoencoder.cfg.downscale)
    denoiser = Denoiser.from_pretrained(cfg.unet, conditions_of)
    if cfg.lora is not None:
        refuse_merged(cfg.unet, cfg.lora)
        adapters = load_adapters(cfg.lora)
        info.check_adapters(adapters)
        info = info.taught_by(adapters)
        adapters.merge(denoiser.unet, cfg.lora_scale)
    return put_together(denoiser, autoencoder, info, cfg, device)


def put_together(
    denoiser: Denoiser, autoencoder: Autoencoder, info: UNetInfo, cfg: ModelRun, device: torch.device | str
) -> DiffusionPipeline:
    """A U-Net with the other networks that it needs."""
    tower = None if info.clip is None else load_text_tower(cfg.clip)
    for network in (denoiser, autoencoder, tower):
        if network is not None:
            network.eval().requires_grad_(False).to(device)
    round_weights(denoiser.unet, cfg.runtime.precision)
    mean, std = torch.tensor(info.latent_mean), torch.tensor(info.latent_std)
    process, student = Process(info.process_config()), Student.read(info.student)
    return DiffusionPipeline(denoiser, autoencoder, tower, process, mean, std, cfg.tile, student)


def refuse_merged(unet: str, lora: str) -> None:
    """Adapters count once: a training with `lora.rank` exports them both in the weights and alone."""
    exported = Path(unet) / ADAPTERS
    if exported.is_file() and sha256(exported) == sha256(adapter_file(lora)):
        raise UserError(
            f"lora={lora}: already in the weights of unet={unet}; set unet=FOLDER to what it was trained on"
        )


def lora_facts(cfg: ModelRun) -> dict[str, Any]:
    """The adapters that images depend on, in plain values; nothing where there are none."""
    if cfg.lora is None:
        return {}
    return {"lora_sha256": sha256(adapter_file(cfg.lora)), "lora_scale": cfg.lora_scale}


def is_exported(folder: str | Path) -> bool:
    """Whether a folder is one of diffusers' pipelines."""
    return (Path(folder) / INDEX).is_file()


def load_exported(folder: str | Path, device: torch.device | str, tile: int = 0) -> DiffusionPipeline:
    """The networks of a folder of diffusers' StableDiffusionPipeline; they sample as those of a run do.

    Raises:
        UserError: another pipeline than Stable Diffusion's, or parts that we do not have.
    """
    path = Path(folder)
    name = read_json(path / INDEX, INDEX).get("_class_name")
    if name != CLASS:
        raise UserError(f"{path}: holds a {name}; only {CLASS} is read, from a run everything that was trained here")
    autoencoder, tower = Autoencoder.from_pretrained(path / "vae"), load_text_tower(path / "text_encoder")
    scale = scaling_factor(path / "vae")
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
