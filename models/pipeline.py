"""Text to image: prompts and seeds in, pictures out."""

import hashlib
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import SamplingConfig
from models.autoencoder import AnyAutoencoder, finite
from models.guidance import Joined, classifier_free, within
from models.process import Network, Process
from models.prompts import Prompt, parse, plain, text_states
from models.samplers import sampler_of
from models.solvers.common import Callback
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
        sampling: SamplingConfig | None = None,
        *,
        indices: Sequence[int] | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] of B prompts, all in one batch.

        The picture of (prompt, seed, index) is the same whatever else is in the batch, up to float rounding.

        Args:
            prompts: B captions.
            seeds: one per prompt.
            sampling: solver, steps and guidance; None: the defaults.
            indices: number of the picture among those of one prompt and seed; None: all 0.
            callback: sees each step's normalised latents (`models.samplers`).

        Raises:
            UserError: steps, spacing or shift that the process cannot have; a prompt with broken syntax.
        """
        sampling = SamplingConfig() if sampling is None else sampling
        sigmas = self.process.sigmas(sampling.steps, sampling.spacing, sampling.shift)
        network = self._guided(prompts, sampling)
        noise = partial(self._noise, prompts, seeds, [0] * len(prompts) if indices is None else indices)
        x = self.process.initial(noise(0), float(sigmas[0]))
        sample = sampler_of(sampling.sampler, lambda step: noise(step + 1), sampling.eta, self.process.fade)
        return self.decode(sample(self.process.denoiser(network), x, sigmas, callback))

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] of normalised latents [B, C, h, w]."""
        network = self.autoencoder
        decode = partial(decode_in_tiles, network.decode, side=self.tile, downscale=network.cfg.downscale)
        return finite(decode, latents * self.latent_std + self.latent_mean).clamp(-1, 1)

    def _guided(self, texts: Sequence[str], sampling: SamplingConfig) -> Network:
        """The U-Net with its prompts and guidance."""
        read = parse if sampling.prompt_syntax else plain
        pictures = [read(text) for text in texts]
        negative = read(sampling.negative_prompt)
        if len(negative) > 1:
            raise UserError(f"negative_prompt={sampling.negative_prompt}: takes no AND; separate the words with commas")
        prompts = [prompt for picture in pictures for prompt in picture]
        joined = self._joined(pictures) if any(len(picture) > 1 for picture in pictures) else None
        guided = sampling.guidance_scale != 1 or joined is not None
        states = text_states(self.text_tower, prompts + (negative if guided else []), self.device)
        bound = partial(
            classifier_free, self.unet, states[: len(prompts)], states[len(prompts) :], prepare=self.unet.keys_values
        )
        network = bound(scale=sampling.guidance_scale, rescale=sampling.guidance_rescale, joined=joined)
        if not sampling.guidance_interval:
            return network
        low, high = (self.process.timestep(sigma) if sigma > 0 else -1.0 for sigma in sampling.guidance_interval)
        return within((low, high), network, bound(scale=1.0, joined=joined))

    def _joined(self, pictures: list[list[Prompt]]) -> Joined:
        owners = [number for number, picture in enumerate(pictures) for _ in picture]
        weights = [prompt.weight for picture in pictures for prompt in picture]
        return Joined(torch.tensor(owners, device=self.device), torch.tensor(weights, device=self.device))

    def _noise(self, prompts: Sequence[str], seeds: Sequence[int], indices: Sequence[int], draw: int) -> Tensor:
        side = self.unet.cfg.sample_size
        shape = (self.unet.cfg.in_channels, side, side)
        pictures = zip(prompts, seeds, indices, strict=True)
        noise = np.stack([picture_noise(prompt, seed, index, shape, draw) for prompt, seed, index in pictures])
        return torch.from_numpy(noise).to(self.device)  # [B, C, h, w]


def picture_noise(prompt: str, seed: int, index: int, shape: tuple[int, ...], draw: int = 0) -> np.ndarray:
    """Standard normal float32 noise that belongs to a picture, not to a batch, a position or a device.

    Draw 0 is what sampling begins with, draw n + 1 what step n adds.
    """
    key = hashlib.sha256(f"{seed}/{prompt}/{index}".encode()).digest()[:16]
    bits = np.random.Philox(key=int.from_bytes(key, "little"), counter=[0, 0, 0, draw])
    return np.random.Generator(bits).standard_normal(shape, dtype=np.float32)
