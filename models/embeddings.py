"""What the residual blocks of a U-Net hear of the time and of other vectors; names are those of diffusers' state dicts.

Shapes: B samples, E width of the time embedding.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def timestep_embedding(timesteps: Tensor, channels: int, flip_sin_to_cos: bool, freq_shift: int) -> Tensor:
    """Sines and cosines of falling frequencies (Vaswani et al. 2017): `timesteps` [B] -> [B, channels]."""
    half = channels // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(exponent / (half - freq_shift))  # [B, half]
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=1)


class VectorEmbedding(nn.Module):
    """Two linear layers, on the sinusoidal embedding of a time or on any other vector."""

    def __init__(self, channels: int, time_channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, time_channels)
        self.linear_2 = nn.Linear(time_channels, time_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels] -> [B, E]."""
        return self.linear_2(F.silu(self.linear_1(x)))
