"""What was drawn, as HTML that holds all its images. Hovering over a word shows its map; no script is needed."""

from itertools import count
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image

from train.board.markup import data_uri, templates
from train.board.playground.studio import Drawing, Shown

PAGES = templates(Path(__file__).parent / "html")
COLOURS = colormaps["turbo"]
FRAME = 128  # pixels of the sides of a film's frames, at most
OPACITY = 0.65  # of a map over the image
SHEETS = count()  # pages tell their radio buttons apart by it


def render_sheet(drawing: Drawing) -> str:
    """The images side by side. Prompts are escaped."""
    shown = {"Image": drawing.before} if drawing.after is None else {"Before": drawing.before, "After": drawing.after}
    request = drawing.request
    return PAGES.get_template("sheet.html").render(
        number=next(SHEETS),
        images=[(title, sheet_contents(image)) for title, image in shown.items()],
        labels=drawing.film_labels,
        weights=", ".join(f"{word} × {weight:g}" for word, weight in request.edit.weights.items()),
        seed=request.seed,
        sampling=request.sampling,
        seconds=drawing.seconds,
        psnr=drawing.psnr,
        inversion=request.inversion.value,
        instead_of=request.instead_of.value if request.instead_of else "",
    )


def sheet_contents(shown: Shown) -> dict[str, object]:
    """What the template needs of one image."""
    height, width = shown.image.shape[:2]
    return {
        "prompt": shown.prompt,
        "image": data_url(shown.image),
        "ratio": f"{width} / {height}",
        "film": [data_url(frame, FRAME) for frame in shown.film],
        "words": [(word, data_url(coloured(heat))) for word, heat in shown.words],
        "region": None if shown.region is None else data_url(shade(shown.region)),
    }


def preview(pixels: np.ndarray) -> str:
    """A given image [H, W, 3], as the network will see it."""
    return PAGES.get_template("preview.html").render(image=data_url(pixels))


def message(text: str) -> str:
    """One line that says what is wrong."""
    return PAGES.get_template("message.html").render(text=text)


def coloured(values: np.ndarray) -> np.ndarray:
    """A map [H, W] in [0, 1] as uint8 [H, W, 4], through which one sees the image."""
    pixels = COLOURS(values)
    pixels[..., 3] = OPACITY
    return (255 * pixels).round().astype(np.uint8)


def shade(region: np.ndarray) -> np.ndarray:
    """A region, bool [H, W], as uint8 [H, W, 4] that hides what is not in it."""
    pixels = np.zeros((*region.shape, 4), np.uint8)
    pixels[..., 3] = np.where(region, 0, 200)
    return pixels


def data_url(pixels: np.ndarray, largest: int | None = None) -> str:
    """An image as a PNG in an address; `largest`: pixels that its sides may have."""
    image = Image.fromarray(pixels)
    if largest is not None:
        image.thumbnail((largest, largest))
    return data_uri(image)
