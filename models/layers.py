"""Layers that the networks share; attribute names are those of diffusers' state dicts.

Shapes: B samples, C channels, H x W pixels of the feature map, E width of the time embedding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def channels_last(x: Tensor) -> Tensor:
    """The same [B, C, H, W] with the channels of a pixel side by side in memory, as convolutions like it best.

    What follows a tensor of this layout keeps it, so that each network asks for it once, at its door.
    """
    return x.contiguous(memory_format=torch.channels_last)


class ResBlock(nn.Module):
    """Residual block: GroupNorm, SiLU, 3x3 convolution, twice; the time embedding is added between the two.

    Args:
        in_channels: channels of the input; a 1x1 convolution fits them to `out_channels` where they differ.
        time_channels: E, or None for a block without time embedding.
        groups, eps: of the group norms.
    """

    def __init__(self, in_channels: int, out_channels: int, time_channels: int | None, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_channels is None else nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """`x` [B, C, H, W]; `time` [B, E], already through its SiLU -> [B, out_channels, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))  # [B, out, H, W]
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Downsample(nn.Module):
    """3x3 convolution of stride 2; `padding=0` pads only right and bottom, as the LDM autoencoder does."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size by nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = NearestConv2d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return self.conv(x)


class NearestConv2d(nn.Conv2d):
    """3x3 convolution of the picture enlarged twice by nearest neighbour, without ever making that picture.

    A 3x3 window on the enlarged picture covers only 2x2 different pixels, and which of them repeat depends on the
    parity of the output's row and column alone. So the same result is four 2x2 convolutions whose weights are sums of
    the 3x3 ones: 16 instead of 36 multiplications per input pixel, and a quarter of the input's memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out_channels, 2H, 2W]."""
        # An odd row sees its pixel twice, then the next one; an even row the pixel before, then its own twice.
        first, middle, last = self.weight.unbind(2)  # each [O, C, 3]
        rows = torch.stack([first + middle, last, first, middle + last], dim=1)  # [O, 2·2 (parity, tap), C, 3]
        first, middle, last = rows.unbind(3)
        taps = torch.stack([first + middle, last, first, middle + last], dim=2)  # [O, 2·2, 2·2, C]
        weight = taps.unflatten(2, (2, 2)).unflatten(1, (2, 2)).permute(0, 1, 3, 5, 2, 4)  # [O, 2, 2, C, 2, 2]
        bias = None if self.bias is None else self.bias.repeat_interleave(4)
        h = F.conv2d(x, weight.flatten(0, 2), bias, padding=1)  # [B, 4·O, H+1, W+1]
        # Window i begins at pixel i - 1: its odd row is output row 2i - 1, its even row 2i. So only the rim is surplus.
        return F.pixel_shuffle(h, 2)[:, :, 1:-1, 1:-1]
