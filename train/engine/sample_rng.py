"""Random tensors that belong to samples: the same whatever the batch, the rank or the number of processes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.order import rng


def normal(seed: int, positions: Sequence[int], shape: Sequence[int], purpose: str) -> Tensor:
    """Standard normal noise [B, *shape] on the CPU; row i is a function of (seed, positions[i], purpose) alone."""
    rows = [rng(seed, position, purpose).standard_normal(tuple(shape), dtype=np.float32) for position in positions]
    return torch.from_numpy(np.stack(rows))


def uniform(seed: int, positions: Sequence[int], purpose: str) -> Tensor:
    """Uniform draws [B] in [0, 1) on the CPU, one per sample."""
    return torch.tensor([rng(seed, position, purpose).random() for position in positions], dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class SampleRng:
    """The random tensors of one batch."""

    seed: int
    positions: Sequence[int]
    device: torch.device

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal noise [B, *shape]."""
        return normal(self.seed, self.positions, shape, purpose).to(self.device)

    def uniform(self, purpose: str) -> Tensor:
        """[B] in [0, 1)."""
        return uniform(self.seed, self.positions, purpose).to(self.device)
