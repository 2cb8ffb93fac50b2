"""Inversion: the noise from which sampling draws a given image, so that it can be edited like a drawn one.

DDIM's steps are walked back from the image (Song et al. 2021, section 4.3). The usual way asks the network at the
end of a step for the slope at its beginning; here the beginning is sought that the step really leads from (Pan et al.
2023, "Effective real image editing with accelerated iterative diffusion inversion"). Both are without guidance. What
guidance changes of the image is undone in one of three ways (`conf.schema.InversionMethod`).
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import STOCHASTIC, InversionMethod, Sampler, SamplingConfig
from models.conditions import Inputs
from models.diffusion.process import Denoise
from models.diffusion.samplers import Student
from models.pipeline import DiffusionPipeline, SamplingStart
from models.prompts import ParsedPrompt

DDIM = Sampler.ddim
CORRECTIONS = 4  # of the beginning of a step, each of which calls the network
FIT_STEPS, FIT_RATE = 10, 1e-2  # of Adam at each step (Mokady et al. 2023, section 4)


@torch.no_grad()
def invert(
    model: DiffusionPipeline,
    images: Tensor,
    prompts: Sequence[str | ParsedPrompt],
    sampling: SamplingConfig,
    method: InversionMethod = InversionMethod.negative_prompt,
    inputs: Inputs | None = None,
) -> SamplingStart:
    """The latents from which sampling ends with given images.

    Args:
        model: one that takes captions.
        images: [B, 3, H, W] in [-1, 1], as large as the images that are drawn.
        prompts: B descriptions of them.
        sampling: with which they will be drawn.
        method: what becomes of guidance.
        inputs: arrays of the other conditions, B each.

    Raises:
        UserError: images of another size, a sampler whose steps cannot be walked back, and what the pipeline refuses.
    """
    require_walkable(model.student, method)
    # Guidance multiplies the difference of two predictions, and with it the error of every step that is walked back; a
    # network that has it inside is one whose own path is walked back.
    scale = 1.0 if model.student is None else sampling.guidance_scale
    unguided = replace(sampling, guidance_scale=scale, guidance_rescale=0.0, guidance_interval=[], negative_prompt="")
    denoise, shape = model.denoiser_of(prompts, unguided, inputs)
    require_invertible(sampling, method, images, shape, model.autoencoder.cfg.downscale)
    sigmas = model.process.sigmas(sampling.steps, sampling.spacing, sampling.shift)
    path = walk_back(denoise, model.encode(images), sigmas)
    if method is InversionMethod.ddim or sampling.guidance_scale == 1:
        return SamplingStart(path[0])
    if method is InversionMethod.negative_prompt:  # led away from itself, the source's prediction stays as it is
        return SamplingStart(path[0], (model.states([model.read(prompt, sampling)[0] for prompt in prompts]),))
    null_text = model.states(model.read(sampling.negative_prompt, sampling)).expand(len(prompts), -1, -1)
    fitted = fit_null_text(model, denoise, path, sigmas, null_text, sampling.guidance_scale, inputs or {})
    return SamplingStart(path[0], fitted)


def require_walkable(student: Student | None, method: InversionMethod) -> None:
    """Refuse a student that has no path to walk back, or no guidance to undo."""
    if student is not None and student.in_few_steps:
        raise UserError(
            f"this network is a student of distillation ({student.method}), which has no path to walk back from an "
            "image: set unet= to its teacher"
        )
    if student is not None and method is not InversionMethod.ddim:
        raise UserError(f"inversion={method.value}: undoes guidance, which this network has inside; set inversion=ddim")


def require_invertible(
    sampling: SamplingConfig, method: InversionMethod, images: Tensor, latent: Sequence[int], downscale: int
) -> None:
    """Refuse samplers that miss an image by themselves, and images [..., H, W] of another size than is drawn."""
    if reason := unfit(sampling, method):
        raise UserError(reason)
    (height, width), wanted = images.shape[-2:], [side * downscale for side in latent[-2:]]
    if [height, width] != wanted:
        raise UserError(
            f"has {height} x {width} pixels, height x width, where {wanted[0]} x {wanted[1]} are drawn: cut it to that "
            f"size, or set size=[{height},{width}]"
        )


def unfit(sampling: SamplingConfig, method: InversionMethod) -> str:
    """The reason why this sampler does not draw a given image again, in one line; empty where it does.

    Those without noise solve the equation whose solution was walked back; null text is fitted to DDIM's very steps.
    """
    sampler, eta = sampling.sampler, sampling.eta
    if sampler in STOCHASTIC and eta != 0 and not (sampler is DDIM and eta is None):
        return f"sampler={sampler.value}: adds noise, with which no given image is found: set sampler=ddim"
    if method is InversionMethod.null_text and sampler not in (DDIM, Sampler.euler):
        return f"inversion=null_text: is fitted to the steps of sampler=ddim, not {sampler.value}"
    return ""


def step(x: Tensor, x0: Tensor, sigma: float, following: float) -> Tensor:
    """DDIM's step from one noise level to the next one (`models.diffusion.samplers`)."""
    return x0 + following / sigma * (x - x0)


def walk_back(denoise: Denoise, x0: Tensor, sigmas: Tensor, corrections: int = CORRECTIONS) -> list[Tensor]:
    """x [B, ...] at all levels sigmas [steps + 1], the last of which is x0's, so that each step leads to the next one.

    x is corrected by what the step from it misses, divided by how much of x the step would keep if latents were
    standard normal: Newton's method with that slope.
    """
    path = [x0]
    for sigma, following in reversed(list(pairwise(sigmas.tolist()))):
        kept = following / sigma
        slope = kept + (1 - kept) / (1 + sigma**2)
        goal = path[-1]
        x = goal if following == 0 else goal / slope
        for _ in range(corrections):
            x = x + (goal - step(x, denoise(x, sigma), sigma, following)) / slope
        path.append(x)
    return path[::-1]


def fit_null_text(
    model: DiffusionPipeline,
    denoise: Denoise,
    path: Sequence[Tensor],
    sigmas: Tensor,
    null_text: Tensor,
    scale: float,
    inputs: Inputs,
) -> tuple[Tensor, ...]:
    """Null-text inversion (Mokady et al. 2023, algorithm 1): states of no text, with which guidance keeps to the path.

    Args:
        model: the U-Net that guidance leads, with its process.
        denoise: the U-Net with the prompt, without guidance.
        path: of the images, from `walk_back`.
        sigmas: its levels.
        null_text: states [B, L, D] to begin with, those of the empty caption.
        scale: of guidance.
        inputs: arrays of the other conditions.

    Returns:
        States [B, L, D] of each step.
    """
    fitted, x, states = list[Tensor](), path[0], null_text
    for number, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        cond, alpha = denoise(x, sigma), model.process.alpha(following)
        states = states.clone().requires_grad_()
        rate = FIT_RATE * (1 - number / (2 * (len(sigmas) - 1)))
        optimizer = torch.optim.Adam([states], lr=rate)
        for _ in range(FIT_STEPS):
            with torch.enable_grad():
                uncond = _denoiser_with(model, states, inputs)(x, sigma)
                missed = step(x, uncond + scale * (cond - uncond), sigma, following) - path[number + 1]
                # x is in units of sigma here; alpha brings it to those of the paper's latents, which the rate is for
                loss = (alpha * missed).square().flatten(1).mean(1).sum()
            (states.grad,) = torch.autograd.grad(loss, [states])
            optimizer.step()
        states = states.detach()
        uncond = _denoiser_with(model, states, inputs)(x, sigma)
        # on from where sampling really gets to, not from the path: each step then makes up for the last one's error
        x = step(x, uncond + scale * (cond - uncond), sigma, following)
        fitted.append(states)
    return tuple(fitted)


def _denoiser_with(model: DiffusionPipeline, states: Tensor, inputs: Inputs) -> Denoise:
    """The U-Net with these text states in place of the prompt's, and the other conditions dropped."""
    embed = model.denoiser.conditions
    given = embed({**embed.null(inputs), "text": states})
    return model.process.denoiser(lambda x_t, timesteps: model.denoiser.predict(x_t, timesteps, given))
