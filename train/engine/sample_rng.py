"""Random tensors that belong to samples: the same whatever the batch, the rank or the number of processes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor

from data.image_dataset import Batch
from data.order import rng
from models.conditions.base import Wanted


def normal(seed: int, positions: Sequence[int], shape: Sequence[int], purpose: str) -> Tensor:
    """Standard normal noise [B, *shape] on the CPU; row i is a function of (seed, positions[i], purpose) alone."""
    rows = [rng(seed, position, purpose).standard_normal(tuple(shape), dtype=np.float32) for position in positions]
    return torch.from_numpy(np.stack(rows))


def uniform(seed: int, positions: Sequence[int], purpose: str) -> Tensor:
    """Uniform draws [B] in [0, 1) on the CPU, one per sample."""
    return torch.tensor([rng(seed, position, purpose).random() for position in positions], dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class Draws:
    """Adds to a batch the random tensors that training will ask for, where it is loaded: in the loader's processes.

    Args:
        wanted: of a batch, what `models.conditions.base.Wanted` says.
    """

    seed: int
    wanted: Callable[[Batch], Wanted]

    def __call__(self, batch: Batch) -> Batch:
        """The batch with them, as "draws"."""
        positions = batch["position"].tolist()
        drawn = {
            purpose: uniform(self.seed, positions, purpose)
            if shape is None
            else normal(self.seed, positions, shape, purpose)
            for purpose, shape in self.wanted(batch).items()
        }
        return {**batch, "draws": drawn}


@dataclass(frozen=True, slots=True)
class SampleRng:
    """The random tensors of one batch: those that were drawn where it was loaded, and any other."""

    seed: int
    positions: Sequence[int]
    device: torch.device
    drawn: Mapping[str, Tensor] = field(default_factory=dict)  # on the device, by purpose

    @classmethod
    def of(cls, batch: Batch, seed: int, device: torch.device) -> Self:
        """The random tensors of a batch, which may have been loaded with `Draws` of this seed."""
        return cls(seed, batch["position"].tolist(), device, batch.get("draws", {}))

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal noise [B, *shape]."""
        found = self.drawn.get(purpose)
        return normal(self.seed, self.positions, shape, purpose).to(self.device) if found is None else found

    def uniform(self, purpose: str) -> Tensor:
        """[B] in [0, 1)."""
        found = self.drawn.get(purpose)
        return uniform(self.seed, self.positions, purpose).to(self.device) if found is None else found
