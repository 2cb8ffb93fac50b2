"""Encoder and decoder of the LDM paper's autoencoders; attribute names are those of diffusers' state dicts.

Shapes: B images, H x W their pixels, f the downscale factor, h x w = H/f x W/f, C latent channels.
"""

from itertools import pairwise, zip_longest

from torch import Tensor, nn

from conf.errors import UserError
from conf.networks import AutoencoderConfig
from models.attention import ImageSelfAttention
from models.layers import Downsample, ResBlock, SiluConv2d, Upsample

EPS = 1e-6  # of every group norm


def check_sides(x: Tensor, downscale: int) -> None:
    """Raise a UserError for images [B, C, H, W] whose H or W is not a multiple of the downscale factor."""
    if any(side % downscale for side in x.shape[2:]):
        raise UserError(f"images of {x.shape[2]} x {x.shape[3]} pixels: both must be multiples of {downscale}")


class Level(nn.Module):
    """The residual blocks at one size, then the step to the next size, if the network appends one."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, attend: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(ResBlock(a, b, None, groups, EPS) for a, b in pairwise(widths))
        self.attentions = nn.ModuleList(
            ImageSelfAttention(out_channels, 1, groups, EPS) for _ in range(layers) if attend
        )
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = resnet(x)
            x = x if attention is None else attention(x)
        for layer in (*self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """Residual block, self-attention, residual block at the smallest size."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([ImageSelfAttention(channels, 1, groups, EPS)] if attention else [])
        self.resnets = nn.ModuleList(ResBlock(channels, channels, None, groups, EPS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """[B, in_channels, H, W] -> [B, 2C, h, w], for a codebook [B, C, h, w]."""

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = cfg.block_out_channels, cfg.norm_num_groups
        self.conv_in = nn.Conv2d(cfg.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for number, (previous, width) in enumerate(pairwise([widths[0], *widths])):
            level = Level(previous, width, cfg.layers_per_block, groups, number in cfg.attention_levels)
            if number < len(widths) - 1:
                level.downsamplers.append(Downsample(width, padding=0))
            self.down_blocks.append(level)
        self.mid_block = MidBlock(widths[-1], groups, cfg.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        outputs = 2 * cfg.latent_channels if cfg.num_vq_embeddings is None else cfg.latent_channels
        self.conv_out = SiluConv2d(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # [B, widths[0], H, W]
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)  # [B, widths[-1], h, w]
        return self.conv_out(self.conv_norm_out(x))


class Decoder(nn.Module):
    """[B, C, h, w] -> [B, out_channels, H, W]."""

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = cfg.block_out_channels[::-1], cfg.norm_num_groups
        self.conv_in = nn.Conv2d(cfg.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, cfg.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        numbers = reversed(range(len(widths)))
        for number, (previous, width) in zip(numbers, pairwise([widths[0], *widths]), strict=True):
            level = Level(previous, width, cfg.layers_per_block + 1, groups, number in cfg.attention_levels)
            if number > 0:
                level.upsamplers.append(Upsample(width))
            self.up_blocks.append(level)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = SiluConv2d(widths[-1], cfg.out_channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))  # [B, widths[0], h, w]
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(x))
