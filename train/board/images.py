"""Images of a run inside its page: data URIs that keep within a budget of bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from data.images import ImageError, open_image
from train.board.markup import data_uri
from train.board.panels import IMAGES
from train.board.run_folder import RunFolder
from train.engine.metric_log import captions_in

WIDEST = 1600  # pixels of an embedded image
NARROWEST = 160
MOST_PIXELS = 2**28  # of a file that is embedded
SHRINK = 0.8  # of the sides, until the budget holds
TITLES = {images.name: images.title for images in IMAGES}
SINGLE = {  # of no training's moment: (section, title) → where they may be
    ("samples", "Prompts of train/sample.py"): ("samples/grid.png",),
    ("strips", "FilmFrames strip of train/sample.py"): ("samples/film*.png",),
    ("pareto", "Quality against cost"): ("pareto*.png", "*/pareto*.png", "sweep/*/pareto/*.png"),
}


@dataclass(slots=True)
class Frame:
    """One image of a film."""

    path: Path
    samples_seen: int | None = None
    source: str = ""  # data URI; empty if the file cannot be read
    width: int = 0  # pixels of what is embedded
    height: int = 0
    captions: list[str] = field(default_factory=list)  # that are drawn in it


@dataclass(slots=True)
class FilmFrames:
    """Images of one name over the training."""

    title: str
    where: str  # below the run folder
    frames: list[Frame]


def galleries(run: RunFolder, most: int, budget: int | None) -> dict[str, list[FilmFrames]]:
    """Section → its films, each of at most `most` frames.

    Args:
        budget: bytes of all images as text; None: they are linked, as `images/` and the path below the run folder.
    """
    found: dict[str, list[FilmFrames]] = {"samples": [], "strips": [], "reconstructions": [], "pareto": []}
    for stage in run.stages.values():
        for name, images in stage.images.items():
            section = "strips" if name.startswith("film") else name if name in found else "samples"
            shown = [Frame(path, seen) for seen, path in spread_images(images, most)]
            found[section].append(FilmFrames(TITLES.get(name, name), f"{stage.name}/samples/{name}", shown))
    for (section, title), patterns in SINGLE.items():
        for path in sorted({path for pattern in patterns for path in run.path.glob(pattern)}):
            found[section].append(FilmFrames(title, str(path.relative_to(run.path)), [Frame(path)]))
    frames = [frame for films in found.values() for film in films for frame in film.frames]
    if budget is None:
        link(frames, run.path)
    else:
        embed(frames, budget)
    for films in found.values():
        for film in films:
            film.frames = [frame for frame in film.frames if frame.source]
    return {section: [film for film in films if film.frames] for section, films in found.items()}


def spread_images(images: Sequence[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    """At most `most` of them, evenly, the last one and, from two on, the first one included."""
    if len(images) <= most:
        return list(images)
    last = len(images) - 1
    return [images[last - round(i * last / max(1, most - 1))] for i in reversed(range(most))]


def link(frames: Sequence[Frame], folder: Path) -> None:
    """Fill in addresses below that of the page."""
    for frame in frames:
        try:
            changed = frame.path.stat().st_mtime_ns
            frame.width, frame.height, frame.captions = seen(frame.path, changed)
        except (OSError, ImageError):
            continue  # still being written, or none that a page should show
        frame.source = f"images/{quote(str(frame.path.relative_to(folder)))}?{changed}"


@lru_cache(maxsize=1000)
def seen(path: Path, changed: int) -> tuple[int, int, list[str]]:
    """Width, height and captions of a file as it was at its last change, in ns."""
    content = path.read_bytes()
    image = open_image(content, MOST_PIXELS)
    return image.width, image.height, captions_in(content)


def embed(frames: Sequence[Frame], budget: int) -> None:
    """Fill in the data URIs; all together take at most `budget` bytes, unless they are at their smallest."""
    left = float(budget)
    for number, frame in enumerate(frames):
        share = left / (len(frames) - number)  # what small images leave is for those after them
        try:
            content = frame.path.read_bytes()
            image = open_image(content, MOST_PIXELS)
        except (OSError, ImageError):
            continue  # still being written, no image, or one that no page should hold
        frame.source, frame.width, frame.height = fitted(image, share)
        frame.captions = captions_in(content)
        left -= len(frame.source)


def fitted(image: Image.Image, budget: float) -> tuple[str, int, int]:
    """An image as a data URI of at most `budget` bytes, with its width and height."""
    width = min(WIDEST, image.width)
    while True:
        height = max(1, round(image.height * width / image.width))
        smaller = image if width == image.width else image.resize((width, height), Image.Resampling.LANCZOS)
        source = data_uri(smaller, "WEBP")
        if len(source) <= budget or width * SHRINK < NARROWEST:
            return source, width, height
        width = round(width * SHRINK)
