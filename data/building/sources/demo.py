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
    rest, options = _DRAW[kind](random, color)
    attributes = {"kind": kind, "color": color, "background": background, **rest}
    layout = f"layout {random.integers(LAYOUTS)}"  # the rest of chance: stars, tilt of a ring, course of hills
    fixed = {"seed": layout, "animationVariant": ["none"], "backgroundColor": [BACKGROUNDS[background]]}
    return Scene(attributes, describe(attributes), {**fixed, **options})


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


def _monster(random: np.random.Generator, color: str) -> tuple[dict[str, str], dict[str, Any]]:
    body, top = _pick(random, BODIES), _pick(random, TOPS)
    eyes, mood = _pick(random, MONSTER_EYES), _pick(random, MOODS)
    options = {
        "bodyColor": [COLORS[color]],
        "accentColor": [_mix(COLORS[color], "#ffffff", 0.45)],
        **part("body", BODIES[body]),
        **part("top", TOPS[top]),
        **part("eyes", MONSTER_EYES[eyes]),
        **part("mouth", MOODS[mood]),
        **part("pattern", None),
        **part("cheeks", None),
    }
    return {"body": body, "top": top, "eyes": eyes, "mood": mood}, options


def _plant(random: np.random.Generator, color: str) -> tuple[dict[str, str], dict[str, Any]]:
    plant, pot, mood = _pick(random, PLANTS), _pick(random, POTS), _pick(random, MOODS)
    options = {
        "potColor": [COLORS[color]],
        "plantColor": ["#22c55e"],
        "bloomColor": ["#fb7185"],
        **part("plant", PLANTS[plant]),
        **part("pot", POTS[pot]),
        **part("eyes", "round"),
        **part("mouth", MOODS[mood]),
        **part("pattern", None),
        **part("cheeks", None),
    }
    return {"plant": plant, "pot": pot, "mood": mood}, options


def _planet(random: np.random.Generator, color: str) -> tuple[dict[str, str], dict[str, Any]]:
    surface, ring, moon = _pick(random, SURFACES), _pick(random, RINGS), _pick(random, MOONS)
    options = {
        "planetColor": [COLORS[color]],
        "moonColor": ["#d3d7e2"],
        **part("shade", "soft"),
        **part("surface", SURFACES[surface]),
        **part("ring", RINGS[ring]),
        **part("moons", MOONS[moon]),
    }
    return {"surface": surface, "ring": ring, "moon": moon}, options


def _landscape(random: np.random.Generator, color: str) -> tuple[dict[str, str], dict[str, Any]]:
    hills, sun = _pick(random, HILLS), _pick(random, SUNS)
    options: dict[str, Any] = {"orbColor": ["#ffb020"], **part("orb", SUNS[sun])}
    for layer, shade in enumerate((0.0, 0.14, 0.28, 0.42), start=1):  # far to near
        options[f"hill{layer}Color"] = [_mix(COLORS[color], "#000000", shade)]
        options |= part(f"hill{layer}", HILLS[hills])
    return {"hills": hills, "sun": sun}, options


_DRAW = {"monster": _monster, "plant": _plant, "planet": _planet, "landscape": _landscape}


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
