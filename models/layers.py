"""Layers that the networks share; attribute names are those of diffusers' state dicts.

Shapes: B samples, C channels, H x W pixels of the feature map, E width of the time embedding.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

FEW_PIXELS = 512  # of a batch, below which a convolution on the CPU reads more weights than pixels


def laid_out(x: Tensor) -> Tensor:
    """Copy [B, C, H, W] into the memory layout that convolutions like best.

    That is the channels of a pixel side by side, unless there are so few pixels that rearranging the weights for it
    costs more than it brings. What follows keeps the layout: networks ask at the door and where the size changes.
    """
    few = x.device.type == "cpu" and x.shape[0] * x.shape[2] * x.shape[3] < FEW_PIXELS
    return x.contiguous(memory_format=torch.contiguous_format if few else torch.channels_last)


def add(h: Tensor, x: Tensor) -> Tensor:
    """`h` + `x`, without gradients in the memory of `h`, which is used up."""
    return h + x if torch.is_grad_enabled() else h.add_(x)


class SiluConv2d(nn.Conv2d):
    """3x3 convolution of SiLU(x) that keeps only `x` for the backward pass, and computes the SiLU there once more.

    A convolution and a SiLU of their own keep both `x` and SiLU(x): half as much again per residual block.

    Args:
        resample: changes the size of SiLU(x) before the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, resample: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out_channels, H, W]. `x` is used up: without gradients SiLU(x) takes its memory."""
        if self.resample is not None:
            return super().forward(self.resample(F.silu(x)))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a compiler plans what it keeps by itself
            return _SiluConv.apply(x, self.weight, self.bias)
        return super().forward(F.silu(x, inplace=not torch.is_grad_enabled()))


class _SiluConv(torch.autograd.Function):
    """The backward pass in the precision of the forward pass, which autocast may have lowered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(F.silu(x), weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        low = grad.dtype
        grad_h, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            F.silu(x).to(low),
            weight.to(low),
            bias_sizes=[len(weight)],
            stride=[1, 1],
            padding=[1, 1],
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=1,
            output_mask=ctx.needs_input_grad,
        )
        grad_x = None if grad_h is None else torch.ops.aten.silu_backward(grad_h.to(x.dtype), x)
        as_weight = (None if tensor is None else tensor.to(weight.dtype) for tensor in (grad_weight, grad_bias))
        return grad_x, *as_weight


class ResBlock(nn.Module):
    """Residual block: GroupNorm, SiLU, 3x3 convolution, twice; the time embedding joins between the two.

    Args:
        in_channels: channels of the input; a 1x1 convolution fits them to `out_channels` where they differ.
        time_channels: E, or None for a block without time embedding.
        groups, eps: of the group norms.
        scale_shift: the time embedding scales and shifts the second norm's output instead of being added to its input.
        resample: changes the size of both branches before the first convolution (`halve`, `double`).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_channels: int | None,
        groups: int,
        eps: float,
        *,
        scale_shift: bool = False,
        resample: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = SiluConv2d(in_channels, out_channels, resample)
        time_outputs = 2 * out_channels if scale_shift else out_channels
        self.time_emb_proj = None if time_channels is None else nn.Linear(time_channels, time_outputs)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = SiluConv2d(out_channels, out_channels)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """`x` [B, C, H, W]; `time` [B, E], already through its SiLU -> [B, out_channels, H, W]."""
        h = self.conv1(self.norm1(x))  # [B, out, H, W]
        x = x if self.resample is None else self.resample(x)
        vector = None if self.time_emb_proj is None else self.time_emb_proj(time)[:, :, None, None]
        if vector is None:
            h = self.norm2(h)
        elif self.scale_shift:
            scale, shift = vector.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(add(h, vector))
        return add(self.conv2(h), x if self.conv_shortcut is None else self.conv_shortcut(x))


def halve(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, H/2, W/2], means of 2x2 pixels."""
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, 2H, 2W] by nearest neighbour."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample(nn.Module):
    """3x3 convolution of stride 2; `padding=0` pads only right and bottom, as the LDM autoencoder does."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return laid_out(self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """Twice the size by nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = NearestConv2d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return laid_out(self.conv(x))


class NearestConv2d(nn.Conv2d):
    """3x3 convolution of the image enlarged twice by nearest neighbour, without ever making that image.

    A 3x3 window on the enlarged image covers only 2x2 different pixels, and which of them repeat depends on the
    parity of the output's row and column alone. So the same result is four 2x2 convolutions whose weights are sums of
    the 3x3 ones: 16 instead of 36 multiplications per input pixel, and a quarter of the input's memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out_channels, 2H, 2W]."""
        if x.shape[0] * x.shape[2] * x.shape[3] < 8 * x.shape[1]:  # sums of weights would take more than the pixels
            return F.conv2d(double(x), self.weight, self.bias, padding=1)
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
