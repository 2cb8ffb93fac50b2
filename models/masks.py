"""Holes for inpainting, what trivial methods put into them, and the known pixels put back.

Images are [B, 3, H, W] in [-1, 1]; masks are bool [B, H, W], true in the hole, whose pixels no function looks at.
Something of each image must be known.
"""

from dataclasses import dataclass
from math import isqrt, pi

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

COVERAGE = (0.02, 0.7)  # least and largest share of the image that is a hole
SEGMENTS = 5  # of a stroke, at most
SOURCES = 4096  # about as many patches of an image are compared


@dataclass(frozen=True, slots=True)
class Strokes:
    """Bounds within which a mask is drawn evenly; lengths are in pixels of an image with 256 on its shorter side."""

    strokes: tuple[int, int]
    width: tuple[int, int]
    length: tuple[int, int]  # of a straight segment
    box_share: float = 0.0  # of the masks that consist of boxes instead
    boxes: tuple[int, int] = (1, 1)
    box_side: tuple[int, int] = (1, 1)


# The "thin", "medium" and "thick" masks on which LaMa is measured at 256 pixels
THIN = Strokes(strokes=(4, 50), width=(5, 14), length=(10, 49))
MEDIUM = Strokes((4, 5), (5, 54), (10, 109), box_share=0.23, boxes=(1, 5), box_side=(10, 50))
THICK = Strokes((1, 5), (5, 104), (10, 209), box_share=0.23, boxes=(1, 3), box_side=(30, 150))


def random_mask(height: int, width: int, random: np.random.Generator, bounds: Strokes) -> Tensor:
    """Polygonal strokes or boxes [H, W], as LaMa's large masks (Suvorov et al. 2021, arXiv:2109.07161).

    The same generator gives the same shapes at every size.
    """
    while True:  # until its coverage is within bounds
        mask = np.zeros((height, width), dtype=bool)
        if random.random() < bounds.box_share:
            _add_boxes(mask, random, bounds)
        else:
            _add_strokes(mask, random, bounds)
        if COVERAGE[0] <= mask.mean() <= COVERAGE[1]:
            return torch.from_numpy(mask)


def _add_boxes(mask: np.ndarray, random: np.random.Generator, bounds: Strokes) -> None:
    size, unit = np.array(mask.shape), min(mask.shape) / 256
    for _ in range(random.integers(*bounds.boxes, endpoint=True)):
        sides = random.uniform(*bounds.box_side, size=2) * unit
        start = random.uniform(0, size - sides)
        (top, left), (bottom, right) = np.rint([start, start + sides]).astype(int)
        mask[top:bottom, left:right] = True


def _add_strokes(mask: np.ndarray, random: np.random.Generator, bounds: Strokes) -> None:
    """Chains of straight segments, each as wide as it likes; a corner outside is moved to the image's edge."""
    size, unit = np.array(mask.shape), min(mask.shape) / 256
    for _ in range(random.integers(*bounds.strokes, endpoint=True)):
        end = random.uniform(0, size)
        for _ in range(random.integers(1, SEGMENTS, endpoint=True)):
            start, angle = end, random.uniform(0, 2 * pi)
            step = random.uniform(*bounds.length) * unit * np.array([np.sin(angle), np.cos(angle)])
            end = np.clip(start + step, 0, size)
            _add_segment(mask, start, end, random.uniform(*bounds.width) * unit / 2)


def _add_segment(mask: np.ndarray, start: np.ndarray, end: np.ndarray, radius: float) -> None:
    """The pixels whose centre is no further than `radius` from the line between two points (row, column)."""
    low = np.maximum(0, np.floor(np.minimum(start, end) - radius)).astype(int)
    high = np.ceil(np.maximum(start, end) + radius).astype(int)
    part = mask[low[0] : high[0], low[1] : high[1]]
    rows, columns = np.ogrid[: part.shape[0], : part.shape[1]]
    y, x = rows + 0.5 + low[0] - start[0], columns + 0.5 + low[1] - start[1]  # from the start
    dy, dx = end - start
    along = np.clip((y * dy + x * dx) / max(dy * dy + dx * dx, 1e-9), 0, 1)  # 0 at the start, 1 at the end
    part |= (y - along * dy) ** 2 + (x - along * dx) ** 2 <= radius**2


def paste_back(painted: Tensor, originals: Tensor, masks: Tensor) -> Tensor:
    """`painted` in the hole, the very pixels of `originals` outside."""
    return torch.where(masks[:, None], painted, originals)


def mean_colour(images: Tensor, masks: Tensor) -> Tensor:
    """The hole filled with the mean colour of the image's known pixels."""
    known = ~masks[:, None]
    total = torch.where(known, images, 0).sum(dim=(2, 3), keepdim=True)
    return torch.where(known, images, total / known.sum(dim=(2, 3), keepdim=True))


def nearest_pixel(images: Tensor, masks: Tensor) -> Tensor:
    """The hole filled pixel by pixel with the nearest known one (Euclidean distance).

    First the nearest known pixel in each column, then the best of these over the columns: exact, as the distance is the
    sum of a part of the row and a part of the column (Felzenszwalb & Huttenlocher 2012, "Distance Transforms").
    """
    height, width = masks.shape[1:]
    rows = torch.arange(height, device=masks.device)[:, None]
    columns = torch.arange(width, device=masks.device)
    far = 2 * (height + width)  # from every pixel, where a column knows none
    above = rows.where(~masks, -far).cummax(dim=1).values  # [B, H, W]: row of the last known one
    below = rows.where(~masks, height + far).flip(1).cummin(dim=1).values.flip(1)
    nearest = above.where(rows - above <= below - rows, below)
    squared, across = (rows - nearest).square(), (columns[:, None] - columns).square()
    column = torch.stack([(squared[:, row, None] + across).argmin(dim=2) for row in range(height)], dim=1)  # [B, H, W]
    source = nearest.gather(2, column) * width + column
    return images.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, images.shape[1], -1)).view_as(images)


def nearest_patch(images: Tensor, masks: Tensor, patch: int | None = None) -> Tensor:
    """The hole filled patch by patch from its edge inwards, each with the known patch that fits best.

    Criminisi et al. 2004, "Region Filling and Object Removal by Exemplar-Based Image Inpainting", with the confidence
    alone as priority (eq. 1 without the data term).

    Args:
        patch: side in pixels, odd; None: a ninth of the image's.
    """
    side = patch or min(images.shape[2:]) // 9 | 1
    return torch.stack([_filled(image, mask, side) for image, mask in zip(images, masks, strict=True)])


def _filled(image: Tensor, mask: Tensor, patch: int) -> Tensor:
    """`nearest_patch` of one image [3, H, W]; where it knows no patch of this size, with smaller ones."""
    if patch == 1:
        return nearest_pixel(image[None], mask[None])[0]
    radius = patch // 2
    confidence = F.pad((~mask).float(), [radius] * 4)  # [H+2r, W+2r]; 0: not known
    filled = F.pad(torch.where(mask, 0, image), [radius] * 4)
    stride = max(1, isqrt(mask.numel() // SOURCES))
    sources = F.unfold(filled[None], patch, stride=stride)[0]  # [3·p·p, N]
    sources = sources.T[F.unfold(confidence[None, None], patch, stride=stride)[0].amin(dim=0) == 1]
    if len(sources) == 0:
        return _filled(image, mask, patch - 2)
    squares, hole = sources.square(), mask
    while hole.any():
        trust = _window_means(confidence, patch)  # [H, W], of the patch around each pixel
        row, column = divmod(int(trust.where(hole, -1).argmax()), hole.shape[1])
        window = (slice(row, row + patch), slice(column, column + patch))  # of the padded image
        target, known = filled[:, *window], confidence[window] > 0
        weights = known.expand_as(target).flatten().to(sources)
        distances = squares @ weights - 2 * sources @ (weights * target.flatten())  # squared, less a constant
        target.copy_(target.where(known, sources[distances.argmin()].view_as(target)))
        confidence[window] = confidence[window].where(known, trust[row, column].clamp_min(1e-30))  # 0 is unknown
        hole = mask & (confidence[radius:-radius, radius:-radius] == 0)
    return filled[:, radius:-radius, radius:-radius]


def _window_means(values: Tensor, side: int) -> Tensor:
    """Mean of every window that fits: [H, W] to [H-side+1, W-side+1]."""
    return values.unfold(0, side, 1).mean(dim=-1).unfold(1, side, 1).mean(dim=-1)
