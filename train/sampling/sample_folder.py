"""Images of a command as files: each with its parameters inside, and the sheets that show many at once."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from conf.files import atomic_path
from conf.plain_json import loads
from train.engine.image_grid import captioned, film_strips
from train.engine.metric_log import png_of

GRID_IMAGES = 64
FILMED = 16  # prompts in film.png
LARGEST = 512  # pixels; images of twice that and more are shown smaller
TITLE = "Title"  # the text chunk of a PNG that says in words what it shows
PARAMETERS = "parameters"  # the text chunk of a PNG that holds them, as JSON


@dataclass(frozen=True, slots=True)
class SampleFolder:
    """One folder of images, each of which says what makes it again; nothing of them is kept in memory.

        00000.png …         one per job, or 00000-PART.png … for each of its `parts`
        asked/00000.png …   the condition it was made of, where that is an image
        grid.png            the first of them, with their titles
        strips/00000.png …  the frames of a filmed image side by side
        film.png            all strips, with their titles

    Args:
        folder: where; need not be there yet.
        count: jobs.
        facts: all that makes the images of a job again, in plain values.
        parts: names of the images of one job, as the grid shows them.
        sheet: whether 00000.png is a sheet of those parts, which the grid leaves out.
        measured: entries beside the facts that only a finished image has.
        filmed: jobs.
        labels: of the frames of a film.
    """

    folder: Path
    count: int
    facts: Callable[[int], dict[str, Any]]
    parts: tuple[str, ...] = ("",)
    sheet: bool = False
    measured: tuple[str, ...] = ()
    filmed: range = range(0)
    labels: list[str] = field(default_factory=list)

    def image(self, index: int, part: str = "") -> Path:
        """File of an image, or of one part of it."""
        return self.folder / f"{index:05d}{part and '-'}{part}.png"

    def strip(self, index: int) -> Path:
        """File of a filmed image's frames."""
        return self.folder / "strips" / f"{index:05d}.png"

    def condition(self, index: int) -> Path:
        """File of the image that one was made of."""
        return self.folder / "asked" / f"{index:05d}.png"

    def strip_facts(self, index: int) -> dict[str, Any]:
        """All that makes the frames of a filmed image again."""
        return {**self.facts(index), "frames": self.labels}

    def holds(self, index: int) -> bool:
        """Whether all files of a job are there, made of what they are to be made of."""
        files = [self.image(index, part) for part in (*self.parts, *([""] if self.sheet else []))]
        if any(self._made_of(file) != self.facts(index) for file in files):
            return False
        return index not in self.filmed or read_parameters(self.strip(index)) == self.strip_facts(index)

    def _made_of(self, file: Path) -> dict[str, Any]:
        found = read_parameters(file) or {}
        return {name: value for name, value in found.items() if name not in self.measured}

    def add(
        self,
        index: int,
        image: np.ndarray,
        title: str,
        frames: np.ndarray | None = None,
        condition: np.ndarray | None = None,
        *,
        part: str = "",
        measured: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Write an image, uint8 [H, W, 3], with its title, facts and what was measured of it.

        Last: whoever finds it finds the frames [F, H, W, 3] of a filmed one and the condition, too.
        """
        if frames is not None:
            write_png(self.strip(index), np.concatenate(list(frames), axis=1), title, self.strip_facts(index))
        if condition is not None:
            write_png(self.condition(index), condition, title, self.facts(index))
        write_png(self.image(index, part), image, title, {**self.facts(index), **measured})

    def write_sheets(self) -> list[Path]:
        """The grid of the first images and the film, read back from their files; returns where they are."""
        cells = [(index, part) for index in range(self.count) for part in self.parts][:GRID_IMAGES]
        images = together([self._shown(index, part) for index, part in cells])
        sheets = {"grid.png": captioned(images, [self._title(index, part) for index, part in cells])}
        if self.filmed:
            frames = together([self._frames(index) for index in self.filmed])
            sheets["film.png"] = film_strips(frames, [self._title(index) for index in self.filmed], self.labels)
        for name, sheet in sheets.items():
            with atomic_path(self.folder / name) as path:
                path.write_bytes(png_of(sheet))
        return [self.folder / name for name in sheets]

    def _shown(self, index: int, part: str) -> np.ndarray:
        """An image beside its condition."""
        image, condition = read_png(self.image(index, part)), self.condition(index)
        return shrunk(np.concatenate([read_png(condition), image], axis=1) if condition.is_file() else image)

    def _title(self, index: int, part: str = "") -> str:
        return read_text(self.image(index, part), TITLE) or ""

    def _frames(self, index: int) -> np.ndarray:
        """The frames [F, H, W, 3] of a filmed image, not larger than a sheet needs."""
        return np.stack([shrunk(frame) for frame in np.split(read_png(self.strip(index)), len(self.labels), axis=1)])


def write_png(path: Path, image: np.ndarray, title: str, facts: dict[str, Any]) -> None:
    """A PNG with `facts` inside."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(TITLE, title)
    info.add_text(PARAMETERS, json.dumps(facts))
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG", pnginfo=info)


def read_parameters(path: Path) -> dict[str, Any] | None:
    """What a PNG says of itself, without decoding it; None where it says nothing."""
    try:
        found = loads(read_text(path, PARAMETERS) or "null")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_text(path: Path, chunk: str) -> str | None:
    """A text chunk of a PNG; None where there is none."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get(chunk)
    except (OSError, ValueError):
        return None


def read_png(path: Path) -> np.ndarray:
    """Pixels [H, W, 3] of a PNG."""
    with Image.open(path, formats=["PNG"]) as image:
        return np.asarray(image)


def together(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images [..., H, W, 3] as one array, as high and wide as the largest; the others get white below and beside."""
    height, width = (max(image.shape[axis] for image in images) for axis in (-3, -2))
    sheets = np.full((len(images), *images[0].shape[:-3], height, width, 3), 255, dtype=np.uint8)
    for sheet, image in zip(sheets, images, strict=True):
        sheet[..., : image.shape[-3], : image.shape[-2], :] = image
    return sheets


def shrunk(image: np.ndarray) -> np.ndarray:
    """An image on a sheet: less than twice LARGEST pixels high, so that a sheet of large ones fits into memory."""
    return np.asarray(Image.fromarray(image).reduce(max(1, image.shape[0] // LARGEST)))
