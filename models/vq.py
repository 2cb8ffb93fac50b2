"""VQ autoencoder of the latent diffusion paper (Rombach et al. 2022, section 3.1): latents drawn towards a codebook.

Parameter names and `config.json` are those of diffusers' VQModel. As in the paper the codebook belongs to the decoder:
a diffusion model works on the latents before it. Shapes: B images, H x W their pixels, f the downscale factor,
h x w = H/f x W/f, C channels of a codebook vector, K vectors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from conf.schema.networks import AutoencoderConfig
from models.autoencoder import Decoder, Encoder, check_sides
from models.formats.autoencoder import RENAMED, VQ_FORMAT, to_json
from models.formats.weights import load_folder, read_config, save_folder
from models.layers import laid_out

BETA = 0.25  # of the codebook's term against the encoder's; the LDM code has it on this one
LOG_VARIANCE = -30.0  # of latents that are no distribution, in moments: a standard deviation of 3e-7


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


class VQAutoencoder(nn.Module):
    """Images in [-1, 1] to latents, and latents through the codebook back to images."""

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quantize = VectorQuantizer(cfg.num_vq_embeddings or 0, cfg.cached_channels)
        self.quant_conv = nn.Conv2d(cfg.latent_channels, cfg.cached_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.cached_channels, cfg.latent_channels, 1)

    def latents(self, x: Tensor) -> Tensor:
        """`x` [B, in_channels, H, W] in [-1, 1] -> latents before the codebook [B, C, h, w].

        Raises:
            UserError: H or W is not a multiple of f.
        """
        check_sides(x, self.cfg.downscale)
        return self.quant_conv(self.encoder(laid_out(x)))

    def encode(self, x: Tensor) -> Tensor:
        """The same as moments [B, 2C, h, w], a mean with hardly any variance: what caches of both kinds hold."""
        z = self.latents(x)
        return torch.cat([z, torch.full_like(z, LOG_VARIANCE)], dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, C, h, w], not normalised -> images [B, out_channels, H, W], about in [-1, 1]."""
        return self._picture(self.quantize(z).z)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Quantised]:
        """`x` [B, in_channels, H, W] -> reconstruction like `x`, and what the codebook did; no part for the noise."""
        quantised = self.quantize(self.latents(x))
        return self._picture(quantised.z), quantised

    def _picture(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(laid_out(z)))

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution, where the adaptive GAN weight compares gradients (LDM, eq. 25)."""
        return self.decoder.conv_out.weight

    def save_pretrained(self, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the folder; `weights` (an average, or gathered from shards) instead of the module's own."""
        save_folder(folder, to_json(self.cfg), self.state_dict() if weights is None else weights)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read such a folder, or a VQ autoencoder in diffusers' format; errors as in `models.formats.weights`."""
        cfg = read_config(folder, AutoencoderConfig, VQ_FORMAT)
        return load_folder(folder, lambda: cls(cfg), RENAMED)
