"""Edits of the demo set's captions, of which it is known what they change: for the evaluation of editing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from conf.schema import Edit
from data.building.sources.demo import BACKGROUNDS, COLORS, PARTS, Attributes, describe
from data.order import rng

OBJECTS = ("monster", "plant", "planet")  # kinds that stand on a background
SORTS: dict[str, dict[str, Any]] = {  # of edits, with the options that suit them (docs/editing.md)
    "color": {"blend_change": True, "blend_threshold": 0.4, "replace_until": 0.4},
    "background": {"blend_change": True, "blend_threshold": 0.4, "replace_until": 0.4},
    "kind": {"blend_change": True, "blend_threshold": 0.2, "replace_until": 0.1, "self_until": 0.0},
    "added": {"blend_change": True, "blend_threshold": 0.4, "replace_until": 0.2, "self_until": 0.0},
    "removed": {"blend_change": True, "blend_threshold": 0.4, "replace_until": 0.2, "self_until": 0.0},
}


@dataclass(frozen=True, slots=True)
class DemoEdit:
    """An edit, and what is another one in the scene afterwards."""

    sort: str
    edit: Edit
    attribute: str
    value: str
    scenes: tuple[Attributes, Attributes]  # before and after
    number: int  # of the scene before


def demo_edits(scenes: Sequence[Attributes], each: int, seed: int, **strength: Any) -> list[DemoEdit]:
    """`each` edits of every sort, of the first scenes that allow it; fewer where there are no more.

    Args:
        scenes: attributes of held-out scenes.
        each: edits of a sort.
        seed: of what is changed to what.
        strength: options of all edits, instead of those that suit a sort.
    """
    found: list[DemoEdit] = []
    for sort, suited in SORTS.items():
        changes = _changes(sort, scenes, rng(seed, 0, f"edits: {sort}"))
        for number, before, after, attribute in islice(changes, each):
            edit = Edit(prompt=describe(before), edit=describe(after), **(strength or suited))
            found.append(DemoEdit(sort, edit, attribute, after[attribute], (before, after), number))
    return found


def _changes(
    sort: str, scenes: Sequence[Attributes], random: np.random.Generator
) -> Iterator[tuple[int, Attributes, Attributes, str]]:
    """Number of a scene, the scene before and after, and the attribute that differs."""
    for number, scene in enumerate(scenes):
        if sort == "color":
            yield number, scene, scene | {"color": _other(random, COLORS, scene["color"])}, "color"
        elif sort == "background":
            yield number, scene, scene | {"background": _other(random, BACKGROUNDS, scene["background"])}, "background"
        elif sort == "kind" and scene["kind"] in OBJECTS:
            kind = _other(random, OBJECTS, scene["kind"])
            others = [other for other in scenes if other["kind"] == kind]
            if not others:
                continue
            like = others[int(random.integers(len(others)))]
            yield number, scene, like | {name: scene[name] for name in ("color", "background")}, "kind"
        elif sort in ("added", "removed"):
            there = [part for part in PARTS if part in scene and bool(scene[part]) == (sort == "removed")]
            for part in there[:1]:
                yield number, scene, scene | {part: "" if scene[part] else _other(random, PARTS[part], "")}, part


def _other(random: np.random.Generator, values: Any, known: str) -> str:
    """Any but the one that is there."""
    return str(random.choice([value for value in values if value != known]))
