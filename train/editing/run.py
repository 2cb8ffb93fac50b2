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
from conf.plain_json import dumps
from conf.schema import Edit, EditRun
from data.shards.shard import atomic_path, atomic_write
from models.editing.editing import Edited, check_edit, edit_images
from models.editing.inversion import require_invertible
from models.losses import psnr
from models.pipeline import DiffusionPipeline
from train.editing.edits_file import read_edits
from train.editing.sheet import sheet
from train.engine.image_grid import captioned, to_uint8
from train.engine.metric_log import MetricLog, say
from train.engine.precision import autocast
from train.engine.progress import Progress
from train.engine.runtime import Runtime
from train.latents.provenance import weights_digest
from train.sampling.requests import require_prompts_alone, samples_of, say_cut
from train.sampling.run import finite_images, load_model, lora_facts, require_finite, sampling_facts
from train.sampling.sample_folder import read_parameters, read_png, write_png
from train.sampling.user_images import read_given

SHOWN = 32  # edits in grid.png
MEASURED = ("changed", "region", "changed_outside", "reconstruction_psnr")


class EditJob(NamedTuple):
    """One image to be edited."""

    edit: Edit
    number: int  # among those of one edit
    image: str | None  # sha256 of the file, of a given one


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
    jobs, folder = edit_jobs(model, cfg, edits), Path(cfg.output_dir)
    shared = {"seed": cfg.seed, **sampling_facts(cfg), "unet": weights_digest(cfg.unet), **lora_facts(cfg)}
    known = [edit_facts(job, cfg) | shared for job in jobs]
    lacking = [index for index, facts in enumerate(known) if not holds(folder, index, facts)]
    lacking = runtime.gather_objects(lacking)[0]  # before another process writes
    mine, broken, done = lacking[runtime.rank :: runtime.world], list[int](), 0
    with Progress("edit", len(lacking), "edits", shown=runtime.is_main) as progress:
        for part in edit_batches(jobs, mine, cfg.batch_size):
            for index, made in zip(part, draw_batch(model, cfg, [jobs[index] for index in part]), strict=True):
                if all(finite_images(torch.stack([made.source.image, made.result.image]))):
                    write_edit(folder, index, jobs[index], made, known[index])
                else:
                    broken.append(index)
            done += len(part)
            progress.update(len(lacking) * done // len(mine))
    broken = sorted(chain.from_iterable(runtime.gather_objects(broken)))  # waits for the files of all processes
    require_finite(cfg, [jobs[index].edit.edited for index in broken])
    if runtime.is_main:
        record(cfg, folder, jobs, len(lacking))


def edit_jobs(model: DiffusionPipeline, cfg: EditRun, edits: Sequence[Edit]) -> list[EditJob]:
    """All images of all edits, in order; a given image is read and checked, once for all of its edits."""
    shape, digests = model.latent_shape(cfg), dict[str, str]()
    for path in dict.fromkeys(edit.image for edit in edits if edit.image is not None):
        image = read_given(path, "image")
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
    """Of these jobs those that can be drawn together: in their order, sources all given or all drawn."""
    alike = [list(group) for _, group in groupby(indices, lambda index: jobs[index].image is not None)]
    return [group[start : start + most] for group in alike for start in range(0, len(group), most)]


def draw_batch(model: DiffusionPipeline, cfg: EditRun, jobs: Sequence[EditJob]) -> list[Edited]:
    """Images of some jobs, in one batch."""
    numbers, side = [job.number for job in jobs], model.denoiser.unet.cfg.sample_size * model.autoencoder.cfg.downscale
    edits, seeds = [job.edit for job in jobs], [cfg.seed] * len(jobs)
    images = [read_given(edit.image, "image").item["image"] for edit in edits if edit.image is not None]
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


def write_edit(folder: Path, index: int, job: EditJob, made: Edited, known: dict[str, Any]) -> None:
    """The images, each with all that makes it again, and their sheet."""
    facts = known | measured_of(made)
    before, after = job.edit.prompt, edit_in_words(job.edit)
    images = {"before": (made.source.image, before), "after": (made.result.image, after)}
    for name, (image, title) in images.items():
        write_png(file_of(folder, index, name), to_uint8(image[None])[0], title, facts)
    write_png(file_of(folder, index), np.asarray(sheet(made, before, after)), f"{before} | {after}", facts)


def file_of(folder: Path, index: int, name: str = "") -> Path:
    """Of an edit: its images "before" and "after", or its sheet."""
    return folder / f"{index:05d}{name and '-'}{name}.png"


def holds(folder: Path, index: int, known: dict[str, Any]) -> bool:
    """Whether all files of an edit are there, made of the same."""
    found = (read_parameters(file_of(folder, index, name)) or {} for name in ("before", "after", ""))
    return all(facts | known == facts for facts in found)


def edit_facts(job: EditJob, cfg: EditRun) -> dict[str, Any]:
    """What an edit is, in plain values."""
    facts = {**asdict(job.edit), "mode": job.edit.mode.value, "number": job.number}
    facts |= {name: list(value) for name, value in facts.items() if isinstance(value, tuple)}  # as JSON has them
    return facts if job.image is None else {**facts, "image": job.image, "inversion": cfg.inversion.value}


def measured_of(made: Edited) -> dict[str, float]:
    """How much an edit changed, and how well a given image is drawn again."""
    change = (made.result.image - made.source.image).abs().mean(0)  # [H, W]
    measured = {"changed": change.mean().item()}
    if made.region is not None:
        measured["region"] = made.region.float().mean().item()
        measured["changed_outside"] = (change * ~made.region).mean().item()
    if made.reconstruction is not None:
        measured["reconstruction_psnr"] = psnr(made.reconstruction[None], made.source.image[None]).item()
    return {name: round(value, 5) for name, value in measured.items()}


def edit_in_words(edit: Edit) -> str:
    """The prompt after an edit, and the weights of its words."""
    weights = ", ".join(f"{word} {weight:g}" for word, weight in edit.weights.items())
    return f"{edit.edited} ({weights})" if weights else edit.edited


def record(cfg: EditRun, folder: Path, jobs: Sequence[EditJob], drawn: int) -> None:
    """`edits.jsonl` and `grid.png` of what is in the files, and all sheets to W&B."""
    facts = [read_parameters(file_of(folder, index)) or {} for index in range(len(jobs))]
    atomic_write(folder / "edits.jsonl", "".join(dumps(fact) + "\n" for fact in facts).encode())
    shown = range(min(SHOWN, len(jobs)))
    images = [read_png(file_of(folder, index, when)) for index in shown for when in ("before", "after")]
    titles = [title for job in jobs[:SHOWN] for title in (job.edit.prompt, edit_in_words(job.edit))]
    with atomic_path(folder / "grid.png") as path:
        captioned(np.stack(images), titles).save(path, "PNG")
    journal = MetricLog(folder, cfg.wandb, "edit", {"run_dir": cfg.run_dir, "edit": to_plain(cfg)}, is_main=True)
    for index, fact in enumerate(facts):
        journal.image("edit", read_png(file_of(folder, index)), index, edit_in_words(jobs[index].edit))
        journal.log(index, {f"edit/{key}": fact[key] for key in MEASURED if key in fact})
    journal.finish()
    there = f", {len(jobs) - drawn:,} of them there already" if drawn < len(jobs) else ""
    say("edit", f"{len(jobs):,} edits{there}: {folder / 'grid.png'}, a sheet of each in {folder}")
    found = [fact["reconstruction_psnr"] for fact in facts if "reconstruction_psnr" in fact]
    if found:
        say("edit", f"given images are drawn again with a PSNR of {sum(found) / len(found):.1f} dB")
