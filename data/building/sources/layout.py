"""Canvases with several of the demo's monsters, plants and planets, and the box of each: data for layout → image.

A canvas is a pure function of (seed, index); the box of an object is the smallest that holds every pixel it covers.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from conf.schema import BuildRun
from data.building.sources import Sample
from data.building.sources.demo import BACKGROUNDS, Scene, draw_scene
from data.building.sources.rendering import SEGMENTS, RenderedSource, figure, parts_map
from data.images import parse_color
from data.labels import Box, Labels, Vocabulary, to_json
from data.order import rng

OBJECTS = ("monster", "plant", "planet")
SIDES = {1: (0.4, 0.8), 2: (0.35, 0.5), 3: (0.3, 0.42), 4: (0.28, 0.38)}  # longer sides, by the number of objects
OVERLAP = 0.1  # of two objects' squares, at most, as a share of the smaller one


@dataclass(frozen=True, slots=True)
class Placed:
    """An object and the square that it fills from side to side, in fractions of the canvas."""

    scene: Scene
    left: float
    top: float
    side: float

    def pixels(self, resolution: int) -> tuple[int, int, int]:
        """Left, top and side of the square on a canvas of this size."""
        side = round(self.side * resolution)
        return min(round(self.left * resolution), resolution - side), round(self.top * resolution), side


@dataclass(frozen=True, slots=True)
class Canvas:
    """A canvas, its objects from back to front."""

    background: str
    objects: tuple[Placed, ...]

    @property
    def caption(self) -> str:
        """Names every object with its colour."""
        *first, last = [_phrase(placed.scene) for placed in self.objects]
        return f"{', '.join(first)}{' and ' if first else ''}{last} on a {self.background} background"


def layout_source(cfg: BuildRun) -> RenderedSource:
    """Canvases with the kinds of their objects, and their parts."""
    names = Vocabulary.of({"box_classes": OBJECTS, "segments": SEGMENTS})
    return RenderedSource(cfg, "canvas", layout_sample, names, "DiceBear layouts", OBJECTS)


def layout_sample(seed: int, index: int, resolution: int) -> Sample:
    """Canvas `index` with its labels; each box names the colour of its object, too."""
    drawn = layout(seed, index)
    image, labels = render_canvas(drawn, resolution)
    meta = {"background": drawn.background, **to_json(labels)}
    for entry, placed in zip(meta["boxes"], drawn.objects, strict=True):
        entry["color"] = placed.scene.attributes["color"]
    return Sample(image, drawn.caption, meta, labels.segments)


def layout(seed: int, index: int) -> Canvas:
    """Canvas `index` of the set `seed`: objects, places and background drawn from the two alone."""
    random = rng(seed, index, "layout")
    count = int(random.integers(1, len(SIDES) + 1))
    background = str(random.choice(list(BACKGROUNDS)))
    scenes = [draw_scene(random, str(random.choice(OBJECTS))) for _ in range(count)]
    squares = _squares(random, count)
    return Canvas(background, tuple(Placed(scene, *square) for scene, square in zip(scenes, squares, strict=True)))


def render_canvas(drawn: Canvas, resolution: int) -> tuple[Image.Image, Labels]:
    """RGB image of a canvas, `resolution` pixels square, and its boxes and map.

    An object's box is that of the whole object, also where one in front of it hides a part.
    """
    canvas = Image.new("RGBA", (resolution, resolution), parse_color(BACKGROUNDS[drawn.background]))
    segments = np.zeros((resolution, resolution), np.uint8)
    boxes = []
    for placed in drawn.objects:
        left, top, side = placed.pixels(resolution)
        shown, parts = _cut_out(placed.scene, side)
        height, width = parts.shape
        left, top = left + (side - width) // 2, top + (side - height) // 2
        canvas.alpha_composite(shown, (left, top))
        behind = segments[top : top + height, left : left + width]
        behind[parts != 0] = parts[parts != 0]
        x0, y0, x1, y1 = (end / resolution for end in (left, top, left + width, top + height))
        boxes.append(Box((x0, y0, x1, y1), OBJECTS.index(placed.scene.kind), placed.scene.kind))
    return canvas.convert("RGB"), Labels(boxes=tuple(boxes), segments=segments)


def _cut_out(scene: Scene, side: int) -> tuple[Image.Image, np.ndarray]:
    """An object without what surrounds it: RGBA, and its map uint8 `[H, W]`; the longer side is about `side` pixels."""
    svg = scene.svg()
    first = parts_map(scene.kind, svg, side)
    left, top, right, bottom = _bounds(first)
    whole = side * side // max(right - left, bottom - top)  # of the scene, so that the object has the side
    parts = parts_map(scene.kind, svg, whole)
    left, top, right, bottom = _bounds(parts)
    right, bottom = min(right, left + side), min(bottom, top + side)  # rounding may make it a pixel longer
    return figure(svg, whole).crop((left, top, right, bottom)), parts[top:bottom, left:right]


def _bounds(parts: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the pixels that are not background."""
    rows, columns = np.nonzero((parts != 0).any(axis=1))[0], np.nonzero((parts != 0).any(axis=0))[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _squares(random: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """(left, top, side) of squares that overlap little: drawn again until they do."""
    low, high = SIDES[count]
    while True:
        sides = random.uniform(low, high, count)
        corners = random.random((count, 2)) * (1 - sides[:, None])  # [count, 2]: left, top
        ends = corners + sides[:, None]
        common = np.minimum(ends[:, None], ends) - np.maximum(corners[:, None], corners)  # [count, count, 2]
        area = common.clip(0).prod(axis=-1) / np.minimum(sides[:, None], sides) ** 2  # [count, count]
        if (area[~np.eye(count, dtype=bool)] <= OVERLAP).all():
            return [(float(left), float(top), float(side)) for (left, top), side in zip(corners, sides, strict=True)]


def _phrase(scene: Scene) -> str:
    color, plant = scene.attributes["color"], scene.attributes.get("plant")
    colored = f"{'an' if color[0] in 'aeiou' else 'a'} {color}"
    return f"a {plant} in {colored} pot" if plant else f"{colored} {scene.kind}"
