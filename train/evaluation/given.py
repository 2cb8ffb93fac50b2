"""A user's own pictures: a file, and what lies beside it under the names that it would have in a shard.

photo.png        or .jpg, .webp …; super-resolution takes it as the small picture
photo.txt        its caption
photo.json       its labels, as `data.labels` reads them
photo.seg.png    the class of each pixel
photo.mask.png   white where inpainting shall paint
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conf.errors import UserError
from conf.plain_json import loads
from conf.schema import ImageConfig
from data.images import FORMATS, ImageError, open_image, to_tensor
from data.labels import read_labels

WHITE = 128  # of 255, from which on a pixel of a mask is to be painted


@dataclass(frozen=True, slots=True)
class GivenPicture:
    """One of them, read."""

    item: dict[str, Any]  # as of `data.datasets.ImageDataset`, and "mask", bool [H, W], where there is one
    digest: str  # sha256 of all its files but the caption


def read_given(path: str, option: str = "inputs") -> GivenPicture:
    """A picture of any size with its labels and mask; `option` is what errors call it.

    Raises:
        UserError: naming the file, and what is wrong with it or with one beside it.
    """
    contents = {name: _content(Path(path).with_suffix(name)) for name in (".json", ".seg.png", ".mask.png")}
    if (content := _content(Path(path))) is None:
        raise UserError(f"{option}={path}: no such file")
    try:
        image = open_image(content, ImageConfig().max_pixels)
        meta = loads(contents[".json"] or b"{}")
        if not isinstance(meta, dict):
            raise UserError("its .json holds no object")
        labels = read_labels(meta, contents[".seg.png"], image.size)
        masks = {} if contents[".mask.png"] is None else {"mask": read_mask(contents[".mask.png"], image.size)}
    except (UserError, ValueError, RecursionError) as error:
        raise UserError(f"{option}={path}: {error}") from None
    digest = hashlib.sha256(content)
    for name, beside in contents.items():
        digest.update(f"{name} {-1 if beside is None else len(beside)} ".encode() + (beside or b""))
    item = {"key": path, "image": to_tensor(np.asarray(image)), "labels": labels, "as_given": True, **masks}
    return GivenPicture(item, digest.hexdigest())


def caption_beside(path: str) -> str:
    """Of a picture's file; empty where there is none."""
    content = _content(Path(path).with_suffix(".txt"))
    return "" if content is None else content.decode("utf-8", "replace").strip()


def read_mask(content: bytes, size: tuple[int, int]) -> Tensor:
    """Contents of a mask to bool [H, W]; `size` (width, height) is the picture's. Raises UserError."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.size != size:  # before a pixel is decoded
                raise UserError(
                    f"its mask has {image.width} x {image.height} pixels, the picture {size[0]} x {size[1]}; make them "
                    "equal"
                )
            return torch.from_numpy(np.array(image.convert("L"))) >= WHITE
    except UserError:
        raise
    except Exception as error:  # whatever Pillow's parsers raise
        raise ImageError("its mask is not a readable picture") from error


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
