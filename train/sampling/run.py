"""Images from a trained model: prompts in, PNGs, a captioned grid and a film strip out."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from conf.entry import to_plain
from conf.errors import UserError
from conf.schema import ModelRun, SampleRun, SamplingConfig
from models.autoencoder import Autoencoder
from models.conditions import Inputs
from models.denoiser import Denoiser
from models.diffusion.process import Process
from models.film import Film
from models.formats.lora import FILE_NAME as ADAPTERS
from models.formats.lora import adapter_file, load_adapters
from models.pipeline import DiffusionPipeline
from models.text import load_text_tower
from train.engine.image_grid import side_by_side, to_uint8
from train.engine.metric_log import say
from train.engine.precision import autocast
from train.engine.progress import Progress
from train.engine.runtime import Runtime
from train.latents.provenance import UNetInfo, files_digest, info_of_trained, weights_digest
from train.sampling.requests import Item, Requests, jobs_of, read_prompts, samples_of, say_cut
from train.sampling.sample_folder import FILMED, SampleFolder

WRITERS = 4  # threads: a PNG takes as long as some images on a GPU
NAMED = 3  # prompts in an error


class Drawing(NamedTuple):
    """Images of B items and what they were made of."""

    images: Tensor  # [B, 3, H, W] in [-1, 1]
    originals: Tensor  # [B, 3, H, W], grey where there are none
    inputs: Inputs
    titles: list[str]


def load_model(cfg: ModelRun, device: torch.device) -> DiffusionPipeline:
    """The exported U-Net with its autoencoder and CLIP; refuses a pair that was not trained together."""
    info = info_of_trained(cfg.unet, cfg.autoencoder, cfg.clip)
    autoencoder = Autoencoder.from_pretrained(cfg.autoencoder)
    conditions_of = partial(info.build_conditions, downscale=autoencoder.cfg.downscale)
    denoiser = Denoiser.from_pretrained(cfg.unet, conditions_of)
    if cfg.lora is not None:
        refuse_merged(cfg.unet, cfg.lora)
        adapters = load_adapters(cfg.lora)
        info.check_adapters(adapters)
        adapters.merge(denoiser.unet, cfg.lora_scale)
    return put_together(denoiser, autoencoder, info, cfg, device)


def refuse_merged(unet: str, lora: str) -> None:
    """Adapters count once: a training with `lora.rank` exports them both in the weights and alone."""
    exported = Path(unet) / ADAPTERS
    if exported.is_file() and files_digest([exported]) == files_digest([adapter_file(lora)]):
        raise UserError(
            f"lora={lora}: already in the weights of unet={unet}; set unet=FOLDER to what it was trained on"
        )


def lora_facts(cfg: ModelRun) -> dict[str, Any]:
    """The adapters that images depend on, in plain values; nothing where there are none."""
    if cfg.lora is None:
        return {}
    return {"lora_sha256": files_digest([adapter_file(cfg.lora)]), "lora_scale": cfg.lora_scale}


def put_together(
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    info: UNetInfo,
    cfg: ModelRun,
    device: torch.device,
) -> DiffusionPipeline:
    """A U-Net with the other networks that it needs."""
    tower = None if info.clip is None else load_text_tower(cfg.clip)
    for network in (denoiser, autoencoder, tower):
        if network is not None:
            network.eval().requires_grad_(False).to(device)
    mean, std = torch.tensor(info.latent_mean), torch.tensor(info.latent_std)
    return DiffusionPipeline(denoiser, autoencoder, tower, Process(info.process_config()), mean, std, cfg.tile)


def draw_images(
    model: DiffusionPipeline,
    cfg: ModelRun,
    items: Sequence[Item],
    numbers: Sequence[int],
    film: Film | None = None,
) -> Drawing:
    """The images of some items, with their numbers among those of the same caption, all in one batch."""
    conditions, captions = model.conditions, [item["caption"] for item in items]
    side = model.denoiser.unet.cfg.sample_size * model.autoencoder.cfg.downscale
    samples = samples_of(items, numbers, cfg.seed, side)
    with autocast(model.device, cfg.runtime.precision):
        inputs = model.prepare(samples)
        images = model(captions, [cfg.seed] * len(items), cfg, indices=numbers, callback=film, inputs=inputs)
    images = conditions.finish(images, samples.images, inputs)
    return Drawing(images, samples.images, inputs, conditions.titles(captions, inputs))


def finite_images(images: Tensor) -> list[bool]:
    """Which images [B, 3, H, W] have no NaN and no infinity."""
    return images.flatten(1).isfinite().all(dim=1).tolist()


def require_finite(cfg: ModelRun, broken: Sequence[str]) -> None:
    """Name the prompts whose images were not finite, if there are any."""
    if broken:
        named = ", ".join(f"'{prompt}'" for prompt in broken[:NAMED]) + (" …" if len(broken) > NAMED else "")
        raise UserError(
            f"images of {named} are NaN or infinite, {len(broken)} in all: set runtime.precision=fp32 or a lower "
            f"guidance_scale; if that does not help, unet={cfg.unet} is broken"
        )


def sample(cfg: SampleRun, runtime: Runtime) -> None:
    """Write the images, `grid.png` and `film.png`; processes share the images.

    One that is there already, with the same parameters, is not drawn again.

    Raises:
        UserError: no prompts, networks that do not belong together, or images that are not finite.
    """
    prompts = read_prompts(cfg)
    model = load_model(cfg, runtime.device)
    asked = Requests.of(cfg, model, prompts)
    if runtime.is_main:
        say_cut("sample", model, [prompt.text for prompt in asked.prompts], cfg)
    album = album_of(cfg, asked)
    jobs = album.jobs
    lacking = [index for index in range(runtime.rank, len(jobs), runtime.world) if not album.holds(index)]
    lacking = sorted(chain.from_iterable(runtime.gather_objects(lacking)))
    began = time.monotonic()
    broken = fill(album, model, cfg, asked, lacking, runtime)
    broken = sorted(chain.from_iterable(runtime.gather_objects(broken)))  # waits for the images of all processes
    seconds = time.monotonic() - began
    require_finite(cfg, [jobs[index].prompt for index in broken])
    if runtime.is_main:
        sheets = " and ".join(map(str, album.write_sheets()))
        say("sample", f"{sampling_summary(len(jobs), len(lacking), seconds)}: {sheets}")


def sampling_summary(wanted: int, drawn: int, seconds: float) -> str:
    """The end of the command in words."""
    if not drawn:
        return f"all {wanted:,} images were there already"
    there = f"; {wanted - drawn:,} were there already" if drawn < wanted else ""
    return f"{drawn:,} images in {seconds:.1f} s, {drawn / seconds:.3g} images/s{there}"


def album_of(cfg: SampleRun, asked: Requests) -> SampleFolder:
    """The files that are asked for."""
    shared = {"seed": cfg.seed, **sampling_facts(cfg), "tile": cfg.tile, "precision": cfg.runtime.precision.value}
    shared |= {"unet": weights_digest(cfg.unet), **lora_facts(cfg)}
    jobs, labels, filmed = jobs_of(asked.prompts, cfg.images_per_prompt), list[str](), range(0)
    if cfg.film_frames:
        labels = Film(cfg.film_frames, cfg.steps, []).labels
        filmed = range(0, len(jobs), cfg.images_per_prompt)[:FILMED]
    files = {path: image.digest for path, image in asked.given.items()}
    return SampleFolder(Path(cfg.output_dir), jobs, shared, filmed, labels, asked.digest, files)


def sampling_facts(cfg: SamplingConfig) -> dict[str, Any]:
    """The options between noise and image, in plain values."""
    plain = to_plain(cfg)
    return {option.name: plain[option.name] for option in fields(SamplingConfig)}


def fill(
    album: SampleFolder,
    model: DiffusionPipeline,
    cfg: SampleRun,
    asked: Requests,
    lacking: Sequence[int],
    runtime: Runtime,
) -> list[int]:
    """Draw this process's share of what is lacking; a batch is written while the next one is drawn.

    Returns the images that were not finite, which are left out.

    Raises:
        UserError: the first batch has no other image.
    """
    mine, broken = lacking[runtime.rank :: runtime.world], []
    progress = Progress("sample", len(lacking), "images", shown=runtime.is_main)
    with progress, ThreadPoolExecutor(WRITERS) as writers:
        written: list[Future[None]] = []
        drawn = 0
        for part in asked.batches(album.jobs, mine, cfg.batch_size):
            drawing, frames = draw_filmed(album, model, cfg, asked, part)
            kept = [row for row, sound in enumerate(finite_images(drawing.images)) if sound]
            broken += [index for row, index in enumerate(part) if row not in kept]
            if drawn == 0 and not kept:
                require_finite(cfg, [album.jobs[index].prompt for index in broken])
            pixels, shown = to_uint8(drawing.images), model.conditions.show(drawing.originals, drawing.inputs)
            sheet = to_uint8(side_by_side([*shown, drawing.images])[..., : -drawing.images.shape[3]]) if shown else None
            finish_writing(written)
            written = [
                writers.submit(
                    album.add,
                    part[row],
                    pixels[row],
                    drawing.titles[row],
                    frames.get(row),
                    None if sheet is None else sheet[row],
                )
                for row in kept
            ]
            drawn += len(part)
            progress.update(len(lacking) * drawn // len(mine))  # as if all processes were as fast
        finish_writing(written)
    return broken


def draw_filmed(
    album: SampleFolder, model: DiffusionPipeline, cfg: SampleRun, asked: Requests, part: Sequence[int]
) -> tuple[Drawing, dict[int, np.ndarray]]:
    """The images of some jobs, and by row the frames, uint8 [F, H, W, 3], of those that are filmed."""
    jobs = [album.jobs[index] for index in part]
    items, numbers = [asked.item(job) for job in jobs], [job.number for job in jobs]
    rows = [row for row, index in enumerate(part) if index in album.filmed]
    if not rows:
        return draw_images(model, cfg, items, numbers), {}
    film = Film(cfg.film_frames, cfg.steps, rows)
    drawing = draw_images(model, cfg, items, numbers, film)
    with autocast(model.device, cfg.runtime.precision):
        frames = film.frames(model, drawing.images)  # [R, F, 3, H, W]
    return drawing, {row: to_uint8(strip) for row, strip in zip(rows, frames, strict=True)}


def finish_writing(written: Sequence[Future[None]]) -> None:
    """Wait for files; raises what went wrong with them."""
    for file in written:
        file.result()
