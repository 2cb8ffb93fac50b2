"""Second order from several slopes: Heun, the midpoint, or those of earlier steps.

The slope is that of y = (1 - fade tau) x0 + tau noise by tau, straight where the guess x0 does not change. fade = 0 is
x by sigma (Karras et al. 2022); fade = 1 is a flow's x_t by t, which stays small where sigma grows without bound.
"""

import math

from torch import Tensor

from models.process import Denoise
from models.solvers.common import Callback, first_guess, intervals

# of Adams and Bashforth for evenly spaced steps, the newest slope first (Liu et al. 2022)
WEIGHTS = [(1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]


def slope_of(x: Tensor, x0: Tensor, sigma: float, fade: float) -> Tensor:
    """dy/dtau at x with the guess x0."""
    return (x - x0) / sigma - fade * x0


def moved(x: Tensor, sigma: float, following: float, slope: Tensor, fade: float) -> Tensor:
    """x at the level `following` if the slope stays what it is."""
    length = following / (1 + fade * following) - sigma / (1 + fade * sigma)
    return (x / (1 + fade * sigma) + length * slope) * (1 + fade * following)


def sample_heun(
    denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None, *, fade: float = 0.0
) -> Tensor:
    """Heun's method (Karras et al. 2022, algorithm 1): the mean of the slopes at both ends. Two calls per step.

    The step to sigma = 0 is one of Euler's, the guess x0 itself.
    """
    for step, sigma, following in intervals(sigmas):
        x0 = first_guess(denoise, x, sigma, step, callback)
        if following == 0:
            return x0
        slope = slope_of(x, x0, sigma, fade)
        trial = moved(x, sigma, following, slope, fade)
        end = slope_of(trial, denoise(trial, following), following, fade)
        x = moved(x, sigma, following, (slope + end) / 2, fade)
    return x


def sample_dpm2(
    denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None, *, fade: float = 0.0
) -> Tensor:
    """DPM-Solver-2 in sigma, as k-diffusion has it: the slope in the middle of log tau. Two calls per step.

    The step to sigma = 0 is the guess x0 itself.
    """
    for step, sigma, following in intervals(sigmas):
        x0 = first_guess(denoise, x, sigma, step, callback)
        if following == 0:
            return x0
        tau = math.sqrt(sigma * following / ((1 + fade * sigma) * (1 + fade * following)))
        middle = tau / (1 - fade * tau)
        trial = moved(x, sigma, middle, slope_of(x, x0, sigma, fade), fade)
        x = moved(x, sigma, following, slope_of(trial, denoise(trial, middle), middle, fade), fade)
    return x


def sample_pndm(
    denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None, *, fade: float = 0.0
) -> Tensor:
    """PNDM without Runge-Kutta steps, also called PLMS (Liu et al. 2022): up to four slopes in memory.

    One call per step and one more: the first step is one of Heun's. The weights are those of even steps, hence the
    second order.
    """
    slopes: list[Tensor] = []
    for step, sigma, following in intervals(sigmas):
        slope = slope_of(x, first_guess(denoise, x, sigma, step, callback), sigma, fade)
        slopes = [slope, *slopes[:3]]
        if step == 0 and following > 0:
            trial = moved(x, sigma, following, slope, fade)
            mean = (slope + slope_of(trial, denoise(trial, following), following, fade)) / 2
        else:
            weighted = zip(WEIGHTS[len(slopes) - 1], slopes, strict=True)
            mean = sum((weight * slope for weight, slope in weighted), start=x.new_zeros(()))
        x = moved(x, sigma, following, mean, fade)
    return x
