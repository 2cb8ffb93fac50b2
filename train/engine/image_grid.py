"""Tensors to images that people look at: bytes, grids with captions, and film strips."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from data.labels import Box
from train.engine.fonts import Lettering
from train.engine.metric_log import CAPTIONS

_INK = (45, 45, 50)
_UNSPACED = (
    "\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"  # Chinese and Japanese: a line may end anywhere
)
_PIECES = re.compile(rf"(\s*)([{_UNSPACED}]|[^\s{_UNSPACED}]+)")
READABLE = 128  # pixels of width that a caption needs
_FRAMES = ("#e6194b", "#0082c8", "#3cb44b", "#f58231", "#911eb4", "#008080", "#d6a100", "#f032e6")  # by class


class Font(Protocol):
    """What text is measured with: a font of Pillow, or a chain of them."""

    def getlength(self, text: str) -> float:
        """Width in pixels."""


def to_uint8(images: Tensor) -> np.ndarray:
    """Images [B, 3, H, W] in [-1, 1] (clamped) to uint8 [B, H, W, 3] on the CPU."""
    scaled = (images.detach().float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def on_squares(images: Sequence[Tensor]) -> Tensor:
    """Images [3, H, W] of many shapes in the middle of white squares [B, 3, S, S], as large as the longest side."""
    side = max(max(image.shape[1:]) for image in images)
    canvas = torch.ones(len(images), 3, side, side)
    for square, image in zip(canvas, images, strict=True):
        height, width = image.shape[1:]
        top, left = (side - height) // 2, (side - width) // 2
        square[:, top : top + height, left : left + width] = image
    return canvas


def side_by_side(columns: Sequence[Tensor]) -> Tensor:
    """Images [B, 3, H, W] side by side; smaller and larger ones get the size of the last column's."""
    size = columns[-1].shape[2:]
    return torch.cat([F.interpolate(column.float().cpu(), size) for column in columns], dim=3)


def grid(images: np.ndarray, columns: int, captions: Sequence[str] | None = None, scale: int = 1) -> Image.Image:
    """Images side by side on white, each with its wrapped caption below.

    Args:
        images: uint8 [B, H, W, 3].
        columns: images per row.
        captions: one per image, or None.
        scale: enlargement of each image; captions need about 128 pixels of width to read well.
    """
    count, height, width = len(images), images.shape[1] * scale, images.shape[2] * scale
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    margin = max(4, width // 10)
    font_size = min(20, max(11, width // 11))
    font, line_height = Lettering(font_size), round(font_size * 1.3)
    lines = [wrap(caption, font, width) for caption in captions] if captions is not None else [[]] * count
    tallest = [max(map(len, lines[row * columns : (row + 1) * columns])) for row in range(rows)]
    heights = [height + (n * line_height + margin // 2 if n else 0) for n in tallest]
    canvas = Image.new("RGB", (columns * (width + margin) + margin, sum(heights) + (rows + 1) * margin), "white")
    draw = ImageDraw.Draw(canvas)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left, top = margin + column * (width + margin), sum(heights[:row]) + (row + 1) * margin
        canvas.paste(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), (left, top))
        for number, line in enumerate(lines[index]):
            at = (left + width / 2, top + height + margin // 2 + number * line_height)
            font.draw(draw, at, line, _INK, centred=True)
    font.tell()
    return canvas


def captioned(images: np.ndarray, captions: Sequence[str], columns: int = 8) -> Image.Image:
    """The grid that people look at: images [B, H, W, 3] enlarged until their captions can be read."""
    sheet = grid(images, columns, captions, scale=max(1, READABLE // images.shape[2]))
    sheet.info[CAPTIONS] = list(captions)
    return sheet


def boxed(image: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """An image uint8 [H, W, 3] with its boxes drawn on it, each with the name of its class."""
    canvas = Image.fromarray(image)
    height, width = image.shape[:2]
    draw, font = ImageDraw.Draw(canvas), Lettering(max(9, width // 14))
    for box in boxes:
        color = _FRAMES[box.class_id % len(_FRAMES)]
        left, top, right, bottom = (end * side for end, side in zip(box.corners, (width, height) * 2, strict=True))
        draw.rectangle((round(left), round(top), round(right) - 1, round(bottom) - 1), outline=color)
        name = box.class_name or str(box.class_id)
        x0, y0, x1, y1 = font.getbbox(name)
        x = max(0, min(round(left), width - font.getlength(name) - 1))
        y = max(0, round(top) - y1 - 1)  # above the box, where there is room
        draw.rectangle((x + x0, y + y0, x + x1, y + y1), fill=color)
        font.draw(draw, (x, y), name, "white")
    font.tell()
    return np.asarray(canvas)


def film_strips(frames: np.ndarray, captions: Sequence[str], labels: Sequence[str]) -> Image.Image:
    """One row per image: its caption, and below it the frames with their labels.

    Args:
        frames: uint8 [B, F, H, W, 3].
        captions: one per image.
        labels: one per frame.
    """
    width, count = frames.shape[3], frames.shape[1]
    scale = max(1, READABLE // width)
    rows = [grid(row, count, labels, scale) for row in frames]
    margin = max(4, width * scale // 10)  # as that of the grid
    font_size = min(24, max(14, width * scale // 9))
    font, line_height = Lettering(font_size), round(font_size * 1.3)
    lines = [wrap(caption, font, rows[0].width - 2 * margin, lines=2) for caption in captions]
    heights = [row.height + len(text) * line_height for row, text in zip(rows, lines, strict=True)]
    canvas = Image.new("RGB", (rows[0].width, sum(heights) + margin), "white")
    draw, top = ImageDraw.Draw(canvas), margin
    for row, text, height in zip(rows, lines, heights, strict=True):
        for number, line in enumerate(text):
            font.draw(draw, (margin, top + number * line_height), line, _INK)
        canvas.paste(row, (0, top + len(text) * line_height))
        top += height
    font.tell()
    canvas.info[CAPTIONS] = list(captions)
    return canvas


def wrap(text: str, font: Font, width: int, lines: int = 6) -> list[str]:
    """Break text into at most `lines` lines of at most `width` pixels; what does not fit ends in an ellipsis."""
    wrapped: list[str] = []
    for space, word in _PIECES.findall(text.strip()):
        joined = wrapped[-1] + (" " if space else "") + word if wrapped else word
        if wrapped and font.getlength(joined) <= width:
            wrapped[-1] = joined
        else:
            wrapped.append(_shorten(word, font, width))
    if len(wrapped) > lines:
        wrapped[lines - 1 :] = [_shorten(" ".join(wrapped[lines - 1 :]), font, width)]
    return wrapped


def _shorten(text: str, font: Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    longer = bisect_right(range(len(text)), float(width), key=lambda length: font.getlength(text[:length] + "…"))
    return text[: max(0, longer - 1)].rstrip() + "…"
