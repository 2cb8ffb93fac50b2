"""Attention over the pixels of a feature map and over the text; attribute names are those of diffusers' state dicts.

Shapes: B samples, N = H·W tokens of the image, M tokens attended to (N, or the L of the text), C channels, D width of
the text states.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.layers import add

# (queries [B, heads, N, d], keys and values [B, heads, M, d], name of the layer, whether it attends to the text) ->
# what attention gives, [B, heads, N, d]; without control F.scaled_dot_product_attention(queries, keys, values)
AttentionControl = Callable[[Tensor, Tensor, Tensor, str, bool], Tensor]
# Text states [B, M, D]; or, where one text serves many calls, its keys and values [B, heads, M, C/heads] by layer name.
Context = Tensor | Mapping[str, tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """Multi-head attention; self-attention unless it is given a context.

    Args:
        channels: C, divisible by `heads`.
        context_channels: D, or None for self-attention.
        bias: whether queries, keys and values have one.
    """

    name = ""  # the module's path in its network, for attention control

    def __init__(self, channels: int, heads: int, context_channels: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.is_cross = context_channels is not None
        source = channels if context_channels is None else context_channels
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(source, channels, bias=bias)
        self.to_v = nn.Linear(source, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(
        self, x: Tensor, context: Context | None = None, attn_control: AttentionControl | None = None
    ) -> Tensor:
        """`x` [B, N, C], `context` [B, M, D] -> [B, N, C]."""
        q = self._split(self.to_q(x))  # [B, heads, N, C/heads]
        source = x if context is None else context
        k, v = self.keys_values(source) if isinstance(source, Tensor) else source[self.name]
        if attn_control is None:
            h = F.scaled_dot_product_attention(q, k, v)  # [B, heads, N, C/heads]
        else:
            h = attn_control(q, k, v, self.name, self.is_cross)
        return self.to_out[0](h.transpose(1, 2).flatten(2))

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [B, heads, M, C/heads] each, of `source` [B, M, D]."""
        return self._split(self.to_k(source)), self._split(self.to_v(source))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, N, C] -> [B, heads, N, C/heads]


class ImageSelfAttention(Attention):
    """Over all pixels of a feature map, with its own norm and residual connection."""

    def __init__(self, channels: int, heads: int, groups: int, eps: float) -> None:
        super().__init__(channels, heads, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps)

    def forward(
        self, x: Tensor, context: Context | None = None, attn_control: AttentionControl | None = None
    ) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; it has no use for a context."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, N, C]
        return x + super().forward(tokens, None, attn_control).transpose(1, 2).unflatten(2, x.shape[2:])


class GEGLU(nn.Module):
    """The first half of a gated layer (Shazeer 2020): values and gates, side by side."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., 2·hidden]."""
        return self.proj(x)


class GatedLinear(nn.Linear):
    """The second half of a gated layer: linear in value · GELU(gate), of which only these two are kept for backward."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2·hidden] -> [..., C]."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a compiler plans what it keeps by itself
            return _GatedLinear.apply(x, self.weight, self.bias)
        value, gate = x.chunk(2, dim=-1)
        return super().forward(value * F.gelu(gate))


class _GatedLinear(torch.autograd.Function):
    """The backward pass in the precision of the forward pass, which autocast may have lowered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        value, gate = x.chunk(2, dim=-1)
        return F.linear(value * F.gelu(gate), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        value, gate = x.chunk(2, dim=-1)
        opened = F.gelu(gate)  # [..., hidden]
        grad_h = (grad @ weight.to(grad.dtype)).to(x.dtype)  # [..., hidden], of value · opened
        rows = grad.flatten(0, -2)  # [tokens, C]
        grad_weight = rows.T @ (value * opened).flatten(0, -2).to(grad.dtype)
        grad_x = torch.cat([grad_h * opened, torch.ops.aten.gelu_backward(grad_h * value, gate)], dim=-1)
        return grad_x, grad_weight.to(weight.dtype), rows.sum(0).to(weight.dtype)


class FeedForward(nn.Module):
    """Two layers, four times as wide between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The identity stands where diffusers has a dropout, so that the last layer keeps its number.
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), GatedLinear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; each after a LayerNorm and added to its input."""

    def __init__(self, channels: int, heads: int, context_channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = Attention(channels, heads)
        self.attn2 = Attention(channels, heads, context_channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Context, attn_control: AttentionControl | None) -> Tensor:
        """`x` [B, N, C], `context` [B, L, D] -> [B, N, C]."""
        x = add(self.attn1(self.norm1(x), None, attn_control), x)
        x = add(self.attn2(self.norm2(x), context, attn_control), x)
        return add(self.ff(self.norm3(x)), x)


class PixelLinear(nn.Conv2d):
    """A 1x1 convolution applied to tokens [B, N, C]: SD 1.x stores its projections so."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map.

    Args:
        depth: number of blocks.
        linear_projection: the weights before and after the blocks are linear layers (SD 2.x), not 1x1 convolutions.
    """

    around = ("tokens", "pixels")  # what it computes itself before and after its blocks: compiled like them

    def __init__(
        self, channels: int, heads: int, context_channels: int, depth: int, groups: int, linear_projection: bool
    ) -> None:
        super().__init__()
        project = nn.Linear if linear_projection else PixelLinear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_channels) for _ in range(depth)
        )
        self.proj_out = project(channels, channels)

    def forward(self, x: Tensor, context: Context, attn_control: AttentionControl | None) -> Tensor:
        """`x` [B, C, H, W], `context` [B, L, D] -> [B, C, H, W]."""
        h = self.tokens(x)
        for block in self.transformer_blocks:
            h = block(h, context, attn_control)
        return self.pixels(h, x)

    def tokens(self, x: Tensor) -> Tensor:
        """`x` [B, C, H, W] -> [B, N, C], for the blocks."""
        tokens: Tensor = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        return tokens

    def pixels(self, h: Tensor, x: Tensor) -> Tensor:
        """What the blocks made of the tokens, `h` [B, N, C], added to `x` [B, C, H, W]."""
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[2:])
