"""KL autoencoder of the latent diffusion paper (Rombach et al. 2022, section 3.1): images to latents and back.

Parameter names and `config.json` are those of diffusers' AutoencoderKL; `models.vq` has the kind with a codebook.
Shapes: B images, H x W their pixels, f the downscale factor, h x w = H/f x W/f, C latent channels.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema.networks import AutoencoderConfig
from models.attention import ImageSelfAttention
from models.formats.autoencoder import KL_FORMAT, RENAMED, VQ_FORMAT, to_json
from models.formats.weights import CONFIG_NAME, WEIGHTS_NAME, load_folder, read_config, read_json, save_folder
from models.layers import Downsample, ResBlock, SiluConv2d, Upsample, laid_out
from models.vq import VQAutoencoder

# MERGED models.autoencoder_blocks Encoder and decoder of the LDM paper's autoencoders; attribute names are those of diffusers' state dicts.

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


# MERGED models.autoencoder KL autoencoder of the latent diffusion paper (Rombach et al. 2022, section 3.1): images to latents and back.


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 2C, h, w] -> mean and log-variance [B, C, h, w]; the latter clamped to [-30, 20] so that exp stays finite."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar.clamp(-30.0, 20.0)


def sample_moments(moments: Tensor, noise: Tensor) -> Tensor:
    """A latent of the posterior: mean + standard deviation · noise; `noise` [B, C, h, w] from N(0, 1)."""
    mean, logvar = split_moments(moments)
    return mean + (0.5 * logvar).exp() * noise


def kl(moments: Tensor) -> Tensor:
    """KL divergence of the posterior from N(0, 1), [B] in nats: summed over C, h and w, as in the LDM code.

    The loss is its mean over the batch.
    """
    mean, logvar = split_moments(moments)
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))


def finite(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`network(x)` in fp32; what comes out of a lower precision's autocast with an infinity or NaN is done again.

    Some autoencoders overflow in fp16, of which Stable Diffusion XL's is the best known.
    """
    y = network(x).float()
    broken = ~y.flatten(1).isfinite().all(dim=1)
    if torch.is_autocast_enabled(x.device.type) and broken.any():
        with torch.autocast(x.device.type, enabled=False):
            y[broken] = network(x[broken].float())
    return y


class Autoencoder(nn.Module):
    """Images in [-1, 1] to the moments of a diagonal Gaussian over latents, and latents back to images."""

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.latent_channels, 2 * cfg.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_channels, cfg.latent_channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        """`x` [B, in_channels, H, W] in [-1, 1] -> moments [B, 2C, h, w]: mean and (unclamped) log-variance.

        Raises:
            UserError: H or W is not a multiple of f.
        """
        check_sides(x, self.cfg.downscale)
        return self.quant_conv(self.encoder(laid_out(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, C, h, w], not normalised -> images [B, out_channels, H, W], about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(laid_out(z)))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [B, in_channels, H, W], `noise` [B, C, h, w] -> reconstruction like `x`, moments [B, 2C, h, w]."""
        moments = self.encode(x)
        return self.decode(sample_moments(moments, noise)), moments

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution, where the adaptive GAN weight compares gradients (LDM, eq. 25)."""
        return self.decoder.conv_out.weight

    def save_pretrained(self, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the folder; `weights` (an average, or gathered from shards) instead of the module's own."""
        save_folder(folder, to_json(self.cfg), self.state_dict() if weights is None else weights)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read such a folder, or a KL autoencoder in diffusers' format; errors as in `models.formats.weights`."""
        cfg = read_config(folder, AutoencoderConfig, KL_FORMAT)
        return load_folder(folder, lambda: cls(cfg), RENAMED)


AnyAutoencoder = Autoencoder | VQAutoencoder


def build_autoencoder(cfg: AutoencoderConfig) -> AnyAutoencoder:
    """The kind that the configuration asks for, with random weights."""
    return Autoencoder(cfg) if cfg.num_vq_embeddings is None else VQAutoencoder(cfg)


def load_autoencoder(folder: str | Path) -> AnyAutoencoder:
    """The kind that lies in a folder in diffusers' format; errors as in `models.formats.weights`."""
    kind = read_json(Path(folder) / CONFIG_NAME, WEIGHTS_NAME).get("_class_name")
    return (
        VQAutoencoder.from_pretrained(folder) if kind == VQ_FORMAT.class_name else Autoencoder.from_pretrained(folder)
    )
