"""Images before and after edits of their prompts: files, a record of each, and W&B."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from conf.entry import to_plain
from conf.errors import UserError
from conf.files import atomic_write
from conf.plain_json import dumps
from conf.schema import Edit, EditRun
from models.editing.editing import Edited, check_edit, edit_images
from models.editing.inversion import require_invertible, require_walkable
from models.losses import psnr
from models.pipeline import DiffusionPipeline
from train.editing.edits_file import read_edits
from train.editing.sheet import sheet
from train.engine.image_grid import to_uint8
from train.engine.metric_log import MetricLog, say
from train.engine.precision import autocast
from train.engine.progress import Progress
from train.engine.runtime import Runtime
from train.latents.provenance import weights_digest
from train.sampling.load import load_model, lora_facts
from train.sampling.requests import require_prompts_alone, samples_of, say_cut
from train.sampling.run import finite_images, require_finite, sampling_facts
from train.sampling.sample_folder import SampleFolder, read_parameters, read_png
from train.sampling.user_images import read_user_image

PARTS = ("before", "after")
MEASURED = ("changed", "region", "changed_outside", "reconstruction_psnr")


class EditJob(NamedTuple):
    """One image to be edited."""

    edit: Edit
    number: int  # among those of one edit
    image: str | None  # sha256 of the file; None where the source is generated


def draw_edits(cfg: EditRun, runtime: Runtime) -> None:
    """Write the images, a sheet and a record of each edit and `grid.png`; processes share those that are not there.

    Raises:
        UserError: edits that cannot be, networks that do not belong together, or images that are not finite.
    """
    edits = read_edits(cfg)
    model = load_model(cfg, runtime.device)
    require_prompts_alone(model.conditions, "edit.py")
    if runtime.is_main:
        say_cut("edit", model, [], cfg)  # of long prompts an edit is refused
    for edit in edits:
        check_edit(model, edit, cfg)
    jobs = edit_jobs(model, cfg, edits)
    folder = folder_of(cfg, jobs)
    missing = [index for index in range(len(jobs)) if not folder.holds(index)]
    missing = runtime.gather_objects(missing)[0]  # before another process writes
    mine, broken, done = missing[runtime.rank :: runtime.world], list[int](), 0
    with Progress("edit", len(missing), "edits", shown=runtime.is_main) as progress:
        for batch in edit_batches(jobs, mine, cfg.batch_size):
            runtime.threads.adjust()
            for index, edited in zip(batch, edit_batch(model, cfg, [jobs[index] for index in batch]), strict=True):
                if all(finite_images(torch.stack([edited.source.image, edited.result.image]))):
                    write_edit(folder, index, jobs[index], edited)
                else:
                    broken.append(index)
            done += len(batch)
            progress.update(len(missing) * done // len(mine))
    broken = sorted(chain.from_iterable(runtime.gather_objects(broken)))  # waits for the files of all processes
    require_finite(cfg, [jobs[index].edit.edited for index in broken])
    if runtime.is_main:
        record_edits(cfg, folder, jobs, len(missing))


def folder_of(cfg: EditRun, jobs: Sequence[EditJob]) -> SampleFolder:
    """The files of the command: the images before and after each edit, and their sheet."""
    shared = {"seed": cfg.seed, **sampling_facts(cfg), "unet": weights_digest(cfg.unet), **lora_facts(cfg)}

    def facts(index: int) -> dict[str, Any]:
        return edit_facts(jobs[index], cfg) | shared

    return SampleFolder(Path(cfg.output_dir), len(jobs), facts, PARTS, sheet=True, measured=MEASURED)


def edit_jobs(model: DiffusionPipeline, cfg: EditRun, edits: Sequence[Edit]) -> list[EditJob]:
    """All images of all edits, in order; an image of a user is read and checked, once for all of its edits."""
    shape, digests = model.latent_shape(cfg), dict[str, str]()
    if any(edit.image is not None for edit in edits):
        require_walkable(model.student, cfg.inversion)
    for path in dict.fromkeys(edit.image for edit in edits if edit.image is not None):
        image = read_user_image(path, "image")
        try:
            require_invertible(cfg, cfg.inversion, image.item["image"], shape, model.autoencoder.cfg.downscale)
        except UserError as error:
            raise UserError(f"image={path}: {error}") from None
        digests[path] = image.digest
    return [
        EditJob(edit, number, None if edit.image is None else digests[edit.image])
        for edit in edits
        for number in range(cfg.images_per_edit if edit.image is None else 1)
    ]


def edit_batches(jobs: Sequence[EditJob], indices: Sequence[int], most: int) -> list[list[int]]:
    """Batches of these jobs, in their order; the sources of one are all given or all generated."""
    groups = [list(group) for _, group in groupby(indices, lambda index: jobs[index].image is not None)]
    return [group[start : start + most] for group in groups for start in range(0, len(group), most)]


def edit_batch(model: DiffusionPipeline, cfg: EditRun, jobs: Sequence[EditJob]) -> list[Edited]:
    """The images before and after some edits, all in one batch."""
    numbers, side = [job.number for job in jobs], model.denoiser.unet.cfg.sample_size * model.autoencoder.cfg.downscale
    edits, seeds = [job.edit for job in jobs], [cfg.seed] * len(jobs)
    images = [read_user_image(edit.image, "image").item["image"] for edit in edits if edit.image is not None]
    samples = samples_of([{"caption": edit.prompt} for edit in edits], numbers, cfg.seed, side)
    with autocast(model.device, cfg.runtime.precision):
        return edit_images(
            model,
            edits,
            seeds,
            cfg,
            indices=numbers,
            watch=cfg.maps,
            inputs=model.prepare(samples),
            source_images=torch.stack(images).to(model.device) if images else None,
            inversion=cfg.inversion,
        )


def write_edit(folder: SampleFolder, index: int, job: EditJob, edited: Edited) -> None:
    """The images, each with all that makes it again, and their sheet."""
    measured, before, after = measured_of(edited), job.edit.prompt, edit_in_words(job.edit)
    images = {"before": (edited.source.image, before), "after": (edited.result.image, after)}
    for part, (image, title) in images.items():
        folder.add(index, to_uint8(image[None])[0], title, part=part, measured=measured)
    folder.add(index, np.asarray(sheet(edited, before, after)), f"{before} | {after}", measured=measured)


def edit_facts(job: EditJob, cfg: EditRun) -> dict[str, Any]:
    """What an edit is, in plain values."""
    facts = {**asdict(job.edit), "mode": job.edit.mode.value, "number": job.number}
    facts |= {name: list(value) for name, value in facts.items() if isinstance(value, tuple)}  # as JSON reads it back
    facts["during"] = {word: list(window) for word, window in job.edit.during.items()}
    return facts if job.image is None else {**facts, "image": job.image, "inversion": cfg.inversion.value}


def measured_of(edited: Edited) -> dict[str, float]:
    """How much an edit changed, and how well a given image is drawn again."""
    change = (edited.result.image - edited.source.image).abs().mean(0)  # [H, W]
    measured = {"changed": change.mean().item()}
    if edited.region is not None:
        measured["region"] = edited.region.float().mean().item()
        measured["changed_outside"] = (change * ~edited.region).mean().item()
    if edited.reconstruction is not None:
        measured["reconstruction_psnr"] = psnr(edited.reconstruction[None], edited.source.image[None]).item()
    return {name: round(value, 5) for name, value in measured.items()}


def edit_in_words(edit: Edit) -> str:
    """The prompt after an edit, and the weights of its words."""
    weights = ", ".join(f"{word} {weight:g}" for word, weight in edit.weights.items())
    return f"{edit.edited} ({weights})" if weights else edit.edited


def record_edits(cfg: EditRun, folder: SampleFolder, jobs: Sequence[EditJob], generated: int) -> None:
    """`edits.jsonl` and `grid.png` of what is in the files, and all sheets to W&B."""
    facts = [read_parameters(folder.image(index)) or {} for index in range(len(jobs))]
    atomic_write(folder.folder / "edits.jsonl", "".join(dumps(fact) + "\n" for fact in facts).encode())
    (grid,) = folder.write_sheets()
    log = MetricLog(folder.folder, cfg.wandb, "edit", {"run_dir": cfg.run_dir, "edit": to_plain(cfg)}, is_main=True)
    for index, fact in enumerate(facts):
        log.image("edit", read_png(folder.image(index)), index, edit_in_words(jobs[index].edit))
        log.log(index, {f"edit/{key}": fact[key] for key in MEASURED if key in fact})
    log.finish()
    there = f", {len(jobs) - generated:,} of them there already" if generated < len(jobs) else ""
    say("edit", f"{len(jobs):,} edits{there}: {grid}, a sheet of each in {folder.folder}")
    found = [fact["reconstruction_psnr"] for fact in facts if "reconstruction_psnr" in fact]
    if found:
        say("edit", f"given images are drawn again with a PSNR of {sum(found) / len(found):.1f} dB")
