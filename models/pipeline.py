"""Text to image: prompts and seeds in, pictures out."""

import hashlib
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from conf.schema import Sampler
from models.autoencoder import AnyAutoencoder, finite
from models.guidance import classifier_free
from models.process import Process
from models.samplers import SAMPLERS, Callback
from models.text import TextTower
from models.tiles import check_tile, decode_in_tiles
from models.unet import UNet


class TextToImage:
    """A trained U-Net with all that it needs to make pictures.

    Args:
        unet: predicts what `process` says; its device is where everything is computed.
        autoencoder: decodes latents.
        text_tower: gives the context of the prompts and of the empty caption.
        process: the one that the U-Net was trained with.
        latent_mean: per channel [C] over the training latents, as in the latents' manifest.
        latent_std: likewise [C]; the U-Net works on (z - mean) / std.
        tile: side in pixels of the squares that larger pictures are decoded in, one picture at a time; 0: whole.
    """

    def __init__(
        self,
        unet: UNet,
        autoencoder: AnyAutoencoder,
        text_tower: TextTower,
        process: Process,
        latent_mean: Tensor,
        latent_std: Tensor,
        tile: int = 0,
    ) -> None:
        check_tile(tile, autoencoder.cfg.downscale)

        self.unet = unet
        self.autoencoder = autoencoder
        self.text_tower = text_tower
        self.process = process
        self.tile = tile
        self.device = next(unet.parameters()).device
        self.latent_mean = latent_mean.to(self.device, torch.float32).view(1, -1, 1, 1)
        self.latent_std = latent_std.to(self.device, torch.float32).view(1, -1, 1, 1)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        indices: Sequence[int] | None = None,
        sampler: Sampler = Sampler.dpmpp_2m,
        steps: int = 30,
        guidance_scale: float = 3.0,
        callback: Callback | None = None,
    ) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] of B prompts, all in one batch.

        The picture of (prompt, seed, index) is the same whatever else is in the batch, up to float rounding.

        Args:
            prompts: B captions.
            seeds: one per prompt.
            indices: number of the picture among those of one prompt and seed; None: all 0.
            sampler: the solver.
            steps: calls of the U-Net, each on 2B latents with guidance.
            guidance_scale: of classifier-free guidance; 1: none.
            callback: sees each step's normalised latents (`models.samplers`).

        Raises:
            UserError: more steps than the process has timesteps.
        """
        sigmas = self.process.sigmas(steps)
        contexts = self._contexts(prompts, guidance_scale != 1)
        network = classifier_free(self.unet, *contexts, guidance_scale, self.unet.keys_values)
        noise = self._noise(prompts, seeds, indices if indices is not None else [0] * len(prompts))
        x = self.process.initial(noise, float(sigmas[0]))
        latents = SAMPLERS[sampler](self.process.denoiser(network), x, sigmas, callback)  # [B, C, h, w]
        return self.decode(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] of normalised latents [B, C, h, w]."""
        network = self.autoencoder
        decode = partial(decode_in_tiles, network.decode, side=self.tile, downscale=network.cfg.downscale)
        return finite(decode, latents * self.latent_std + self.latent_mean).clamp(-1, 1)

    def _contexts(self, prompts: Sequence[str], guided: bool) -> tuple[Tensor, Tensor]:
        """Text states of the prompts [B, L, D] and, if guided, of the empty caption [1, L, D] (else [0, L, D])."""
        captions = [*prompts, ""] if guided else list(prompts)
        states = self.text_tower.text_states(self.text_tower.tokenize(captions).to(self.device))
        return states[: len(prompts)], states[len(prompts) :]

    def _noise(self, prompts: Sequence[str], seeds: Sequence[int], indices: Sequence[int]) -> Tensor:
        side = self.unet.cfg.sample_size
        shape = (self.unet.cfg.in_channels, side, side)
        pictures = zip(prompts, seeds, indices, strict=True)
        noise = np.stack([picture_noise(prompt, seed, index, shape) for prompt, seed, index in pictures])
        return torch.from_numpy(noise).to(self.device)  # [B, C, h, w]


def picture_noise(prompt: str, seed: int, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 noise that belongs to a picture, not to a batch, a position or a device."""
    key = hashlib.sha256(f"{seed}/{prompt}/{index}".encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return generator.standard_normal(shape, dtype=np.float32)
