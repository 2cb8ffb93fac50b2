"""Pictures before and after edits of their prompts: files, a record of each, and W&B."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from conf.entry import to_plain
from conf.schema import Edit, EditRun
from data.shards import atomic_path, atomic_write
from models.editing import Edited, check_edit, edit_pictures
from models.pipeline import DiffusionPipeline
from train.engine.journal import Journal, say
from train.engine.pictures import captioned, to_uint8
from train.engine.precision import autocast
from train.engine.progress import Progress
from train.engine.provenance import weights_digest
from train.engine.runtime import Runtime
from train.evaluation.album import read_parameters, read_png, write_png
from train.evaluation.asking import require_prompts_alone, samples_of
from train.evaluation.edit_sheets import sheet
from train.evaluation.edits import read_edits
from train.evaluation.sampling import finite, load_model, lora_facts, require_finite, sampling_facts

SHOWN = 32  # edits in grid.png


class Job(NamedTuple):
    """One picture to be edited."""

    edit: Edit
    number: int  # among those of one edit


def run(cfg: EditRun, runtime: Runtime) -> None:
    """Write the pictures, a sheet and a record of each edit and `grid.png`; processes share the edits.

    Raises:
        UserError: edits that cannot be, networks that do not belong together, or pictures that are not finite.
    """
    edits = read_edits(cfg)
    model = load_model(cfg, runtime.device)
    require_prompts_alone(model.denoiser.conditions, "edit.py")
    for edit in edits:
        check_edit(model, edit, cfg)
    jobs = [Job(edit, number) for edit in edits for number in range(cfg.images_per_edit)]
    shared = {"seed": cfg.seed, **sampling_facts(cfg), "unet": weights_digest(cfg.unet), **lora_facts(cfg)}
    folder, mine, broken = Path(cfg.output_dir), range(runtime.rank, len(jobs), runtime.world), list[int]()
    with Progress("edit", len(jobs), "edits", shown=runtime.is_main) as progress:
        for start in range(0, len(mine), cfg.batch_size):
            part = mine[start : start + cfg.batch_size]
            for index, made in zip(part, draw(model, cfg, [jobs[index] for index in part]), strict=True):
                if all(finite(torch.stack([made.source.image, made.result.image]))):
                    write(folder, index, jobs[index], made, shared)
                else:
                    broken.append(index)
            progress.update(min(len(jobs), len(jobs) * (start + len(part)) // len(mine)))
    broken = sorted(chain.from_iterable(runtime.gather_objects(broken)))  # waits for the files of all processes
    require_finite(cfg, [jobs[index].edit.edited for index in broken])
    if runtime.is_main:
        record(cfg, folder, jobs)


def draw(model: DiffusionPipeline, cfg: EditRun, jobs: Sequence[Job]) -> list[Edited]:
    """Pictures of some jobs, in one batch."""
    numbers, side = [job.number for job in jobs], model.denoiser.unet.cfg.sample_size * model.autoencoder.cfg.downscale
    samples = samples_of([{"caption": job.edit.prompt} for job in jobs], numbers, cfg.seed, side)
    with autocast(model.device, cfg.runtime.precision):
        inputs = model.prepare(samples)
        edits, seeds = [job.edit for job in jobs], [cfg.seed] * len(jobs)
        return edit_pictures(model, edits, seeds, cfg, indices=numbers, watch=cfg.maps, inputs=inputs)


def write(folder: Path, index: int, job: Job, made: Edited, shared: dict[str, Any]) -> None:
    """The pictures, each with all that makes it again, and their sheet."""
    facts = facts_of(job, made) | shared
    before, after = job.edit.prompt, told(job.edit)
    for name, picture, title in (("before", made.source, before), ("after", made.result, after)):
        write_png(folder / f"{index:05d}-{name}.png", to_uint8(picture.image[None])[0], title, facts)
    write_png(folder / f"{index:05d}.png", np.asarray(sheet(made, before, after)), f"{before} | {after}", facts)


def facts_of(job: Job, made: Edited) -> dict[str, Any]:
    """What an edit is, in plain values, and how much it changed."""
    plain = {**asdict(job.edit), "mode": job.edit.mode.value, "number": job.number}
    change = (made.result.image - made.source.image).abs().mean(0)  # [H, W]
    plain["changed"] = round(change.mean().item(), 5)
    if made.region is not None:
        plain["region"] = round(made.region.float().mean().item(), 5)
        plain["changed_outside"] = round((change * ~made.region).mean().item(), 5)
    return plain


def told(edit: Edit) -> str:
    """The prompt after an edit, and the weights of its words."""
    weights = ", ".join(f"{word} {weight:g}" for word, weight in edit.weights.items())
    return f"{edit.edited} ({weights})" if weights else edit.edited


def record(cfg: EditRun, folder: Path, jobs: Sequence[Job]) -> None:
    """`edits.jsonl` and `grid.png` of what is in the files, and all sheets to W&B."""
    names = [f"{index:05d}" for index in range(len(jobs))]
    facts = [read_parameters(folder / f"{name}.png") or {} for name in names]
    atomic_write(folder / "edits.jsonl", "".join(json.dumps(fact) + "\n" for fact in facts).encode())
    shown = names[:SHOWN]
    images = [read_png(folder / f"{name}-{when}.png") for name in shown for when in ("before", "after")]
    titles = [title for job in jobs[:SHOWN] for title in (job.edit.prompt, told(job.edit))]
    with atomic_path(folder / "grid.png") as path:
        captioned(np.stack(images), titles).save(path, "PNG")
    journal = Journal(folder, cfg.wandb, "edit", {"run_dir": cfg.run_dir, "edit": to_plain(cfg)}, is_main=True)
    for index, (name, fact) in enumerate(zip(names, facts, strict=True)):
        journal.image("edit", read_png(folder / f"{name}.png"), index, told(jobs[index].edit))
        measured = {f"edit/{key}": fact[key] for key in ("changed", "region", "changed_outside") if key in fact}
        journal.log(index, measured)
    journal.finish()
    say("edit", f"{len(jobs):,} edits: {folder / 'grid.png'}, a sheet of each in {folder}")
