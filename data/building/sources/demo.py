"""The built-in demo set: captioned scenes drawn from four CC0 styles of DiceBear in a palette of our own.

Every scene names its kind, main colour and background (for a landscape: the sky), each readable at 64 pixels; the other
attributes (shape, mood, eyes, ring …) are those that a person sees at that size too. A scene is a pure function of
(seed, index).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from conf.schema import BuildRun
from data.building.sources import Sample
from data.building.sources.rendering import SEGMENTS, RenderedSource, drawing, image, parts_map
from data.labels import Vocabulary
from data.order import rng

KINDS = ("monster", "plant", "planet", "landscape")
SHARES = (0.35, 0.25, 0.2, 0.2)  # of the kinds: more scenes for those with more attributes

LAYOUTS = 12  # arrangements per kind of what no caption names
COLORS = {
    "red": "#dc2626",
    "orange": "#fb8b1e",
    "yellow": "#fde035",
    "green": "#3fb950",
    "blue": "#2f6df0",
    "purple": "#8b3fd0",
    "pink": "#ff8fc7",
    "white": "#f5f5f5",
}
BACKGROUNDS = {
    "black": "#101014",
    "navy": "#1c2a80",
    "maroon": "#6f1226",
    "teal": "#0d7a70",
    "gray": "#8c9098",
    "cream": "#ffe9b0",
    "cyan": "#9be3fa",
}

# Word in the caption → DiceBear's variant; "" stands for the absence of the part.
BODIES = {"round": "dome", "square": "block", "tall": "tower", "bell-shaped": "bell"}
TOPS = {"": None, "horns": "horns", "round ears": "earsRound", "an antenna": "bobble"}
MONSTER_EYES = {"one eye": "mono", "two eyes": "round", "three eyes": "trio"}
MOODS = {"laughing": "grin", "sad": "frown", "surprised": "open"}
PLANTS = {"cactus": "cactus", "flower": "flower", "palm": "palm", "bush": "bush", "sprout": "sprout"}
POTS = {"tapered": "taper", "square": "cylinder", "round": "round"}
SURFACES = {"smooth": None, "banded": "banded", "cratered": "cratered"}
RINGS = {"": None, "a ring": "bold"}
MOONS = {"": None, "a moon": "one"}
HILLS = {"plains": "gentle", "mountains": "ridge"}
SUNS = {"": None, "with a sun": "sun"}
PARTS = {"top": TOPS, "ring": RINGS, "moon": MOONS, "sun": SUNS}  # which a scene may lack

CHOICES: dict[str, dict[str, dict[str, Any]]] = {  # what else the scenes of a kind have, and what it may be
    "monster": {"body": BODIES, "top": TOPS, "eyes": MONSTER_EYES, "mood": MOODS},
    "plant": {"plant": PLANTS, "pot": POTS, "mood": MOODS},
    "planet": {"surface": SURFACES, "ring": RINGS, "moon": MOONS},
    "landscape": {"hills": HILLS, "sun": SUNS},
}

Attributes = dict[str, str]  # of a scene
ATTRIBUTES = ("kind", "color", "background", "body", "eyes", "mood", "plant", "pot", "surface", "hills", *PARTS)

CAPTIONS = {
    "monster": "a {mood} {body} {color} monster{parts} on a {background} background",
    "plant": "a {mood} {plant} in a {pot} {color} pot on a {background} background",
    "planet": "a {surface} {color} planet{parts} on a {background} background",
    "landscape": "{color} {hills} under a {background} sky {sun}",
}


@dataclass(frozen=True, slots=True)
class Scene:
    """A scene to draw, with its caption."""

    attributes: dict[str, str]  # kind, color, background and the words of the caption
    caption: str
    options: dict[str, Any]  # of DiceBear

    @property
    def kind(self) -> str:
        """Kind of the scene, one of KINDS."""
        return self.attributes["kind"]

    def svg(self) -> str:
        """The drawing."""
        return drawing(self.kind, self.options)


def demo_source(cfg: BuildRun) -> RenderedSource:
    """Scenes, of which each has its kind as its class."""
    names = Vocabulary.of({"classes": KINDS, "segments": SEGMENTS})
    return RenderedSource(cfg, "scene", scene_sample, names, "DiceBear scenes", KINDS)


def scene_sample(seed: int, index: int, resolution: int) -> Sample:
    """Scene `index` with its labels."""
    drawn = scene(seed, index)
    svg = drawn.svg()
    label = {"class": drawn.kind, "class_id": KINDS.index(drawn.kind)}
    return Sample(
        image=image(svg, resolution),
        caption=drawn.caption,
        meta=drawn.attributes | label,
        segments=parts_map(drawn.kind, svg, resolution),
    )


def scene(seed: int, index: int) -> Scene:
    """Scene `index` of the set `seed`: attributes and the remaining chance drawn from the two alone."""
    random = rng(seed, index, "demo scene")
    return draw_scene(random, KINDS[int(random.choice(len(KINDS), p=SHARES))])


def draw_scene(random: np.random.Generator, kind: str) -> Scene:
    """A scene of this kind: everything else about it by chance."""
    color, background = _pick(random, COLORS), _pick(random, BACKGROUNDS)
    rest = {name: _pick(random, table) for name, table in CHOICES[kind].items()}
    attributes = {"kind": kind, "color": color, "background": background, **rest}
    return scene_of(attributes, int(random.integers(LAYOUTS)))


def scene_of(attributes: Attributes, layout: int) -> Scene:
    """The scene with these attributes, all that its kind has; `layout` is the rest of chance, below LAYOUTS."""
    chance = f"layout {layout}"  # stars, tilt of a ring, course of hills
    background = BACKGROUNDS[attributes["background"]]
    fixed = {"seed": chance, "animationVariant": ["none"], "backgroundColor": [background]}
    return Scene(attributes, describe(attributes), {**fixed, **_OPTIONS[attributes["kind"]](attributes)})


def attributes_of(meta: Mapping[str, Any]) -> Attributes:
    """Attributes of a scene in the JSON of its sample."""
    return {name: meta[name] for name in ATTRIBUTES if name in meta}


def describe(attributes: Mapping[str, str]) -> str:
    """The caption of a scene with these attributes, all that its kind has."""
    parts = _join(*(attributes.get(name, "") for name in ("eyes", "top", "ring", "moon")))
    words = {**attributes, "parts": f" with {parts}" if parts else ""}
    return CAPTIONS[attributes["kind"]].format_map(words).strip()


def render_scene(drawn: Scene, resolution: int) -> Image.Image:
    """RGB image of a scene, `resolution` pixels square."""
    return image(drawn.svg(), resolution)


def _monster(words: Attributes) -> dict[str, Any]:
    color = COLORS[words["color"]]
    return {
        "bodyColor": [color],
        "accentColor": [_mix(color, "#ffffff", 0.45)],
        **part("body", BODIES[words["body"]]),
        **part("top", TOPS[words["top"]]),
        **part("eyes", MONSTER_EYES[words["eyes"]]),
        **part("mouth", MOODS[words["mood"]]),
        **part("pattern", None),
        **part("cheeks", None),
    }


def _plant(words: Attributes) -> dict[str, Any]:
    return {
        "potColor": [COLORS[words["color"]]],
        "plantColor": ["#22c55e"],
        "bloomColor": ["#fb7185"],
        **part("plant", PLANTS[words["plant"]]),
        **part("pot", POTS[words["pot"]]),
        **part("eyes", "round"),
        **part("mouth", MOODS[words["mood"]]),
        **part("pattern", None),
        **part("cheeks", None),
    }


def _planet(words: Attributes) -> dict[str, Any]:
    return {
        "planetColor": [COLORS[words["color"]]],
        "moonColor": ["#d3d7e2"],
        **part("shade", "soft"),
        **part("surface", SURFACES[words["surface"]]),
        **part("ring", RINGS[words["ring"]]),
        **part("moons", MOONS[words["moon"]]),
    }


def _landscape(words: Attributes) -> dict[str, Any]:
    options: dict[str, Any] = {"orbColor": ["#ffb020"], **part("orb", SUNS[words["sun"]])}
    for layer, shade in enumerate((0.0, 0.14, 0.28, 0.42), start=1):  # far to near
        options[f"hill{layer}Color"] = [_mix(COLORS[words["color"]], "#000000", shade)]
        options |= part(f"hill{layer}", HILLS[words["hills"]])
    return options


_OPTIONS = {"monster": _monster, "plant": _plant, "planet": _planet, "landscape": _landscape}  # of DiceBear


def _pick(random: np.random.Generator, table: dict[str, Any]) -> str:
    return list(table)[int(random.integers(len(table)))]


def part(name: str, variant: str | None) -> dict[str, Any]:
    """DiceBear's options for a part of a drawing: one variant of it always, or, of None, never any."""
    return {f"{name}Probability": 0} if variant is None else {f"{name}Probability": 100, f"{name}Variant": [variant]}


def _join(*words: str) -> str:
    return " and ".join(word for word in words if word)


def _mix(color: str, other: str, share: float) -> str:
    """`color` with `share` of `other` blended in."""
    pairs = [(int(color[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)
