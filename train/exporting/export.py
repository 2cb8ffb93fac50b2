"""A trained model as others load it: a folder for one of diffusers' pipelines, or one file with CompVis' names."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.errors import UserError
from conf.files import atomic_write
from conf.plain_json import dumps
from conf.schema import ExportFormat, ExportRun
from models.autoencoder import Autoencoder
from models.clip import Clip
from models.denoiser import Denoiser
from models.diffusion.process import SCHEDULER, Process
from models.diffusion.samplers import Student
from models.formats.clip import text_config, text_to_hugging_face, tokenizer_files, with_padding
from models.formats.single_file import write_single_file
from models.formats.weights import CONFIG_NAME, save_folder
from models.unet import UNet
from train.engine.metric_log import say
from train.latents.provenance import UNetInfo, info_of_trained

TEXT_WEIGHTS, INDEX_NAME = "model.safetensors", "model_index.json"
FORMAT = "0.30.0"  # of diffusers: how its pipelines read the folder
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WITH_TEXT: dict[str, Any] = {  # parts of Stable Diffusion's pipelines
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
WITHOUT_TEXT: dict[str, Any] = {"unet": ["diffusers", "UNet2DModel"], "vqvae": ["diffusers", "AutoencoderKL"]}
PIPELINES: dict[frozenset[str], tuple[str, dict[str, Any]]] = {  # of diffusers, by what the network is told
    frozenset({"caption"}): ("StableDiffusionPipeline", WITH_TEXT),
    frozenset({"caption", "masked"}): ("StableDiffusionInpaintPipeline", WITH_TEXT),
    frozenset(): ("LDMPipeline", WITHOUT_TEXT),
    frozenset({"low_resolution"}): ("LDMSuperResolutionPipeline", WITHOUT_TEXT),
}


def export_model(cfg: ExportRun) -> None:
    """Write the folder or the file; what stood there before stays until all is written."""
    info = info_of_trained(cfg.unet, cfg.autoencoder, cfg.clip)
    name, parts = pipeline_of(cfg, info)
    autoencoder = _autoencoder(cfg)
    denoiser = Denoiser.from_pretrained(cfg.unet, partial(info.build_conditions, downscale=autoencoder.cfg.downscale))
    require_expressible(cfg, denoiser, name)
    clip = _clip(cfg) if "text_encoder" in parts else None
    absorb_normalisation(autoencoder, torch.tensor(info.latent_mean), torch.tensor(info.latent_std))
    process, unet = Process(info.process_config()), denoiser.unet
    student = Student.read(info.student)
    in_few_steps = student is not None and student.in_few_steps
    if in_few_steps and process.flow:
        raise UserError(
            f"unet={cfg.unet}: {name} draws with no student of a flow, its LCMScheduler knows eps, v and x0 alone; "
            "load the U-Net in that folder by itself, or sample with train/sample.py"
        )
    if info.process_config().mean_flow > 0:
        raise UserError(
            f"unet={cfg.unet}: {name} draws with no mean flow, it tells no network how long a step is; load the U-Net "
            "in that folder by itself, or sample with train/sample.py"
        )
    if cfg.format is ExportFormat.compvis and unet.cfg.time_cond_proj_dim is not None:
        raise UserError(
            f"format=compvis: has no place for the guidance that unet={cfg.unet} is told; set format=diffusers"
        )
    for network in (unet, autoencoder, clip):
        if network is not None:
            network.to(DTYPES[cfg.dtype.value])
    if cfg.format is ExportFormat.diffusers:
        scheduler = process.scheduler_config(student=in_few_steps)
        write = partial(write_pipeline, unet=unet, autoencoder=autoencoder, clip=clip, scheduler=scheduler, name=name)
        _replace_folder(Path(cfg.output_dir), write)
        say("export", f"{cfg.output_dir}: {name}.from_pretrained reads it")
        return
    if clip is None:
        raise UserError("format=compvis: the file of Stable Diffusion has a text encoder, this network none")
    text = text_to_hugging_face(clip.network.state_dict(), clip.config.text_layers - clip.config.skip_last)
    path = Path(f"{cfg.output_dir}.safetensors")
    write_single_file(path, unet, autoencoder, text)
    say("export", f"{path}: one file with the names of CompVis")


def pipeline_of(cfg: ExportRun, info: UNetInfo) -> tuple[str, dict[str, Any]]:
    """The class of diffusers for what the network is told, and its parts; raises UserError where it has none."""
    conditions = frozenset(info.conditions)
    if conditions not in PIPELINES:
        raise UserError(
            f"unet={cfg.unet}: diffusers has no pipeline for conditions {', '.join(sorted(conditions))}; load the "
            "U-Net in that folder by itself, or sample with train/sample.py"
        )
    return PIPELINES[conditions]


def require_expressible(cfg: ExportRun, denoiser: Denoiser, name: str) -> None:
    """Refuse what the pipeline would not do as our sampler does it."""
    model, low = denoiser.unet.cfg, denoiser.conditions.kinds.get("low_resolution")
    if any(True for _ in denoiser.conditions.parameters()):
        raise UserError(f"unet={cfg.unet}: {name} knows no noise levels (conditions.low_resolution.noise_levels)")
    if low is not None and (model.in_channels // 2 != model.out_channels or low.scale != 1):
        raise UserError(
            f"unet={cfg.unet}: {name} takes latents of 3 channels, as large as the small image; train on an "
            "autoencoder with latent_channels=3 whose downscale factor is conditions.low_resolution.factor"
        )


def _autoencoder(cfg: ExportRun) -> Autoencoder:
    autoencoder = Autoencoder.from_pretrained(cfg.autoencoder)
    if autoencoder.quantize is not None:
        raise UserError(f"autoencoder={cfg.autoencoder}: diffusers' pipeline takes KL autoencoders only")
    return autoencoder


def _clip(cfg: ExportRun) -> Clip:
    if not (Path(cfg.clip) / CONFIG_NAME).is_file():
        raise UserError(f"clip={cfg.clip}: no folder that train/train_clip.py wrote")
    return Clip.from_pretrained(cfg.clip)


@torch.no_grad()
def absorb_normalisation(autoencoder: Autoencoder, mean: Tensor, std: Tensor) -> None:
    """Let the autoencoder itself work on (z - mean) / std, mean and std [C].

    diffusers' pipeline knows one factor for all channels; but the 1x1 convolutions on both sides of the latent can do
    more. The log-variance moves by -2 log std, its clamp to [-30, 20] with it, which no trained encoder comes near.
    """
    before, after = autoencoder.quant_conv, autoencoder.post_quant_conv
    assert before.bias is not None and after.bias is not None
    scale, shift = torch.cat([1 / std, torch.ones_like(std)]), torch.cat([-mean / std, -2 * std.log()])
    before.weight.mul_(scale.view(-1, 1, 1, 1))
    before.bias.mul_(scale).add_(shift)
    after.bias.add_((after.weight.flatten(1) @ mean).view(-1))
    after.weight.mul_(std.view(1, -1, 1, 1))


def write_pipeline(
    folder: Path,
    unet: UNet,
    autoencoder: Autoencoder,
    clip: Clip | None,
    scheduler: dict[str, object],
    name: str = "StableDiffusionPipeline",
) -> None:
    """All parts of the pipeline of that name; `model_index.json` last."""
    parts = next(parts for known, parts in PIPELINES.values() if known == name)
    unet.save_pretrained(folder / "unet")
    autoencoder.save_pretrained(folder / ("vae" if "vae" in parts else "vqvae"))
    if clip is not None:
        config = text_config(clip)
        text = text_to_hugging_face(clip.network.state_dict(), config["num_hidden_layers"])
        save_folder(folder / "text_encoder", config, with_padding(text), TEXT_WEIGHTS)
        for file, content in tokenizer_files(clip).items():
            atomic_write(folder / "tokenizer" / file, content.encode())
    atomic_write(folder / "scheduler" / SCHEDULER, dumps(scheduler, indent=2).encode())
    index = {
        "_class_name": name,
        "_diffusers_version": FORMAT,
        **parts,
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    atomic_write(folder / INDEX_NAME, dumps(index, indent=2).encode())


def _replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Written beside it, then put in its place; a folder with anything else than an export in it is left alone."""
    if folder.exists() and not (folder / INDEX_NAME).is_file():
        raise UserError(
            f"output_dir={folder}: holds something else than an export; name a folder that is not there yet"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (folder.with_name(f".tmp-{os.getpid()}-{kind}-{folder.name}") for kind in ("new", "old"))
    try:
        write(temporary)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for rest in (temporary, old):
            shutil.rmtree(rest, ignore_errors=True)
