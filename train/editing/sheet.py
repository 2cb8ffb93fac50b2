"""Images before and after an edit, side by side, and what their words look at."""

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from models.editing.editing import DrawnImage, Edited
from train.engine.image_grid import captioned, to_uint8

HEAT = colormaps["inferno"]


def heated(image: Tensor, heat: Tensor) -> np.ndarray:
    """A grey image [3, H, W] under the colours of a map [H, W], from its least to its largest value; uint8."""
    grey = to_uint8(image.mean(0).expand(1, 3, -1, -1))[0] / 255  # [H, W, 3]
    shown = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
    colors = HEAT(shown.cpu().numpy())[..., :3]  # [H, W, 3]
    return (255 * (0.35 * grey + 0.65 * colors)).round().astype(np.uint8)


def sheet(made: Edited, before: str, after: str) -> Image.Image:
    """Two rows: the image before and its words, the image after and its words.

    At their ends a given image as the network draws it again, and where the image may change.
    """
    rows = [sheet_row(made.source, before), sheet_row(made.result, after)]
    if made.reconstruction is not None:
        rows[0].append((to_uint8(made.reconstruction[None])[0], "drawn again"))
    if made.region is not None:
        shown = torch.where(made.region, made.result.image, 1.0)
        rows[1].append((to_uint8(shown[None])[0], "where it may change"))
    width = max(map(len, rows))
    blank = np.full_like(rows[0][0][0], 255), ""
    cells = [cell for row in rows for cell in row + [blank] * (width - len(row))]
    return captioned(np.stack([image for image, _ in cells]), [caption for _, caption in cells], width)


def sheet_row(image: DrawnImage, prompt: str) -> list[tuple[np.ndarray, str]]:
    """An image and what each word looks at, with captions."""
    maps = [(heated(image.image, heat), f"{word} {heat.mean():.3f}") for word, heat in image.maps.items()]
    return [(to_uint8(image.image[None])[0], prompt), *maps]
