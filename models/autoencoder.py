"""KL autoencoder of the latent diffusion paper (Rombach et al. 2022, section 3.1): images to latents and back.

Parameter names and `config.json` are those of diffusers' AutoencoderKL; `models.vq` has the kind with a codebook.
Shapes: B images, H x W their pixels, f the downscale factor, h x w = H/f x W/f, C latent channels.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from conf.networks import AutoencoderConfig
from models.autoencoder_blocks import Decoder, Encoder, check_sides
from models.autoencoder_format import KL_FORMAT, RENAMED, VQ_FORMAT, to_json
from models.layers import laid_out
from models.vq import VQAutoencoder
from models.weights import CONFIG_NAME, WEIGHTS_NAME, load_folder, read_config, read_json, save_folder


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
        """Read such a folder, or a KL autoencoder in diffusers' format; errors as in `models.weights`."""
        cfg = read_config(folder, AutoencoderConfig, KL_FORMAT)
        return load_folder(folder, lambda: cls(cfg), RENAMED)


AnyAutoencoder = Autoencoder | VQAutoencoder


def build_autoencoder(cfg: AutoencoderConfig) -> AnyAutoencoder:
    """The kind that the configuration asks for, with random weights."""
    return Autoencoder(cfg) if cfg.num_vq_embeddings is None else VQAutoencoder(cfg)


def load_autoencoder(folder: str | Path) -> AnyAutoencoder:
    """The kind that lies in a folder in diffusers' format; errors as in `models.weights`."""
    kind = read_json(Path(folder) / CONFIG_NAME, WEIGHTS_NAME).get("_class_name")
    return (
        VQAutoencoder.from_pretrained(folder) if kind == VQ_FORMAT.class_name else Autoencoder.from_pretrained(folder)
    )
