"""The files of `train/sample.py`: each image with its parameters inside, and the sheets that show many at once."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from conf.files import atomic_path
from conf.plain_json import loads
from train.engine.image_grid import captioned, film_strips
from train.engine.metric_log import png_of
from train.sampling.requests import Job

GRID_IMAGES = 64
FILMED = 16  # prompts in film.png
LARGEST = 512  # pixels; images of twice that and more are shown smaller
TITLE = "Title"  # the text chunk of a PNG with what is asked for, in words
PARAMETERS = "parameters"  # the text chunk of a PNG that holds them, as JSON


@dataclass(frozen=True, slots=True)
class SampleFolder:
    """One folder of images.

        00000.png …         one per job
        asked/00000.png …   what it was asked for, where that is an image
        grid.png            the first of them, with their prompts
        strips/00000.png …  the frames of a filmed image side by side
        film.png            all strips, with their prompts

    Nothing but the jobs is kept in memory.
    """

    folder: Path
    jobs: list[Job]
    shared: dict[str, Any]  # parameters of all images
    filmed: range  # jobs, the first image of some prompts
    labels: list[str]  # of the frames
    data: str | None = None  # digest of the data set that images depend on
    files: dict[str, str] = field(default_factory=dict)  # digests of given images, by file

    def parameters(self, index: int) -> dict[str, Any]:
        """All that makes this image again."""
        job = self.jobs[index]
        known = {"prompt": job.prompt, "number": job.number, **self.shared}
        if job.file is not None:
            return {**known, "input": self.files[job.file]}
        return known if self.data is None else {**known, "sample": job.sample, "data": self.data}

    def strip_parameters(self, index: int) -> dict[str, Any]:
        """Likewise of its strip."""
        return {**self.parameters(index), "frames": self.labels}

    def image(self, index: int) -> Path:
        """File of an image."""
        return self.folder / f"{index:05d}.png"

    def strip(self, index: int) -> Path:
        """File of a filmed image's frames."""
        return self.folder / "strips" / f"{index:05d}.png"

    def holds(self, index: int) -> bool:
        """Whether an image, and its strip if it is filmed, are there with the parameters that they should have."""
        if read_parameters(self.image(index)) != self.parameters(index):
            return False
        return index not in self.filmed or read_parameters(self.strip(index)) == self.strip_parameters(index)

    def asked(self, index: int) -> Path:
        """File of what was asked for."""
        return self.folder / "asked" / f"{index:05d}.png"

    def add(
        self, index: int, image: np.ndarray, title: str, frames: np.ndarray | None, asked: np.ndarray | None
    ) -> None:
        """Write an image, uint8 [H, W, 3], after the frames [F, H, W, 3] of a filmed one and what was asked for."""
        if frames is not None:
            write_png(self.strip(index), np.concatenate(list(frames), axis=1), title, self.strip_parameters(index))
        if asked is not None:
            write_png(self.asked(index), asked, title, self.parameters(index))
        write_png(self.image(index), image, title, self.parameters(index))

    def write_sheets(self) -> list[Path]:
        """The grid of the first images and the film, read back from their files; returns where they are."""
        shown = range(min(GRID_IMAGES, len(self.jobs)))
        images = together([self._shown(index) for index in shown])
        sheets = {"grid.png": captioned(images, [self._title(index) for index in shown])}
        if self.filmed:
            frames = together([self._frames(index) for index in self.filmed])
            sheets["film.png"] = film_strips(frames, [self._title(index) for index in self.filmed], self.labels)
        for name, sheet in sheets.items():
            with atomic_path(self.folder / name) as path:
                path.write_bytes(png_of(sheet))
        return [self.folder / name for name in sheets]

    def _shown(self, index: int) -> np.ndarray:
        """An image beside what was asked for."""
        image, asked = read_png(self.image(index)), self.asked(index)
        return shrunk(np.concatenate([read_png(asked), image], axis=1) if asked.is_file() else image)

    def _title(self, index: int) -> str:
        return read_text(self.image(index), TITLE) or ""

    def _frames(self, index: int) -> np.ndarray:
        """Of a filmed image, [F, H, W, 3], not larger than a sheet needs."""
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
    """Pixels [H, W, 3]."""
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
