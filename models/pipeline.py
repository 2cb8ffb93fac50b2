"""Sampling: prompts, other conditions and seeds in, images out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import Sampler, SamplingConfig
from models.autoencoder import Autoencoder, finite_or_fp32, split_moments
from models.conditions import Conditioning, Conditions, Inputs, Samples
from models.denoiser import Denoiser
from models.diffusion.guidance import ConditionalNetwork, Joined, by_step, classifier_free, stepping, within
from models.diffusion.process import Denoise, Network, Process
from models.diffusion.samplers import Callback, Student, sampler_of
from models.prompts import ParsedPrompt, Term, parse, plain, terms_of, text_states
from models.text import Cuts, TextTower, image_embeddings
from models.tiles import check_tile, decode_in_tiles, encode_in_tiles


class Control(Protocol):
    """Watches the network while images are drawn, and may change what it does (`models.editing.editing`)."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, name: str, is_cross: bool) -> Tensor:
        """Replace every layer's attention (`models.attention`); the rows of the prompts are the last ones."""
        ...

    def around(self, denoise: Denoise, sigmas: Tensor) -> Denoise:
        """Wrap `denoise` for a sampler that calls it at the levels sigmas [steps + 1] and between them."""
        ...


@dataclass(frozen=True, slots=True)
class SamplingStart:
    """Latents that sampling begins with in place of noise, as `models.editing.inversion` finds them of an image."""

    x: Tensor  # [B, C, h, w] at the first noise level
    null_texts: tuple[
        Tensor, ...
    ] = ()  # states [B, L, D] for guidance, of all steps or each; (): the negative prompt's

    def select(self, rows: Sequence[int]) -> "SamplingStart":
        """Some rows of the batch, in this order."""
        return SamplingStart(self.x[rows], tuple(states[rows] for states in self.null_texts))


class DiffusionPipeline:
    """A trained U-Net with all that it needs to make images.

    Args:
        denoiser: the U-Net and its conditions; its device is where everything is computed.
        autoencoder: decodes latents.
        text_tower: gives the states of the prompts and of the empty caption; None for a network that asks CLIP nothing.
        process: the one that the U-Net was trained with.
        latent_mean: per channel [C] over the training latents, as in the latents' manifest.
        latent_std: per channel [C]; the U-Net works on (z - mean) / std.
        tile: side in pixels of the squares that larger images are decoded in, one image at a time; 0: whole.
        student: of what the U-Net learnt by distillation to draw in few steps; None: it is no student.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        autoencoder: Autoencoder,
        text_tower: TextTower | None,
        process: Process,
        latent_mean: Tensor,
        latent_std: Tensor,
        tile: int = 0,
        student: Student | None = None,
    ) -> None:
        check_tile(tile, autoencoder.cfg.downscale)

        self.denoiser = denoiser
        self.autoencoder = autoencoder
        self.text_tower = text_tower
        self.process = process
        self.tile = tile
        self.student = student
        self.device = next(denoiser.parameters()).device
        self.latent_mean = latent_mean.to(self.device, torch.float32).view(1, -1, 1, 1)
        self.latent_std = latent_std.to(self.device, torch.float32).view(1, -1, 1, 1)

    @property
    def conditions(self) -> Conditions:
        """The arrays that the network is conditioned on; `denoiser.conditions` is what embeds them."""
        return self.denoiser.conditions.source

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str | ParsedPrompt],
        seeds: Sequence[int],
        sampling: SamplingConfig | None = None,
        *,
        indices: Sequence[int] | None = None,
        callback: Callback | None = None,
        inputs: Inputs | None = None,
        noise_of: Sequence[str] | None = None,
        start: SamplingStart | None = None,
        control: Control | None = None,
    ) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of B prompts, all in one batch.

        The image of (prompt, seed, index) is the same whatever else is in the batch, up to float rounding.

        Args:
            prompts: B captions, as text or as words with weights; for a network without text, names of their noise.
            seeds: one per prompt.
            sampling: solver, steps, guidance and size; None: the defaults.
            indices: number of the image among those of one prompt and seed; None: all 0.
            callback: sees each step's normalised latents (`models.diffusion.samplers`).
            inputs: arrays of the other conditions, B each, as `Conditions.prepare` makes them.
            noise_of: B prompts whose noise they get; None: their own.
            start: what they begin with in place of noise, and what guidance leads away from.
            control: takes part in all calls of the network.

        Raises:
            UserError: steps, spacing or shift that the process cannot have; a prompt with broken syntax; guidance or
                a size that this network cannot have.
        """
        sampling = SamplingConfig() if sampling is None else sampling
        sigmas = self.process.sigmas(sampling.steps, sampling.spacing, sampling.shift)
        denoise, shape = self.denoiser_of(prompts, sampling, inputs, control, () if start is None else start.null_texts)
        indices = [0] * len(prompts) if indices is None else indices
        names = [prompt.text if isinstance(prompt, ParsedPrompt) else prompt for prompt in prompts]
        noise = partial(self.noise, names if noise_of is None else noise_of, seeds, indices, shape)
        x = self.initial(noise(0), sampling) if start is None else start.x
        sample = sampler_of(sampling.sampler, lambda step: noise(step + 1), sampling.eta, self.process.fade)
        if control is not None:
            denoise = control.around(denoise, sigmas)
        return self.decode(sample(denoise, x, sigmas, callback))

    def initial(self, noise: Tensor, sampling: SamplingConfig) -> Tensor:
        """Latents [B, C, h, w] that sampling begins with, of standard normal noise of that shape."""
        sigmas = self.process.sigmas(sampling.steps, sampling.spacing, sampling.shift)
        return self.process.initial(noise, float(sigmas[0]))

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of normalised latents [B, C, h, w]."""
        network = self.autoencoder
        decode = partial(decode_in_tiles, network.decode, side=self.tile, downscale=network.cfg.downscale)
        return finite_or_fp32(decode, latents * self.latent_std + self.latent_mean).clamp(-1, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Normalised latents [B, C, h, w], those in the middle of the posterior, of images [B, 3, H, W]."""
        return (self.latents(images).to(self.device) - self.latent_mean) / self.latent_std

    def prepare(self, samples: Samples) -> Inputs:
        """Arrays of the conditions, but for the text, of images and what is known of them."""
        return self.conditions.prepare(samples, self)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Means of the latents [B, C, h, w], not normalised, of images [B, 3, H, W]; on the CPU."""
        network = self.autoencoder
        encode = partial(encode_in_tiles, network.encode, side=self.tile, downscale=network.cfg.downscale)
        return split_moments(finite_or_fp32(encode, images.to(self.device)))[0].cpu()

    @torch.no_grad()
    def image_embeddings(self, images: Tensor) -> Tensor:
        """CLIP's embeddings [B, E] of images [B, 3, H, W]; on the CPU."""
        return image_embeddings(self.text_tower, images.to(self.device)).cpu()

    def denoiser_of(
        self,
        prompts: Sequence[str | ParsedPrompt],
        sampling: SamplingConfig,
        inputs: Inputs | None = None,
        control: Control | None = None,
        null_texts: Sequence[Tensor] = (),
    ) -> tuple[Denoise, tuple[int, int, int]]:
        """The U-Net with its conditions and guidance, as samplers call it, and the shape of a latent.

        Arguments and errors are those of a call; `null_texts` are those of its start.
        """
        if self.student is not None:
            self.student.check(sampling)
        images = [self.read(prompt, sampling) for prompt in prompts]
        # Prompts are joined by what each adds to the null prediction, so they need one even at scale 1.
        several = any(len(image) > 1 for image in images)
        mean_flow = self.process.cfg.mean_flow > 0
        if sampling.sampler is Sampler.mean_flow and not mean_flow:
            raise UserError(
                "sampler=mean_flow: this network was trained without process.mean_flow and knows no mean velocities; "
                "set another sampler, such as unipc"
            )
        told = self.denoiser.unet.cfg.time_cond_proj_dim is not None and not mean_flow
        if several and (told or self.student is not None):
            raise UserError("AND: joins what each prompt adds to none, and this network has its guidance inside")
        outside = 1.0 if told else sampling.guidance_scale  # a student has its guidance inside
        guided = outside != 1 or several
        if sampling.negative_prompt and not self.conditions.takes_text:
            raise UserError(f"negative_prompt={sampling.negative_prompt}: this network takes no text; leave it out")
        if guided and not self.conditions.can_drop:
            raise UserError(
                f"guidance_scale={sampling.guidance_scale}: this network was trained without dropping a condition; "
                "set guidance_scale=1"
            )
        terms = terms_of(images, sampling.steps, sampling.weighting)
        conditioning, nulls = self._embedded(terms, len(images), sampling, inputs or {}, guided, null_texts)
        if told:
            inside = torch.tensor(sampling.guidance_scale, device=self.device)
            conditioning = conditioning._replace(guidance=inside.expand(len(terms)))
            nulls = [null._replace(guidance=inside.expand(len(images))) for null in nulls]
        predict: ConditionalNetwork = partial(
            self.denoiser.predict, attn_control=None if control is None else control.attention
        )
        sigmas = self.process.sigmas(sampling.steps, sampling.spacing, sampling.shift)
        if sampling.sampler is Sampler.mean_flow:
            predict = stepping(predict, self.process, sigmas)
        owners = torch.tensor([term.image for term in terms], device=self.device)
        always = len(terms) - (len(images) if control is not None else 0)  # a control counts on the whole prompts

        @lru_cache(maxsize=2)  # inside and outside of the interval; a step goes on with the last one's, mostly
        def network(scale: float, null: int, shares: tuple[float, ...]) -> Network:
            """The network of a step in which the terms have these weights, without those that have none."""
            used = [row for row, share in enumerate(shares) if share != 0 or row >= always]
            rows = torch.tensor(used, dtype=torch.long, device=self.device)
            weights = torch.tensor(shares, device=self.device)[rows]
            alone = [(terms[row].image, shares[row]) for row in used] == [(number, 1) for number in range(len(images))]
            # Tokens stay the same from call to call: their keys and values are computed once.
            return classifier_free(
                predict,
                conditioning if len(rows) == len(terms) else conditioning.select(rows),
                nulls[null] if scale != 1 or several else None,
                scale,
                prepare=self.denoiser.prepared,
                rescale=sampling.guidance_rescale,
                joined=None if alone else Joined(owners[rows], weights),
            )

        # The terms and the null of each step are found by its timestep: a sampler may call twice in a step, or between
        # two levels.
        levels = [self.process.timestep(sigma) for sigma in sigmas[:-1].tolist()]

        def bound(scale: float) -> Network:
            of_steps = list(zip(*(term.weights_at(scale) for term in terms), strict=True))
            varies = len(nulls) > 1 or len(set(of_steps)) > 1
            changing = list(enumerate(of_steps)) if varies else [(0, of_steps[0])]
            return by_step(levels, [partial(network, scale, step % len(nulls), shares) for step, shares in changing])

        bounded = bound(outside)
        if sampling.guidance_interval:
            low, high = (self.process.timestep(sigma) if sigma > 0 else -1.0 for sigma in sampling.guidance_interval)
            bounded = within((low, high), bounded, bound(1.0))
        return self.process.denoiser(bounded), self.latent_shape(sampling, conditioning)

    def read(self, prompt: str | ParsedPrompt, sampling: SamplingConfig) -> list[ParsedPrompt]:
        """The prompts that are joined for an image, by the syntax if that is on."""
        if isinstance(prompt, ParsedPrompt):
            return [prompt]
        return parse(prompt) if sampling.prompt_syntax and self.conditions.takes_text else plain(prompt)

    def _embedded(
        self,
        terms: list[Term],
        count: int,
        sampling: SamplingConfig,
        inputs: Inputs,
        guided: bool,
        null_texts: Sequence[Tensor],
    ) -> tuple[Conditioning, list[Conditioning]]:
        """Conditions by term, and the nulls that guidance leads away from by image: one for all steps, or each."""
        embed, takes_text = self.denoiser.conditions, self.conditions.takes_text
        inputs = {name: array.to(self.device) for name, array in inputs.items()}
        owners = torch.tensor([term.image for term in terms], device=self.device)
        repeated = {name: array[owners] for name, array in inputs.items()}
        if takes_text:
            repeated["text"] = self.states([term.prompt for term in terms])
        conditioning = embed(repeated)
        if not guided:
            return conditioning, [Conditioning()]
        null = embed.null(inputs)
        if not takes_text:
            return conditioning, [embed(null)]
        texts = null_texts or [self.states(self._negative(sampling)).expand(count, -1, -1)]
        return conditioning, [embed({**null, "text": states}) for states in texts]

    def cuts(self, texts: Sequence[str], syntax: bool) -> Cuts:
        """Count prompts that are longer than the text encoder reads; `syntax`: whether brackets mean weights."""
        if self.text_tower is None or not self.conditions.takes_text:
            return Cuts(0)
        read = parse if syntax else plain
        return Cuts.of(self.text_tower, [prompt.text for text in texts for prompt in read(text)])

    def states(self, prompts: list[ParsedPrompt]) -> Tensor:
        """Text states [R, L, D] of R prompts."""
        assert self.text_tower is not None
        return text_states(self.text_tower, prompts, self.device)

    def _negative(self, sampling: SamplingConfig) -> list[ParsedPrompt]:
        negative = self.read(sampling.negative_prompt, sampling)
        if len(negative) > 1:
            raise UserError(f"negative_prompt={sampling.negative_prompt}: takes no AND; separate the words with commas")
        return negative

    def latent_shape(self, sampling: SamplingConfig, conditioning: Conditioning | None = None) -> tuple[int, int, int]:
        """Channels, height and width of a latent: of `size`, of a condition's image, or as in training."""
        conditioning = Conditioning() if conditioning is None else conditioning
        cfg, scale = self.denoiser.unet.cfg, self.autoencoder.cfg.downscale
        height, width = cfg.sample_size, cfg.sample_size
        if conditioning.channels is not None:
            height, width = conditioning.channels.shape[2:]
        if sampling.size:
            wanted = (sampling.size[0] // scale, sampling.size[1] // scale)
            if conditioning.channels is not None and wanted != (height, width):
                shown = f"{height * scale} x {width * scale}"
                raise UserError(f"size={sampling.size}: the image that is given makes {shown}; leave size out")
            height, width = wanted
        unit = scale * cfg.downscale
        if height % cfg.downscale or width % cfg.downscale or any(side % unit for side in sampling.size):
            sides = sampling.size or [height * scale, width * scale]
            raise UserError(f"images of {sides[0]} x {sides[1]} pixels: sides must be multiples of {unit}")
        return cfg.out_channels, height, width

    def noise(
        self, prompts: Sequence[str], seeds: Sequence[int], indices: Sequence[int], shape: tuple[int, ...], draw: int
    ) -> Tensor:
        """The noise [B, *shape] that belongs to B images (`image_noise`)."""
        images = zip(prompts, seeds, indices, strict=True)
        noise = np.stack([image_noise(prompt, seed, index, shape, draw) for prompt, seed, index in images])
        return torch.from_numpy(noise).to(self.device)  # [B, C, h, w]


def image_noise(prompt: str, seed: int, index: int, shape: tuple[int, ...], draw: int = 0) -> np.ndarray:
    """Standard normal float32 noise that belongs to an image, not to a batch, a position or a device.

    Draw 0 is what sampling begins with, draw n + 1 what step n adds.
    """
    # A counter-based generator on the CPU: the same bits on every device, and no state that another image advances.
    key = hashlib.sha256(f"{seed}/{prompt}/{index}".encode()).digest()[:16]
    bits = np.random.Philox(key=int.from_bytes(key, "little"), counter=[0, 0, 0, draw])
    return np.random.Generator(bits).standard_normal(shape, dtype=np.float32)
