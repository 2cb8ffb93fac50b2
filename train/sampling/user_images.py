"""A user's own images: a file, and what lies beside it under the names that it would have in a shard.

photo.png        or .jpg, .webp …; super-resolution takes it as the small image
photo.txt        its caption
photo.json       its labels, as `data.labels` reads them
photo.seg.png    the class of each pixel
photo.mask.png   white where inpainting shall paint, as `data.images.open_mask` reads it
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import ImageConfig
from data.images import ImageError, Unfit, in_range, open_image, open_mask, to_tensor
from data.labels import read_labels
from data.samples import caption_in, fields_in


@dataclass(frozen=True, slots=True)
class UserImage:
    """An image of a user with what lies beside it."""

    item: dict[str, Any]  # as of `data.image_dataset.ImageDataset`, and "mask", bool [H, W], where there is one
    digest: str  # sha256 of all its files but the caption


def read_user_image(path: str, option: str = "inputs") -> UserImage:
    """An image of any size with its labels and mask; `option` is what errors call it.

    Raises:
        UserError: naming the file, and what is wrong with it or with one beside it.
    """
    contents = {name: _content(Path(path).with_suffix(name)) for name in (".json", ".seg.png", ".mask.png")}
    if (content := _content(Path(path))) is None:
        raise UserError(f"{option}={path}: {'a folder: name its files' if Path(path).is_dir() else 'no such file'}")
    try:
        image = open_image(content, ImageConfig().max_pixels)
        meta = fields_in(contents[".json"] or b"{}")
        labels = read_labels(meta, contents[".seg.png"], image.size)
        masks = {} if contents[".mask.png"] is None else {"mask": read_mask(contents[".mask.png"], image.size)}
    except UserError as error:
        raise UserError(f"{option}={path}: {error}") from None
    digest = hashlib.sha256(content)
    for name, beside in contents.items():
        digest.update(f"{name} {-1 if beside is None else len(beside)} ".encode() + (beside or b""))
    item = {
        "key": path,
        "image": in_range(to_tensor(np.asarray(image))),
        "labels": labels,
        "already_small": True,
        **masks,
    }
    return UserImage(item, digest.hexdigest())


def caption_beside(path: str) -> str:
    """The caption beside an image's file; empty where there is none."""
    beside = Path(path).with_suffix(".txt")
    content = _content(beside)
    try:
        return "" if content is None else caption_in(content)
    except UserError as error:
        raise UserError(f"inputs={path}: {beside.name}: {error}") from None


def read_mask(content: bytes, size: tuple[int, int]) -> Tensor:
    """Contents of a mask to bool [H, W], true in the hole; `size` (width, height) is the image's. Raises UserError."""
    try:
        return torch.from_numpy(open_mask(content, size))
    except Unfit as error:
        raise UserError(f"its mask {error}") from error
    except ImageError as error:
        raise UserError("its mask is not a readable image") from error


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
