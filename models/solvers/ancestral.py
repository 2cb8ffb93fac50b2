"""First order: DDIM with all its names. In the variance-exploding form they are one update (`models.samplers`)."""

import math

from torch import Tensor

from models.process import Denoise
from models.solvers.common import Callback, Noise, first_guess, intervals, no_noise


def sample_ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    callback: Callback | None = None,
    *,
    noise: Noise = no_noise,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16): a step to a level below the next one, and noise up to it.

    With eta = 0 nothing is random; eta = 1 draws from the posterior of Ho et al. 2020, eq. 7.
    """
    for step, sigma, following in intervals(sigmas):
        x0 = first_guess(denoise, x, sigma, step, callback)
        up = eta * following * math.sqrt(1.0 - (following / sigma) ** 2)
        down = math.sqrt(following**2 - up**2)
        x = x0 + (down / sigma) * (x - x0)
        if up > 0:
            x = x + up * noise(step)
    return x


def sample_ddpm(
    denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None, *, noise: Noise = no_noise
) -> Tensor:
    """DDPM (Ho et al. 2020, algorithm 2) with the smaller of its two variances."""
    return sample_ddim(denoise, x, sigmas, callback, noise=noise, eta=1.0)


def sample_euler(denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Euler's method in sigma (Karras et al. 2022, algorithm 1 without its second evaluation)."""
    return sample_ddim(denoise, x, sigmas, callback)


def sample_euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    callback: Callback | None = None,
    *,
    noise: Noise = no_noise,
    eta: float = 1.0,
) -> Tensor:
    """Euler's method with the noise of DDPM: what k-diffusion calls ancestral sampling."""
    return sample_ddim(denoise, x, sigmas, callback, noise=noise, eta=eta)
