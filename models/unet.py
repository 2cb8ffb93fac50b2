"""The text-conditional U-Net of latent diffusion (Rombach et al. 2022, section 3.3), as Stable Diffusion 1.x and 2.x.

Parameter names and `config.json` are those of diffusers' UNet2DConditionModel. Shapes: B samples, C channels, h x w the
latent's size, E width of the time embedding, L tokens of the text, D width of the text states.
"""

import math
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conf.errors import UserError
from conf.networks import UNetConfig
from models.attention import Attention, AttentionControl, SpatialTransformer
from models.layers import Downsample, ResBlock, Upsample, channels_last
from models.weights import Format, load_folder, read_config, save_folder

EPS = 1e-5  # of the group norms outside attention
FORMAT = Format(
    class_name="UNet2DConditionModel",
    fixed={
        "act_fn": "silu",
        "attention_type": "default",
        "center_input_sample": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "downsample_padding": 1,
        "dropout": 0.0,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": EPS,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_time_scale_shift": "default",
        "time_embedding_type": "positional",
    },
    absent={"cross_attention_dim": 1280},
    # Attention sums in fp32 anyway; the other one counts heads of a layer that `addition_embed_type` would add.
    ignored=("upcast_attention", "addition_embed_type_num_heads"),
)
BLOCK_TYPES = {  # whether the blocks have attention
    "down_block_types": {"CrossAttnDownBlock2D": True, "DownBlock2D": False},
    "up_block_types": {"CrossAttnUpBlock2D": True, "UpBlock2D": False},
}


def timestep_embedding(timesteps: Tensor, channels: int, flip_sin_to_cos: bool, freq_shift: int) -> Tensor:
    """Sines and cosines of falling frequencies (Vaswani et al. 2017): `timesteps` [B] -> [B, channels]."""
    half = channels // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(exponent / (half - freq_shift))  # [B, half]
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=1)


class TimeEmbedding(nn.Module):
    """Two linear layers on the sinusoidal embedding."""

    def __init__(self, channels: int, time_channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, time_channels)
        self.linear_2 = nn.Linear(time_channels, time_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels] -> [B, E]."""
        return self.linear_2(F.silu(self.linear_1(x)))


class Level(nn.Module):
    """What the levels of all three kinds hold: residual blocks, and a transformer after each where the level attends.

    Args:
        level: index into the configuration's lists.
        inputs: input channels of each residual block.
        attend: whether a transformer follows each of them.
    """

    def __init__(self, cfg: UNetConfig, level: int, inputs: list[int], attend: bool) -> None:
        super().__init__()
        widths, groups = cfg.block_out_channels, cfg.norm_num_groups
        channels, time_channels = widths[level], 4 * widths[0]
        depth, linear = cfg.transformer_layers_per_block, cfg.use_linear_projection
        self.attentions = nn.ModuleList(
            SpatialTransformer(channels, cfg.heads[level], cfg.cross_attention_dim, depth, groups, linear)
            for _ in inputs
            if attend
        )
        self.resnets = nn.ModuleList(ResBlock(width, channels, time_channels, groups, EPS) for width in inputs)


class DownLevel(Level):
    """A level on the way down; all but the last lead to the next with `downsamplers`."""

    def __init__(self, cfg: UNetConfig, level: int, inputs: list[int], attend: bool) -> None:
        super().__init__(cfg, level, inputs, attend)
        last = level == len(cfg.block_out_channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(cfg.block_out_channels[level], padding=1)])

    def forward(
        self, skips: list[Tensor], time: Tensor, context: Tensor, attn_control: AttentionControl | None
    ) -> None:
        """Go on from the last of `skips`; append every result."""
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = resnet(skips[-1], time)  # [B, C, h, w]
            skips.append(x if attention is None else attention(x, context, attn_control))
        for downsample in self.downsamplers:
            skips.append(downsample(skips[-1]))  # [B, C, h/2, w/2]


class UpLevel(Level):
    """A level on the way up; all but the last lead to the next with `upsamplers`."""

    def __init__(self, cfg: UNetConfig, level: int, inputs: list[int], attend: bool) -> None:
        super().__init__(cfg, level, inputs, attend)
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(cfg.block_out_channels[level])])

    def forward(
        self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor, attn_control: AttentionControl | None
    ) -> Tensor:
        """`x` [B, C', h, w] -> [B, C, 2h, 2w]; each residual block takes the last of `skips`."""
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)  # [B, C, h, w]
            x = x if attention is None else attention(x, context, attn_control)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class MidLevel(Level):
    """Residual block, transformer, residual block at the smallest size."""

    def __init__(self, cfg: UNetConfig) -> None:
        channels = cfg.block_out_channels[-1]
        super().__init__(cfg, -1, [channels], attend=True)
        self.resnets.append(ResBlock(channels, channels, 4 * cfg.block_out_channels[0], cfg.norm_num_groups, EPS))

    def forward(self, x: Tensor, time: Tensor, context: Tensor, attn_control: AttentionControl | None) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        x = self.attentions[0](self.resnets[0](x, time), context, attn_control)
        return self.resnets[1](x, time)


class UNet(nn.Module):
    """Predicts from a noisy latent, its timestep and the text what the diffusion process asks for."""

    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        self.cfg = cfg
        down_attends, up_attends = _attends(cfg, "down_block_types"), _attends(cfg, "up_block_types")
        widths, layers = cfg.block_out_channels, cfg.layers_per_block
        self.conv_in = nn.Conv2d(cfg.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0])
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [widths[0]]  # channels of the feature maps that the way up takes back, last one first
        for level, (width, attend) in enumerate(zip(widths, down_attends, strict=True)):
            down = DownLevel(cfg, level, [skips[-1]] + [width] * (layers - 1), attend)
            self.down_blocks.append(down)
            skips += [width] * (layers + len(down.downsamplers))
        self.mid_block = MidLevel(cfg)
        previous = widths[-1]
        for level, attend in zip(reversed(range(len(widths))), up_attends, strict=True):
            inputs = [width + skips.pop() for width in [previous] + [widths[level]] * layers]
            self.up_blocks.append(UpLevel(cfg, level, inputs, attend))
            previous = widths[level]
        self.conv_norm_out = nn.GroupNorm(cfg.norm_num_groups, widths[0], EPS)
        self.conv_out = nn.Conv2d(widths[0], cfg.out_channels, 3, padding=1)
        self._prepare()

    def _prepare(self) -> None:
        """Start every residual branch and the output at zero, as the LDM code does; tell each attention its name."""
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                module.name = name
            elif isinstance(module, ResBlock):
                _zero(module.conv2)
            elif isinstance(module, SpatialTransformer):
                _zero(module.proj_out)
        _zero(self.conv_out)

    def forward(
        self, sample: Tensor, timesteps: Tensor, context: Tensor, attn_control: AttentionControl | None = None
    ) -> Tensor:
        """The network's prediction.

        Args:
            sample: noisy latents [B, in_channels, h, w].
            timesteps: [B], in [0, T), fractions allowed.
            context: text states [B, L, D].
            attn_control: sees and may replace the probabilities of every attention layer.

        Returns:
            [B, out_channels, h, w].

        Raises:
            UserError: h or w is not a multiple of the configuration's downscale factor.
        """
        widths = self.cfg.block_out_channels
        if any(side % self.cfg.downscale for side in sample.shape[2:]):
            size = f"{sample.shape[2]} x {sample.shape[3]}"
            raise UserError(f"latents of {size}: both sides must be multiples of {self.cfg.downscale}")
        time = timestep_embedding(timesteps, widths[0], self.cfg.flip_sin_to_cos, self.cfg.freq_shift)
        time = F.silu(self.time_embedding(time.to(sample.dtype)))  # [B, E], the SiLU once for all blocks
        skips = [self.conv_in(channels_last(sample))]  # [B, widths[0], h, w]
        for level in self.down_blocks:
            level(skips, time, context, attn_control)
        x = self.mid_block(skips[-1], time, context, attn_control)  # [B, widths[-1], h/f, w/f]
        for level in self.up_blocks:
            x = level(x, skips, time, context, attn_control)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def save_pretrained(self, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the folder; `weights` (an average, or gathered from shards) instead of the module's own."""
        heads = self.cfg.attention_head_dim
        config = FORMAT.to_json(self.cfg, attention_head_dim=heads[0] if len(heads) == 1 else heads)
        save_folder(folder, config, self.state_dict() if weights is None else weights)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read such a folder, or a text-conditional U-Net in diffusers' format; errors as in `models.weights`."""
        cfg = read_config(folder, UNetConfig, FORMAT)
        return load_folder(folder, lambda: cls(cfg))


def _attends(cfg: UNetConfig, option: str) -> list[bool]:
    """Whether each level has attention; a UserError names a type that the network does not know."""
    known = BLOCK_TYPES[option]
    for kind in getattr(cfg, option):
        if kind not in known:
            raise UserError(f"model.{option}: {kind!r} is not supported, only {' and '.join(known)}")
    return [known[kind] for kind in getattr(cfg, option)]


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
