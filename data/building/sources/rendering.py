"""DiceBear's drawings to pixels: whole images, figures without what is behind them, and maps of their parts.

A drawing is an SVG with one `<use>` per part; what each part covers is known exactly, by drawing it alone.
"""

import functools
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from conf.errors import UserError
from conf.schema import BuildRun
from data.building.sources import Ref, Sample, numbered
from data.labels import Vocabulary

if TYPE_CHECKING:
    from dicebear import Style

STYLES = {"monster": "critters", "plant": "sprouts", "planet": "planets", "landscape": "landscape"}
SEGMENTS = ("background", "monster", "plant", "pot", "planet", "ring", "moon", "sky", "sun", "ground")
# Kind of scene → what is behind it, and its segments in the order of drawing, with the parts that they are made of.
BEHIND = {"monster": "background", "plant": "background", "planet": "background", "landscape": "sky"}
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "monster": {"monster": ("body", "eyes", "mouth")},
    "plant": {"plant": ("plant",), "pot": ("pot", "eyes", "mouth")},
    "planet": {"planet": ("planet",), "ring": ("ring",), "moon": ("moons",)},
    "landscape": {"sun": ("orb",), "ground": ("hill1", "hill2", "hill3", "hill4")},
}
COVERED = 0.5  # of a part's own opacity, in a pixel of it; soft shadows belong to what is behind
_END = "</defs>"
_USE = re.compile(r'<use [^>]*href="#([a-zA-Z0-9]+)-[^>]*/>')
_RECT = re.compile(r"<rect [^>]*/>")


@dataclass(frozen=True, slots=True)
class RenderedSource:
    """`cfg.samples` images that are drawn for a data set.

    Raises:
        UserError: the packages that draw are missing.
    """

    cfg: BuildRun
    noun: str  # what a list of rejects calls an image
    draw: Callable[[int, int, int], Sample]  # a pure function of seed, index and resolution in pixels
    names: Vocabulary
    title: str  # of the set, in its provenance
    kinds: tuple[str, ...]  # whose styles are drawn

    def __post_init__(self) -> None:
        require_packages(self.cfg.source.value)

    def __len__(self) -> int:
        return self.cfg.samples

    def expected(self) -> int:
        """Number of all samples."""
        return len(self)

    def refs(self, scratch: Path) -> Iterator[Ref]:
        """In order."""
        return numbered(f"{self.noun} {index}" for index in range(len(self)))

    def sample(self, index: int) -> Sample:
        """Image `index`, drawn."""
        return self.draw(self.cfg.seed, index, self.cfg.resolution)

    def vocabulary(self) -> Vocabulary:
        """Names of the classes in the labels."""
        return self.names

    def identity(self) -> dict[str, Any]:
        """The options that the images depend on."""
        return {"samples": self.cfg.samples, "seed": self.cfg.seed}

    def times(self) -> str:
        """No times: there are no files that change."""
        return ""

    def describe(self) -> dict[str, Any]:
        """Provenance: styles, their licence, the packages that drew them."""
        return styles_provenance(self.title, self.kinds)


def require_packages(source: str) -> None:
    """Raises UserError where the packages that draw are missing."""
    try:
        _style("critters")
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"source={source}: the package {error.name} is missing; install the extra: pip install -e '.[demo]'"
        ) from error


def styles_provenance(name: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Styles, their licence, the packages that draw them."""
    packages = ("dicebear-core", "dicebear-styles", "resvg-py")
    return {
        "name": name,
        "license": "CC0 1.0",
        "attribution": "\n".join(_style_json(STYLES[kind])["meta"]["license"]["text"] for kind in kinds),
        "packages": {package: version(package) for package in packages},
    }


def drawing(kind: str, options: dict[str, Any]) -> str:
    """The SVG of a scene, for these options of DiceBear."""
    from dicebear import Avatar

    return Avatar(_style(STYLES[kind]), options).to_string()


def image(svg: str, side: int) -> Image.Image:
    """RGB image of a drawing, `side` pixels square."""
    return _rendered(svg, side).convert("RGB")


def figure(svg: str, side: int) -> Image.Image:
    """RGBA image of what a drawing shows, without background and stars."""
    return _rendered(_only(svg, lambda part: part != "star"), side).convert("RGBA")


def parts_map(kind: str, svg: str, side: int) -> np.ndarray:
    """Number in SEGMENTS of what is to be seen at each pixel, uint8 `[side, side]`."""
    segments = np.full((side, side), SEGMENTS.index(BEHIND[kind]), np.uint8)
    for name, parts in PARTS[kind].items():
        layer = _only(svg, parts.__contains__)
        if "<use " in layer[layer.rindex(_END) :]:
            alpha = np.asarray(_rendered(layer, side).convert("RGBA"))[..., 3]
            segments[alpha > COVERED * max(alpha.max(), 1)] = SEGMENTS.index(name)
    return segments


def _only(svg: str, wanted: Callable[[str], bool]) -> str:
    """The drawing without its background and with the wanted parts only."""
    start = svg.rindex(_END)
    body = _USE.sub(lambda use: use[0] if wanted(use[1]) else "", svg[start:])
    return svg[:start] + _RECT.sub("", body)


def _rendered(svg: str, side: int) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png)))


@functools.cache
def _style_json(name: str) -> dict[str, Any]:
    from importlib.resources import files

    definition: dict[str, Any] = json.loads(files("dicebear_styles").joinpath(f"{name}.json").read_text("utf-8"))
    return definition


@functools.cache
def _style(name: str) -> "Style":
    from dicebear import Style

    return Style(_style_json(name))
