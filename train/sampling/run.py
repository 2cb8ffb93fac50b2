"""Images from a trained model: prompts in, PNGs, a captioned grid and a film strip out."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from conf.entry import to_plain
from conf.errors import UserError
from conf.schema import ModelRun, SampleRun, SamplingConfig
from models.conditions import Inputs
from models.film import Film
from models.pipeline import DiffusionPipeline
from train.engine.image_grid import side_by_side, to_uint8
from train.engine.metric_log import say
from train.engine.precision import autocast
from train.engine.progress import Progress
from train.engine.runtime import Runtime
from train.latents.provenance import weights_digest
from train.sampling.load import load_model, lora_facts
from train.sampling.requests import Item, Job, Requests, jobs_of, read_prompts, samples_of, say_cut
from train.sampling.sample_folder import FILMED, SampleFolder

WRITERS = 4  # threads: a PNG takes as long as some images on a GPU
NAMED = 3  # prompts in an error


class GeneratedBatch(NamedTuple):
    """Images of B items and what they were made of."""

    images: Tensor  # [B, 3, H, W] in [-1, 1]
    originals: Tensor  # [B, 3, H, W], grey where there are none
    inputs: Inputs
    titles: list[str]


def sample(cfg: SampleRun, runtime: Runtime) -> None:
    """Write the images, `grid.png` and `film.png`; processes share the images.

    One that is there already, with the same parameters, is not drawn again.

    Raises:
        UserError: no prompts, networks that do not belong together, or images that are not finite.
    """
    # -------------------- what is missing
    prompts = read_prompts(cfg)  # first: what is wrong with them shall not wait for networks
    model = load_model(cfg, runtime.device)
    requests = Requests.of(cfg, model, prompts)
    if runtime.is_main:
        say_cut("sample", model, [prompt.text for prompt in requests.prompts], cfg)
    jobs = jobs_of(requests.prompts, cfg.images_per_prompt)
    folder = folder_of(cfg, requests, jobs)
    missing = [index for index in range(runtime.rank, len(jobs), runtime.world) if not folder.holds(index)]
    # One list for all before anybody writes: lists that were taken at different times would be shared out differently.
    missing = sorted(chain.from_iterable(runtime.gather_objects(missing)))

    # -------------------- images, batch by batch
    mine, broken, done, began = missing[runtime.rank :: runtime.world], list[int](), 0, time.monotonic()
    progress = Progress("sample", len(missing), "images", shown=runtime.is_main)
    with progress, ThreadPoolExecutor(WRITERS) as writers:
        files: list[Future[None]] = []
        for batch in requests.batches(jobs, mine, cfg.batch_size):
            runtime.threads.adjust()
            film = Film(cfg.film_frames, cfg.steps, [row for row, index in enumerate(batch) if index in folder.filmed])
            items, numbers = [requests.item(jobs[index]) for index in batch], [jobs[index].number for index in batch]
            generated = generate_images(model, cfg, items, numbers, film)
            sound = finite_images(generated.images)
            broken += [index for index, finite in zip(batch, sound, strict=True) if not finite]
            if done == 0 and not any(sound):  # a broken network is told now, not when all images are drawn
                require_finite(cfg, [jobs[index].prompt for index in broken])
            rows = writable(model, cfg, generated, film)
            for file in files:  # the batch before was written meanwhile; no third one shall wait in memory
                file.result()
            files = [writers.submit(folder.add, batch[row], *rows[row]) for row, finite in enumerate(sound) if finite]
            done += len(batch)
            progress.update(len(missing) * done // len(mine))  # as if all processes were as fast
        for file in files:
            file.result()

    # -------------------- what all processes made
    broken = sorted(chain.from_iterable(runtime.gather_objects(broken)))  # waits for the images of all processes
    seconds = time.monotonic() - began
    require_finite(cfg, [jobs[index].prompt for index in broken])
    if runtime.is_main:
        sheets = " and ".join(map(str, folder.write_sheets()))
        say("sample", f"{sampling_summary(len(jobs), len(missing), seconds)}: {sheets}")


def generate_images(
    model: DiffusionPipeline,
    cfg: ModelRun,
    items: Sequence[Item],
    numbers: Sequence[int],
    film: Film | None = None,
) -> GeneratedBatch:
    """The images of some items, with their numbers among those of the same caption, all in one batch."""
    conditions, captions = model.conditions, [item["caption"] for item in items]
    side = model.denoiser.unet.cfg.sample_size * model.autoencoder.cfg.downscale
    samples = samples_of(items, numbers, cfg.seed, side)
    with autocast(model.device, cfg.runtime.precision):
        inputs = model.prepare(samples)
        images = model(captions, [cfg.seed] * len(items), cfg, indices=numbers, callback=film, inputs=inputs)
    images = conditions.finish(images, samples.images, inputs)
    return GeneratedBatch(images, samples.images, inputs, conditions.titles(captions, inputs))


def writable(
    model: DiffusionPipeline, cfg: SampleRun, generated: GeneratedBatch, film: Film
) -> list[tuple[np.ndarray, str, np.ndarray | None, np.ndarray | None]]:
    """What `SampleFolder.add` writes of each image: pixels, title, the frames of its film, its condition."""
    images, frames, conditions = generated.images, dict[int, np.ndarray](), None
    if film.rows:
        with autocast(model.device, cfg.runtime.precision):
            strips = film.frames(model, images)  # [R, F, 3, H, W]
        frames = {row: to_uint8(strip) for row, strip in zip(film.rows, strips, strict=True)}
    if shown := model.conditions.show(generated.originals, generated.inputs):
        conditions = to_uint8(side_by_side([*shown, images])[..., : -images.shape[3]])  # as high as the images
    return [
        (pixels, title, frames.get(row), None if conditions is None else conditions[row])
        for row, (pixels, title) in enumerate(zip(to_uint8(images), generated.titles, strict=True))
    ]


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


def sampling_summary(wanted: int, drawn: int, seconds: float) -> str:
    """The end of the command in words."""
    if not drawn:
        return f"all {wanted:,} images were there already"
    there = f"; {wanted - drawn:,} were there already" if drawn < wanted else ""
    return f"{drawn:,} images in {seconds:.1f} s, {drawn / seconds:.3g} images/s{there}"


def folder_of(cfg: SampleRun, requests: Requests, jobs: Sequence[Job]) -> SampleFolder:
    """The files of the command, known again by all that makes their images."""
    shared = {"seed": cfg.seed, **sampling_facts(cfg), "tile": cfg.tile, "precision": cfg.runtime.precision.value}
    shared |= {"unet": weights_digest(cfg.unet), **lora_facts(cfg)}
    labels, filmed = list[str](), range(0)
    if cfg.film_frames:
        labels = Film(cfg.film_frames, cfg.steps, []).labels
        filmed = range(0, len(jobs), cfg.images_per_prompt)[:FILMED]  # the first image of each prompt

    def facts(index: int) -> dict[str, Any]:
        job = jobs[index]
        return {"prompt": job.prompt, "number": job.number, **shared, **requests.origin(job)}

    return SampleFolder(Path(cfg.output_dir), len(jobs), facts, filmed=filmed, labels=labels)


def sampling_facts(cfg: SamplingConfig) -> dict[str, Any]:
    """The options between noise and image, in plain values."""
    plain = to_plain(cfg)
    return {option.name: plain[option.name] for option in fields(SamplingConfig)}
