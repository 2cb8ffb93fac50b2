"""An autoencoder over large images: square by square in bounded memory, with overlaps that fade into each other.

The squares are not quite the whole: each has group norms and attention of its own, so colours drift a little from one
to the next. Fading over the overlap spreads that difference until no seam is to be seen.

Shapes: a cell is one pixel of the latent, or f x f pixels of the image.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from conf.errors import UserError

OVERLAP = 4  # a square shares at least one part in so many of its side with the next


def check_tile(tile: int, downscale: int) -> None:
    """Raise a UserError for squares of `tile` pixels that an autoencoder with this factor cannot work in; 0 is none."""
    if tile % downscale or 0 < tile < OVERLAP * downscale:
        raise UserError(
            f"tile={tile}: must be 0 (whole images) or a multiple of {downscale}, the autoencoder's downscale "
            f"factor, from {OVERLAP * downscale} on"
        )


def encode_in_tiles(encode: Callable[[Tensor], Tensor], images: Tensor, side: int, downscale: int) -> Tensor:
    """`encode` of images [B, C, H, W], one image and one square at a time -> [B, C', H/f, W/f].

    Args:
        encode: [1, C, h, w] -> [1, C', h/f, w/f].
        images: H and W are multiples of f.
        side: of the squares in pixels of the image, a multiple of f; what is no larger is encoded whole. 0: no
            squares, and all images at once.
        downscale: f.
    """
    return _in_tiles(encode, images, side // downscale, downscale, 1)


def decode_in_tiles(decode: Callable[[Tensor], Tensor], latents: Tensor, side: int, downscale: int) -> Tensor:
    """`decode` of latents [B, C, h, w] -> [B, C', f·h, f·w]; arguments as of `encode_in_tiles`."""
    return _in_tiles(decode, latents, side // downscale, 1, downscale)


def _in_tiles(network: Callable[[Tensor], Tensor], x: Tensor, side: int, cell_in: int, cell_out: int) -> Tensor:
    """Sides of a cell in pixels of the input and of the output; `side` in cells."""
    if side == 0:
        return network(x)
    columns = partial(_faded, network, dim=3, side=side, cell_in=cell_in, cell_out=cell_out)
    rows = partial(_faded, columns, dim=2, side=side, cell_in=cell_in, cell_out=cell_out)
    return torch.cat([rows(image) for image in x.split(1)])


def _faded(
    network: Callable[[Tensor], Tensor], x: Tensor, *, dim: int, side: int, cell_in: int, cell_out: int
) -> Tensor:
    """`network` of x in windows of `side` cells along one dimension; where two overlap, the first fades out."""
    cells = x.shape[dim] // cell_in
    if cells <= side:
        return network(x)
    share = side // OVERLAP
    windows = -(-(cells - share) // (side - share))
    starts = [number * (cells - side) // (windows - 1) for number in range(windows)]
    whole = network(x.narrow(dim, 0, side * cell_in))
    for previous, start in pairwise(starts):
        part = network(x.narrow(dim, start * cell_in, side * cell_in))
        shared = (previous + side - start) * cell_out  # pixels of the output
        old, new = whole.narrow(dim, start * cell_out, shared), part.narrow(dim, 0, shared)
        ramp = (torch.arange(shared, device=x.device, dtype=part.dtype) + 0.5) / shared
        faded = old.lerp(new, ramp.view(-1, *[1] * (3 - dim)))
        kept = whole.narrow(dim, 0, start * cell_out)
        whole = torch.cat([kept, faded, part.narrow(dim, shared, part.shape[dim] - shared)], dim)
    return whole
