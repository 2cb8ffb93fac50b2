"""Where each parameter lies: whole, or cut over the processes' flat fp32 shards.

A backend describes its cut as pieces, one or none per parameter and process. Anything that has the shape of the shards
(weights, their average, AdamW's moments) is then put together and taken apart by the same two functions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 50_000_000  # most elements that one collective operation moves


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one flattened parameter that this process holds."""

    shard: int  # index of the flat tensor that holds it
    offset: int  # first element within that tensor
    start: int  # first element within the parameter
    numel: int  # elements, 0 where this process holds none


@dataclass(frozen=True, slots=True)
class Layout:
    """All trainable parameters by name, in the module's order."""

    shapes: Mapping[str, torch.Size]
    pieces: Mapping[str, Piece]
    sharded: bool  # False: every process holds all of it
    device: torch.device

    def assemble(self, name: str, shards: Sequence[Tensor]) -> Tensor:
        """One full fp32 parameter on every process; collective if sharded."""
        full = self._padded(name, shards)
        if self.sharded and dist.get_world_size() > 1:
            # Each element is zero on all processes but one: a sum of the bit patterns keeps it exactly, -0.0 too.
            dist.all_reduce(full.view(torch.int32))
        return full.view(self.shapes[name])

    def collect(self, name: str, shards: Sequence[Tensor], owner: int = 0) -> Tensor:
        """One full fp32 parameter, on the process `owner` alone; collective.

        It may be on any device, and is no copy where that process holds all of it.
        """
        piece, shape = self.pieces[name], self.shapes[name]
        if not self.sharded:
            return shards[piece.shard].detach()
        if dist.get_world_size() == 1:
            return self._held(piece, shards).view(shape)
        full = self._padded(name, shards)
        # A reduction again, since pieces differ in length, which a gathering of equal parts does not allow. Others than
        # the owner are left with what their part of it came to, and throw that away.
        dist.reduce(full.view(torch.int32), dst=owner)
        return full.view(shape)

    def _held(self, piece: Piece, shards: Sequence[Tensor]) -> Tensor:
        return shards[piece.shard].detach().reshape(-1)[piece.offset : piece.offset + piece.numel]

    def _padded(self, name: str, shards: Sequence[Tensor]) -> Tensor:
        """This process's part of a flattened parameter among zeros."""
        piece = self.pieces[name]
        full = torch.zeros(self.shapes[name].numel(), dtype=torch.float32, device=self.device)
        full[piece.start : piece.start + piece.numel] = self._held(piece, shards)
        return full

    def disperse(self, name: str, full: Tensor, shards: Sequence[Tensor]) -> None:
        """Write this process's part of a full parameter into its shards."""
        piece = self.pieces[name]
        if not self.sharded:
            shards[piece.shard].detach().copy_(full)  # in whatever memory format it has
            return
        target = shards[piece.shard].detach()[piece.offset : piece.offset + piece.numel]
        target.copy_(full.reshape(-1)[piece.start : piece.start + piece.numel])


def require_cuttable(parameters: Mapping[str, Tensor]) -> None:
    """Raise ValueError for what no sharding backend can cut."""
    for name, parameter in parameters.items():
        if not parameter.requires_grad or parameter.ndim == 0:
            raise ValueError(f"'{name}' is frozen or a scalar, which cannot be sharded: use plain DDP, or shape [1]")


def whole(parameters: Mapping[str, Tensor], device: torch.device) -> Layout:
    """The layout of plain torch: shard i is parameter i."""
    return Layout(
        shapes={name: parameter.shape for name, parameter in parameters.items()},
        pieces={name: Piece(i, 0, 0, p.numel()) for i, (name, p) in enumerate(parameters.items())},
        sharded=False,
        device=device,
    )
