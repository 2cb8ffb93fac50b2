"""Do edits change what they say, and nothing else? On captions of the demo set, of which a probe can tell."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conf.entry import to_plain
from conf.errors import UserError
from conf.files import atomic_path, atomic_write
from conf.plain_json import dumps
from conf.schema import EvaluateEditsRun, ImageConfig, Perceptual
from data.building.sources.demo import LAYOUTS, attributes_of, render_scene, scene_of
from data.image_dataset import ImageDataset
from data.images import in_range, to_tensor
from models.editing.editing import Edited, edit_images
from models.losses import distance_inside, perceptual_distance
from models.pipeline import DiffusionPipeline
from train.editing.demo_edits import SORTS, DemoEdit, demo_edits
from train.editing.weighted_words import SORTS as SORTS_OF_WORDS
from train.editing.weighted_words import WEIGHTS, Row, reweighted, weighable, weights_figure, weights_metrics
from train.engine.figures import to_png
from train.engine.image_grid import captioned, to_uint8
from train.engine.metric_log import MetricLog, say
from train.engine.precision import autocast
from train.engine.progress import Progress
from train.engine.runtime import Runtime
from train.evaluation.judges.judge import accuracy, cached_judge
from train.evaluation.judges.probe import SceneProbe
from train.sampling.load import load_model
from train.sampling.requests import require_prompts_alone, say_cut
from train.sampling.run import finite_images, require_finite

SHOWN = 4  # edits of each sort in edits.png
WORDS_SHOWN = 2  # words of each sort in words.png
REPORTED_OF_WORDS = ("rising", "moving", "can_move", "obeying", "kept", "at_0", "at_1", "at_2")
REPORTED = ("right", "right_fresh", "lacking/right", "lacking/right_fresh", "distance_ratio", "perfect_ratio")
RIGHT = {"right": "edit", "right_fresh": "own", "right_before": "source"}
RATIOS = {
    "distance_ratio": ("distance/edit", "distance/same"),
    "distance_ratio_own_noise": ("distance/edit", "distance/own"),
    "outside_ratio": ("outside/edit", "outside/same"),
}


class Measures(NamedTuple):
    """What images are judged with."""

    probe: SceneProbe
    distance: torch.nn.Module  # images and references [B, 3, H, W] to [B]


def evaluate_edits(cfg: EvaluateEditsRun, runtime: Runtime) -> dict[str, float]:
    """Draw, judge, and write `metrics.json`, `edits.jsonl`, `edits.png` and `weights.png`; processes share the work.

    Raises:
        UserError: shards of another set, or networks that do not belong together.
    """
    model = load_model(cfg, runtime.device)
    require_prompts_alone(model.conditions, "evaluate_edits.py")
    if runtime.is_main:
        say_cut("edits", model, [], cfg)
    side = model.denoiser.unet.cfg.sample_size * model.autoencoder.cfg.downscale
    images = ImageConfig(resolution=side)
    heldout = ImageDataset(f"{cfg.shards}/heldout", images, cfg.seed, labels=True)
    items = [heldout.at(index) for index in range(heldout.samples)]
    SceneProbe.require(items[0])
    probe = cached_judge(SceneProbe, f"{cfg.shards}/train", images, cfg.seed, Path(cfg.statistics_dir), runtime)
    assert isinstance(probe, SceneProbe)
    distance = perceptual_distance(Perceptual.efficientnet)
    assert distance is not None
    measures = Measures(probe, distance.to(runtime.device))
    scenes = [attributes_of(item["meta"]) for item in items]
    edits = demo_edits(scenes, cfg.edits_per_sort, cfg.seed, **cfg.strength)
    if not edits:
        raise UserError(f"shards={cfg.shards}: no held-out scene can be edited; build more of them")
    given = torch.stack([item["image"] for item in items]) if cfg.given else None
    rows = shared(cfg, runtime, "edits", edits, partial(measured, model, cfg, measures, given))
    weighed = weighable(scenes, cfg.words_per_sort)
    curves = shared(cfg, runtime, "weights", weighed, partial(reweighted, model, cfg, probe))
    if not runtime.is_main:
        return runtime.gather_objects({})[0]  # of the main process, which judges and writes meanwhile
    metrics = edits_metrics(rows) | weights_metrics(curves) | accuracy(probe, heldout, runtime.device)
    write_evaluation(cfg, metrics, rows, curves)
    return runtime.gather_objects(metrics)[0]


def shared(cfg: EvaluateEditsRun, runtime: Runtime, what: str, jobs: Sequence[Any], measure: Any) -> list[Row]:
    """Rows of all jobs, of which each process does its share in batches."""
    numbers, rows = range(runtime.rank, len(jobs), runtime.world), list[tuple[int, Row]]()
    with Progress("edits", len(jobs), what, shown=runtime.is_main) as progress:
        for start in range(0, len(numbers), cfg.batch_size):
            part = numbers[start : start + cfg.batch_size]
            runtime.threads.adjust()
            with autocast(runtime.device, cfg.runtime.precision):
                rows += zip(part, measure(part, [jobs[number] for number in part]), strict=True)
            progress.update(len(jobs) * (start + len(part)) // len(numbers))
    return [row for _, row in sorted(chain.from_iterable(runtime.gather_objects(rows)), key=lambda pair: pair[0])]


def measured(
    model: DiffusionPipeline,
    cfg: EvaluateEditsRun,
    measures: Measures,
    given: Tensor | None,  # images [N, 3, H, W] of all scenes, which are edited in place of drawn ones
    numbers: Sequence[int],
    edits: list[DemoEdit],
) -> Iterator[Row]:
    """Rows of edits and of fresh samples of the edited prompts, with the source's noise and with another."""
    seeds, before = [cfg.seed] * len(edits), [edit.edit.prompt for edit in edits]
    sources = None if given is None else given[[edit.number for edit in edits]]
    made = edit_images(model, [edit.edit for edit in edits], seeds, cfg, indices=numbers, source_images=sources)
    after = [edit.edit.edited for edit in edits]
    same = model(after, seeds, cfg, indices=numbers, noise_of=before)
    own = model(after, seeds, cfg, indices=numbers)
    perfect = perfect_distances(measures, numbers, edits, same.shape[2]).tolist()
    for edit, one, alike, other, least in zip(edits, made, same, own, perfect, strict=True):
        sound = finite_images(torch.stack([one.source.image, one.result.image, alike, other]))
        require_finite(cfg, [] if all(sound) else [edit.edit.edited])
        yield measure_edit(measures, edit, one, alike, other) | {"distance/perfect": least}


@torch.no_grad()
def perfect_distances(measures: Measures, numbers: Sequence[int], edits: Sequence[DemoEdit], side: int) -> Tensor:
    """How far edits [B] would move images if they changed what they say and nothing else: of the scenes themselves."""
    drawn = [
        [scene_of(words, number % LAYOUTS) for words in edit.scenes]
        for number, edit in zip(numbers, edits, strict=True)
    ]
    tensors = [[in_range(to_tensor(np.asarray(render_scene(scene, side)))) for scene in pair] for pair in drawn]
    before, after = map(torch.stack, zip(*tensors, strict=True))
    device = next(measures.distance.parameters()).device
    return measures.distance(after.to(device), before.to(device))


@torch.no_grad()
def measure_edit(measures: Measures, edit: DemoEdit, made: Edited, same: Tensor, own: Tensor) -> Row:
    """What is measured of one edit."""
    source, result = made.source.image, made.result.image
    images = {"source": source, "edit": result, "same": same, "own": own}
    stacked = torch.stack([*images.values()])
    odds = measures.probe.log_probability(stacked, edit.attribute, edit.value).exp()
    best = measures.probe.most_probable(stacked, edit.attribute)
    away = measures.distance(stacked[1:], source.expand(3, -1, -1, -1))
    row: Row = {"sort": edit.sort, "prompt": edit.edit.prompt, "edit": edit.edit.edited, "attribute": edit.attribute}
    for name, value, found in zip(images, odds.tolist(), best, strict=True):
        row |= {f"right/{name}": found == edit.value, f"probability/{name}": value}
    row |= dict(zip(("distance/edit", "distance/same", "distance/own"), away.tolist(), strict=True))
    if made.region is not None and not made.region.all():
        outside = (~made.region).expand(2, -1, -1)
        found = distance_inside(measures.distance, stacked[1:3], source.expand(2, -1, -1, -1), outside)
        row |= dict(zip(("outside/edit", "outside/same"), found.tolist(), strict=True))
    row["images"] = to_uint8(torch.stack([source, result, same]))
    return row


def edits_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Shares and mean ratios of each sort and of all, `eval/edits/SORT/...`, and of those with something to change.

    A source may show what is asked for before the edit, so that an edit which does nothing is right;
    `eval/edits/SORT/lacking/...` is of the sources that do not.
    """
    found = dict[str, float]()
    for sort in [*dict.fromkeys(row["sort"] for row in rows), "all"]:
        own = [row for row in rows if sort in (row["sort"], "all")]
        missing = [row for row in own if not row["right/source"]]
        found |= means(f"eval/edits/{sort}", own) | means(f"eval/edits/{sort}/lacking", missing)
        found[f"eval/edits/{sort}/lacking/share"] = len(missing) / len(own)
    return found


def means(group: str, rows: Sequence[Row]) -> dict[str, float]:
    """Means over a group of edits; without those that nothing can be said of."""
    values = {name: [row[f"right/{which}"] for row in rows] for name, which in RIGHT.items()}
    for name, (mine, theirs) in RATIOS.items():
        values[name] = [row[mine] / row[theirs] for row in rows if mine in row and row[theirs] > 0]
    found = {f"{group}/{name}": float(np.mean(value)) for name, value in values.items() if value}
    # Of the means: to a part that the network does not draw, there is no distance to divide by.
    perfect, same = (sum(row.get(f"distance/{which}", 0.0) for row in rows) for which in ("perfect", "same"))
    return found | ({f"{group}/perfect_ratio": perfect / same} if perfect and same else {})


def write_evaluation(cfg: EvaluateEditsRun, metrics: dict[str, float], rows: list[Row], words: list[Row]) -> None:
    """Files, console and W&B."""
    folder = Path(cfg.output_dir)
    shown = [row for sort in SORTS for row in [row for row in rows if row["sort"] == sort][:SHOWN]]
    titles = [title for row in shown for title in (row["prompt"], row["edit"], f"{row['edit']}, drawn anew")]
    sheet = captioned(np.concatenate([row["images"] for row in shown]), titles, 3 * SHOWN)
    with atomic_path(folder / "edits.png") as path:
        sheet.save(path, "PNG")
    for name, lines in (("edits.jsonl", rows), ("weights.jsonl", words)):
        plain = [{key: value for key, value in line.items() if key != "images"} for line in lines]
        atomic_write(folder / name, "".join(dumps(line) + "\n" for line in plain).encode())
    atomic_write(folder / "metrics.json", dumps(metrics, indent=1).encode())
    log = MetricLog(folder, cfg.wandb, "edits", {"run_dir": cfg.run_dir, "edits": to_plain(cfg)}, is_main=True)
    log.log(0, metrics)
    log.image("edits", sheet, 0, "before, after, drawn anew with the same noise")
    if words:
        atomic_write(folder / "weights.png", to_png(weights_figure(words)))
        sheet = words_sheet(words)
        with atomic_path(folder / "words.png") as path:
            sheet.save(path, "PNG")
        log.image("words", sheet, 0, "by the weight of one word")
    log.finish()
    for sort in [*SORTS, "all"]:
        measured = {name: metrics.get(f"eval/edits/{sort}/{name}") for name in REPORTED}
        line = "  ".join(f"{name} {value:.2f}" for name, value in measured.items() if value is not None)
        say("edits", f"{sort:10}  {line}")
    for sort in [*SORTS_OF_WORDS, "all"]:
        measured = {name: metrics.get(f"eval/edits/weights/{sort}/{name}") for name in REPORTED_OF_WORDS}
        line = "  ".join(f"{name} {value:.2f}" for name, value in measured.items() if value is not None)
        if line:
            say("weights", f"{sort:10}  {line}")
    sheets = ["edits.png", "words.png"] if words else ["edits.png"]
    say("edits", ", ".join(str(folder / name) for name in ("metrics.json", *sheets)))


def words_sheet(words: Sequence[Row]) -> Image.Image:
    """Images of the first words of each sort at all weights, those of a word in a row."""
    sorts = dict.fromkeys(row["sort"] for row in words)
    shown = [row for sort in sorts for row in [row for row in words if row["sort"] == sort][:WORDS_SHOWN]]
    titles = [f"{row['value']} × {weight:g}" for row in shown for weight in WEIGHTS]
    return captioned(np.concatenate([row["images"] for row in shown]), titles, len(WEIGHTS))
