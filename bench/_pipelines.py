"""Whole pipelines of the demos' sizes with random weights: ours, and diffusers' of the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from conf.entry import compose
from conf.schema import AutoencoderRun, ClipRun, ConditionsConfig, Prediction, ProcessConfig, UNetRun
from models.autoencoder import Autoencoder
from models.clip import Clip
from models.conditions import ConditionContext, Conditions, Embedders
from models.denoiser import Denoiser
from models.diffusion.process import Process
from models.pipeline import DiffusionPipeline
from models.unet import UNet
from train.exporting.export import write_pipeline

DEMO = ["experiment=demo", "run_dir=unused"]


def models(
    folder: Path, conditions: ConditionsConfig, latent: int, peer: Any, **changed: Any
) -> tuple[DiffusionPipeline, Any]:
    """Ours, and diffusers' pipeline from what ours is exported to."""
    torch.manual_seed(0)
    cfg = replace(compose("train_unet", UNetRun, DEMO).model, out_channels=latent, **changed)
    autoencoder = Autoencoder(replace(compose("train_autoencoder", AutoencoderRun, DEMO).model, latent_channels=latent))
    clip = Clip.from_config(compose("train_clip", ClipRun, DEMO).model) if conditions.caption else None
    mean, std = torch.zeros(latent), torch.ones(latent)
    context = ConditionContext.of(cfg, downscale=autoencoder.cfg.downscale, latent_mean=mean, latent_std=std)
    denoiser = Denoiser(UNet(cfg), Embedders(Conditions(conditions), context)).requires_grad_(False)
    for parameter in denoiser.parameters():  # layers that start at zero would make every comparison equal
        parameter.add_(0.02 * torch.randn_like(parameter))
    process = Process(ProcessConfig(prediction=Prediction.eps))
    for network in (denoiser, autoencoder, *([clip] if clip else [])):
        network.eval()
    write_pipeline(folder, denoiser.unet, autoencoder, clip, process.scheduler_config(), peer.__name__)
    pipeline = peer.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return DiffusionPipeline(denoiser, autoencoder, clip, process, mean, std), pipeline
