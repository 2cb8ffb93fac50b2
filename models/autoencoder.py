"""Autoencoders of the latent diffusion paper (Rombach et al. 2022, section 3.1): images to latents and back.

One class for both kinds. Without a codebook it is diffusers' AutoencoderKL, whose encoder gives the moments of a
Gaussian. With one it is its VQModel, whose codebook belongs to the decoder, as in the paper: a diffusion model works on
the latents before it. Attribute names are those of diffusers' state dicts.

Shapes: B images, H x W their pixels, f the downscale factor, h x w = H/f x W/f, C latent channels (with a codebook
those of its K vectors).
"""

from collections.abc import Callable, Mapping
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conf.errors import UserError
from conf.schema.networks import AutoencoderConfig
from models.attention import ImageSelfAttention
from models.formats.autoencoder import KL_FORMAT, RENAMED, VQ_FORMAT, to_json
from models.formats.weights import CONFIG_NAME, WEIGHTS_NAME, load_folder, read_config, read_json, save_folder
from models.layers import Downsample, ResBlock, SiluConv2d, Upsample, laid_out

EPS = 1e-6  # of every group norm
BETA = 0.25  # of the codebook's term against the encoder's; the LDM code has it on this one
LOG_VARIANCE = -30.0  # of latents that are no distribution, in moments: a standard deviation of 3e-7


def check_sides(x: Tensor, downscale: int) -> None:
    """Raise a UserError for images [B, C, H, W] whose H or W is not a multiple of the downscale factor."""
    if any(side % downscale for side in x.shape[2:]):
        raise UserError(f"images of {x.shape[2]} x {x.shape[3]} pixels: both must be multiples of {downscale}")


class CoderLevel(nn.Module):
    """The residual blocks at one size, then the step to the next size, if the network appends one."""

    gradient_checkpointing = False  # keep only what a residual block with its attention is given, and compute it again

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
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(_run, resnet, attention, x, use_reentrant=False)
            else:
                x = _run(resnet, attention, x)
        for layer in (*self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


def _run(resnet: nn.Module, attention: nn.Module | None, x: Tensor) -> Tensor:
    x = resnet(x)
    return x if attention is None else attention(x)


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
            level = CoderLevel(previous, width, cfg.layers_per_block, groups, number in cfg.attention_levels)
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
            level = CoderLevel(previous, width, cfg.layers_per_block + 1, groups, number in cfg.attention_levels)
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


class Quantised(NamedTuple):
    """Latents on the codebook."""

    z: Tensor  # [B, C, h, w]; its gradient goes to the latents as if nothing had happened to them
    loss: Tensor  # scalar, pulls latents and vectors together
    indices: Tensor  # [B, h, w] int64, in 0 .. K-1


class VectorQuantizer(nn.Module):
    """Replaces every pixel of a latent by the nearest vector of a codebook (van den Oord et al. 2017, eq. 1 to 3)."""

    def __init__(self, vectors: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vectors, channels)
        nn.init.uniform_(self.embedding.weight, -1 / vectors, 1 / vectors)

    def forward(self, z: Tensor) -> Quantised:
        """`z` [B, C, h, w]."""
        indices = torch.stack([self._nearest(one) for one in z.detach().permute(0, 2, 3, 1)])  # [B, h, w]
        vectors = self.embedding(indices).permute(0, 3, 1, 2)  # [B, C, h, w]
        loss = (vectors.detach() - z).square().mean() + BETA * (vectors - z.detach()).square().mean()
        return Quantised(z + (vectors - z).detach(), loss, indices)

    def _nearest(self, z: Tensor) -> Tensor:
        """[h, w, C] -> [h, w]; one image at a time, for the distances to all vectors are h·w·K numbers."""
        return torch.cdist(z.flatten(0, 1).float(), self.embedding.weight.float()).argmin(dim=1).view(z.shape[:2])


def codebook_use(indices: Tensor, vectors: int) -> Tensor:
    """Share of the K vectors that occur among the indices, a scalar."""
    return torch.bincount(indices.flatten(), minlength=vectors).gt(0).float().mean()


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


def finite_or_fp32(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
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
    """Images in [-1, 1] to moments of latents, and latents back to images, through the codebook if there is one."""

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quantize = None  # the codebook, of an autoencoder that has one
        if cfg.num_vq_embeddings is not None:
            self.quantize = VectorQuantizer(cfg.num_vq_embeddings, cfg.cached_channels)
        moments = 2 if self.quantize is None else 1  # mean and log-variance, or the latent itself
        self.quant_conv = nn.Conv2d(moments * cfg.latent_channels, moments * cfg.cached_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.cached_channels, cfg.latent_channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        """`x` [B, in_channels, H, W] in [-1, 1] -> moments [B, 2C, h, w]: mean and (unclamped) log-variance.

        With a codebook the mean is the latent before it, and there is hardly any variance: a cache holds both kinds.

        Raises:
            UserError: H or W is not a multiple of f.
        """
        z = self._encoded(x)
        return z if self.quantize is None else torch.cat([z, torch.full_like(z, LOG_VARIANCE)], dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, C, h, w], not normalised -> images [B, out_channels, H, W], about in [-1, 1]."""
        return self._decoded(z if self.quantize is None else self.quantize(z).z)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | Quantised]:
        """`x` [B, in_channels, H, W] -> reconstruction like `x`, and what its loss needs: moments [B, 2C, h, w].

        `noise` [B, C, h, w] from N(0, 1) chooses the latent; with a codebook it is not used, and what the codebook did
        is returned in place of the moments.
        """
        z = self._encoded(x)
        if self.quantize is None:
            return self._decoded(sample_moments(z, noise)), z
        quantised = self.quantize(z)
        return self._decoded(quantised.z), quantised

    def _encoded(self, x: Tensor) -> Tensor:
        check_sides(x, self.cfg.downscale)
        return self.quant_conv(self.encoder(laid_out(x)))

    def _decoded(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(laid_out(z)))

    def levels(self) -> list[nn.Module]:
        """All levels of encoder and decoder, in which nearly all of the time and memory goes."""
        encoder, decoder = self.encoder, self.decoder
        return [*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks]

    def checkpoint_gradients(self) -> None:
        """Train in less memory and more time: each residual block with its attention is computed again going back."""
        for level in (*self.encoder.down_blocks, *self.decoder.up_blocks):
            level.gradient_checkpointing = True

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution, where the adaptive GAN weight compares gradients (LDM, eq. 25)."""
        return self.decoder.conv_out.weight

    def save_pretrained(self, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the folder; `weights` (an average, or gathered from shards) instead of the module's own."""
        save_folder(folder, to_json(self.cfg), self.state_dict() if weights is None else weights)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read such a folder, or an autoencoder of either kind in diffusers' format; errors as in `models.formats`."""
        kind = read_json(Path(folder) / CONFIG_NAME, WEIGHTS_NAME).get("_class_name")
        cfg = read_config(folder, AutoencoderConfig, VQ_FORMAT if kind == VQ_FORMAT.class_name else KL_FORMAT)
        return load_folder(folder, lambda: cls(cfg), RENAMED)
