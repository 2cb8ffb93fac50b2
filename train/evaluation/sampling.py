"""Pictures from a trained model: prompts in, PNGs and a captioned grid out."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from conf.entry import to_plain
from conf.errors import UserError
from conf.schema import EvaluateRun, SampleRun, SamplingConfig
from data.shards import atomic_path
from models.autoencoder import load_autoencoder
from models.pipeline import TextToImage
from models.process import Process
from models.prompts import parse
from models.text import load_text_tower
from models.unet import UNet
from train.engine.journal import say
from train.engine.pictures import captioned, to_uint8
from train.engine.precision import autocast
from train.engine.provenance import UNetInfo, info_of_trained, weights_digest
from train.engine.runtime import Runtime


def load_model(cfg: SampleRun | EvaluateRun, device: torch.device) -> TextToImage:
    """The exported U-Net with its autoencoder and CLIP; refuses a pair that was not trained together."""
    info = info_of_trained(cfg.unet, cfg.autoencoder, cfg.clip)
    return put_together(UNet.from_pretrained(cfg.unet), info, cfg, device)


def put_together(unet: UNet, info: UNetInfo, cfg: SampleRun | EvaluateRun, device: torch.device) -> TextToImage:
    """A U-Net with the other networks that it needs."""
    autoencoder, tower = load_autoencoder(cfg.autoencoder), load_text_tower(cfg.clip)
    for network in (unet, autoencoder, tower):
        network.eval().requires_grad_(False).to(device)
    mean, std = torch.tensor(info.latent_mean), torch.tensor(info.latent_std)
    return TextToImage(unet, autoencoder, tower, Process(info.process_config()), mean, std, cfg.tile)


def pictures(model: TextToImage, cfg: SampleRun | EvaluateRun, jobs: Sequence[tuple[str, int]]) -> Iterator[Tensor]:
    """Images [B, 3, H, W] in [-1, 1] of (prompt, number) jobs, batch by batch; the seed is the command's."""
    for start in range(0, len(jobs), cfg.batch_size):
        prompts, numbers = zip(*jobs[start : start + cfg.batch_size], strict=True)
        with autocast(model.device, cfg.runtime.precision):
            images = model(prompts, [cfg.seed] * len(prompts), cfg, indices=numbers)
        yield images


def read_prompts(cfg: SampleRun) -> list[str]:
    """Prompts of the command line and of the file, in that order."""
    prompts = list(cfg.prompts)
    if cfg.prompts_file is not None:
        path = Path(cfg.prompts_file)
        if not path.is_file():
            raise UserError(f"prompts_file={path}: no such file")
        prompts += [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"prompts_file={cfg.prompts_file}: holds no prompt; write one a line")
    if cfg.prompt_syntax:
        for prompt in (*prompts, cfg.negative_prompt):
            parse(prompt)  # before any network is loaded
    return prompts


def run(cfg: SampleRun, runtime: Runtime) -> None:
    """Write `00000.png` ... with their parameters inside, and `grid.png`; ranks share the pictures."""
    jobs = [(prompt, number) for prompt in read_prompts(cfg) for number in range(cfg.images_per_prompt)]
    model = load_model(cfg, runtime.device)
    folder = Path(cfg.output_dir)
    mine = list(range(runtime.rank, len(jobs), runtime.world))
    made = [to_uint8(images) for images in pictures(model, cfg, [jobs[i] for i in mine])]
    drawn = np.concatenate(made) if made else np.empty((0,))
    unet = weights_digest(cfg.unet)
    for index, image in zip(mine, drawn, strict=True):
        write_png(folder / f"{index:05d}.png", image, parameters(cfg, unet, *jobs[index]))
    parts = runtime.gather_objects(dict(zip(mine, drawn, strict=True)))
    if runtime.is_main:
        whole = {index: image for part in parts for index, image in part.items()}
        images = np.stack([whole[index] for index in range(len(jobs))])
        with atomic_path(folder / "grid.png") as path:
            captioned(images, [prompt for prompt, _ in jobs]).save(path, "PNG")
        say("sample", f"{len(jobs)} pictures and {folder / 'grid.png'}")


def parameters(cfg: SampleRun, unet: str, prompt: str, number: int) -> dict[str, Any]:
    """All that makes this picture again; `unet` is the digest of its weights."""
    return {
        "prompt": prompt,
        "seed": cfg.seed,
        "number": number,
        **sampling_facts(cfg),
        "unet": unet,
    }


def sampling_facts(cfg: SamplingConfig) -> dict[str, Any]:
    """The options between noise and picture, in plain values."""
    plain = to_plain(cfg)
    return {option.name: plain[option.name] for option in fields(SamplingConfig)}


def write_png(path: Path, image: np.ndarray, facts: dict[str, Any]) -> None:
    """A PNG whose text chunk `parameters` holds `facts` as JSON."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", json.dumps(facts))
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG", pnginfo=info)
