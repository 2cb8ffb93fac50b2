"""The levels of the U-Net; attribute names are those of diffusers' state dicts.

Shapes: B samples, C channels, h x w the feature map, E width of the time embedding.
"""

from collections.abc import Callable
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conf.networks import UNetConfig, resizes_in_resnet
from models.attention import AttentionControl, Context, ImageSelfAttention, SpatialTransformer
from models.layers import Downsample, ResBlock, Upsample, double, halve


class Given(NamedTuple):
    """What every level is told."""

    time: Tensor  # [B, E], through its SiLU
    context: Context | None  # of the text [B, L, D], if the network has one
    attn_control: AttentionControl | None


class Level(nn.Module):
    """What the levels of all three kinds hold: residual blocks, and attention after each where the level attends.

    Args:
        level: index into the configuration's lists.
        inputs: input channels of each residual block.
        attend: whether attention follows each of them: to the text where the network has one, else to the pixels only.
    """

    gradient_checkpointing = False  # keep only what a residual block with its attention is given, and compute it again

    def __init__(self, cfg: UNetConfig, level: int, inputs: list[int], attend: bool) -> None:
        super().__init__()
        self.cfg, self.channels = cfg, cfg.block_out_channels[level]
        self.attentions = nn.ModuleList(self._attention(level) for _ in inputs if attend)
        self.resnets = nn.ModuleList(self._resnet(width) for width in inputs)

    def _attention(self, level: int) -> nn.Module:
        cfg, heads = self.cfg, self.cfg.heads[level]
        if cfg.cross_attention_dim is None:
            return ImageSelfAttention(self.channels, heads, cfg.norm_num_groups, cfg.norm_eps)
        return SpatialTransformer(
            self.channels,
            heads,
            cfg.cross_attention_dim,
            cfg.depths[level],
            cfg.norm_num_groups,
            cfg.use_linear_projection,
        )

    def _resnet(self, inputs: int, resample: Callable[[Tensor], Tensor] | None = None) -> ResBlock:
        cfg = self.cfg
        time_channels = 4 * cfg.block_out_channels[0]
        scale_shift = cfg.resnet_time_scale_shift == "scale_shift"
        return ResBlock(
            inputs,
            self.channels,
            time_channels,
            cfg.norm_num_groups,
            cfg.norm_eps,
            scale_shift=scale_shift,
            resample=resample,
        )

    def _block(self, resnet: nn.Module, attention: nn.Module | None, x: Tensor, given: Given) -> Tensor:
        """A residual block and its attention."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(_run, resnet, attention, x, given, use_reentrant=False)
        return _run(resnet, attention, x, given)


def _run(resnet: nn.Module, attention: nn.Module | None, x: Tensor, given: Given) -> Tensor:
    x = resnet(x, given.time)  # [B, C, h, w]
    return x if attention is None else attention(x, given.context, given.attn_control)


class DownLevel(Level):
    """A level on the way down; all but the last lead to the next with `downsamplers`."""

    def __init__(self, cfg: UNetConfig, level: int, inputs: list[int]) -> None:
        kind = cfg.down_block_types[level]
        super().__init__(cfg, level, inputs, "Attn" in kind)
        self.downsamplers = nn.ModuleList()
        in_resnet = resizes_in_resnet(kind, cfg.downsample_type)
        if level < len(cfg.block_out_channels) - 1:
            self.downsamplers.append(
                self._resnet(self.channels, halve) if in_resnet else Downsample(self.channels, padding=1)
            )

    def forward(self, x: Tensor, given: Given) -> list[Tensor]:
        """Every result on the way; the next level goes on from the last one.

        They are returned, not appended to a list that is given: ZeRO stage 3 hands a module a copy of its lists.
        """
        results = [x]
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            results.append(self._block(resnet, attention, results[-1], given))
        for downsample in self.downsamplers:
            results.append(_resized(downsample, results[-1], given.time))  # [B, C, h/2, w/2]
        return results[1:]


class UpLevel(Level):
    """A level on the way up; all but the last lead to the next with `upsamplers`."""

    def __init__(self, cfg: UNetConfig, level: int, inputs: list[int]) -> None:
        kind = cfg.up_block_types[-1 - level]
        super().__init__(cfg, level, inputs, "Attn" in kind)
        self.upsamplers = nn.ModuleList()
        in_resnet = resizes_in_resnet(kind, cfg.upsample_type)
        if level > 0:
            self.upsamplers.append(self._resnet(self.channels, double) if in_resnet else Upsample(self.channels))

    def forward(self, x: Tensor, skips: list[Tensor], given: Given) -> Tensor:
        """`x` [B, C', h, w] -> [B, C, 2h, 2w]; each residual block takes its own of `skips`, the last first."""
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = self._block(resnet, attention, torch.cat([x, skips.pop()], dim=1), given)
        for upsample in self.upsamplers:
            x = _resized(upsample, x, given.time)
        return x


class MidLevel(Level):
    """Residual block, attention, residual block at the smallest size."""

    def __init__(self, cfg: UNetConfig) -> None:
        channels = cfg.block_out_channels[-1]
        super().__init__(cfg, -1, [channels], attend=True)
        self.resnets.append(self._resnet(channels))

    def forward(self, x: Tensor, given: Given) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = self._block(resnet, attention, x, given)
        return x


def _resized(layer: nn.Module, x: Tensor, time: Tensor) -> Tensor:
    return layer(x, time) if isinstance(layer, ResBlock) else layer(x)
