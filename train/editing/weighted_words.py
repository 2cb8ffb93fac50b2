"""Do the weights of words do what they say? On captions of the demo set, of which a probe can tell."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from conf.schema import Edit, EvaluateEditsRun
from data.building.sources.demo import PARTS, Attributes, describe
from models.editing.editing import edit_images, read_edited
from models.pipeline import DiffusionPipeline
from train.engine.image_grid import to_uint8
from train.evaluation.judges.probe import SceneProbe
from train.sampling.run import finite_images, require_finite

WEIGHTS = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0)
GONE, HALF, WRITTEN, MORE = (WEIGHTS.index(weight) for weight in (0.0, 0.5, 1.0, 2.0))
SORTS = ("kind", "color", "background", "mood", "part")  # of words
KINDS = {"monster": "kind", "planet": "kind", "plant": "plant", "landscape": "hills"}  # whose word names the kind
Row = dict[str, Any]  # what was measured of one word, in plain values
TOLERANCE = 0.01  # of a probability, by which it may fall from one weight to the next and still count as rising


class WeightedWord(NamedTuple):
    """A word of a caption, and what it names."""

    sort: str
    prompt: str
    attribute: str
    value: str  # of it, which is the word, or some in a row
    others: Attributes  # of the scene that the word does not name

    def edit(self, weight: float) -> Edit:
        """The edit that gives the word a weight."""
        return Edit(prompt=self.prompt, weights={self.value: weight})


def weighable(scenes: Sequence[Attributes], each: int) -> list[WeightedWord]:
    """`each` words of every sort, of the first scenes whose caption has one once; fewer where there are no more."""
    found = list[WeightedWord]()
    for sort in SORTS:
        own = list[WeightedWord]()
        for scene in scenes:
            caption = describe(scene)
            named = [name for name in named_by(sort, scene) if f" {caption} ".count(f" {scene[name]} ") == 1]
            if named and len(own) < each:
                name = named[len(own) % len(named)]
                others = {other: value for other, value in scene.items() if other not in (name, sort)}
                own.append(WeightedWord(sort, caption, name, scene[name], others))
        found += own
    return found


def named_by(sort: str, scene: Attributes) -> list[str]:
    """Attributes of a scene that words of a sort name."""
    if sort == "kind":
        return [KINDS[scene["kind"]]]
    return [name for name in (PARTS if sort == "part" else [sort]) if scene.get(name)]


def reweighted(
    model: DiffusionPipeline,
    cfg: EvaluateEditsRun,
    probe: SceneProbe,
    numbers: Sequence[int],
    words: Sequence[WeightedWord],
) -> Iterator[Row]:
    """What images show by the weight of a word, for some words; the images of one word share their noise.

    Beside them one of the prompt without the word, from noise of its own: what it shows of the word, a word that is
    masked cannot take away.
    """
    rest = [read_edited(model, word.edit(0.0), cfg) for word in words]
    fresh = model(rest, [cfg.seed] * len(words), cfg, indices=numbers)
    for number, word, alone in zip(numbers, words, fresh, strict=True):
        edits, count = [word.edit(weight) for weight in WEIGHTS], len(WEIGHTS)
        made = edit_images(model, edits, [cfg.seed] * count, cfg, indices=[number] * count)
        images = torch.stack([*(one.result.image for one in made), alone])
        require_finite(cfg, [] if all(finite_images(images)) else [word.prompt])
        odds = probe.log_probability(images, word.attribute, word.value).exp().tolist()
        read = {name: probe.most_probable(images[[HALF, MORE]], name) for name in word.others}
        yield {
            **word._asdict(),
            "probabilities": odds[:count],
            "probability_without": odds[count],
            "kept": [half == more for half, more in read.values()],
            "images": to_uint8(images[:count]),
        }


def weights_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Shares of the words of each sort, and of all, that do what their weight says: `eval/edits/weights/SORT/...`.

    rising    the probability of what the word names never falls by more than 0.01 from one weight to the next
    moving    at weight 0 it is less than half of what it is at weight 1
    can_move  in a fresh sample of the prompt without the word it is less than half of what it is at weight 1
    obeying   both
    kept      of the other attributes that the probe reads, the share that is the same at weights 0.5 and 2
    at_0, at_1, at_2   the mean probability at these weights
    """
    found = dict[str, float]()
    for sort in [*dict.fromkeys(row["sort"] for row in rows), *(["all"] if rows else [])]:
        own = [row for row in rows if sort in (row["sort"], "all")]
        odds = np.array([row["probabilities"] for row in own])  # [N, weights]
        rising = (np.diff(odds, axis=1) >= -TOLERANCE).all(1)
        without = np.array([row["probability_without"] for row in own])
        moving, can_move = (gone < 0.5 * odds[:, WRITTEN] for gone in (odds[:, GONE], without))
        values = {
            "rising": rising,
            "moving": moving,
            "can_move": can_move,
            "obeying": rising & moving,
            "kept": [same for row in own for same in row["kept"]],
            **{f"at_{WEIGHTS[column]:g}": odds[:, column] for column in (GONE, WRITTEN, MORE)},
        }
        found |= {f"eval/edits/weights/{sort}/{name}": float(np.mean(value)) for name, value in values.items()}
    return found


def weights_figure(rows: Sequence[Row]) -> Figure:
    """The probability of what a word names by the weight of the word: a panel for each sort, its mean in black."""
    sorts = list(dict.fromkeys(row["sort"] for row in rows))
    figure = Figure(figsize=(2.2 * len(sorts), 2.6), layout="constrained")
    panels = figure.subplots(1, len(sorts), sharey=True, squeeze=False)[0]
    for axes, sort in zip(panels, sorts, strict=True):
        odds = np.array([row["probabilities"] for row in rows if row["sort"] == sort])
        axes.plot(WEIGHTS, odds.T, color="C0", alpha=0.25, linewidth=0.8)
        axes.plot(WEIGHTS, odds.mean(0), color="black", linewidth=2)
        axes.set(title=sort, xlabel="weight", ylim=(-0.02, 1.02))
    panels[0].set_ylabel("probability of what it names")
    return figure
