"""DPM-Solver++ (Lu et al. 2022): exponential integrators in lambda = -log sigma that extrapolate the guess x0.

In the variance-exploding form, alpha = 1, the equation dx/dlambda = x0 - x is linear but for x0. Its exact solution
over a step h of lambda (their proposition 4.1) is

    x' = exp(-h) x + integral over tau from 0 to h of exp(tau - h) x0(tau)

and solvers differ in what they take for x0(tau). With eta > 0 it is the stochastic equation: x fades
faster, with exp(-(1 + eta) h), and gets sigma' sqrt(1 - exp(-2 eta h)) of noise instead.
"""

import math

from torch import Tensor

from models.process import Denoise
from models.solvers.common import Callback, Noise, first_guess, intervals, no_noise


def sample_dpmpp_2s(denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """DPM-Solver++(2S) (algorithm 1 with r = 1/2): x0 in the middle of the step. Two calls per step.

    The step to sigma = 0 is the guess x0 itself.
    """
    for step, sigma, following in intervals(sigmas):
        x0 = first_guess(denoise, x, sigma, step, callback)
        if following == 0:
            return x0
        middle = math.sqrt(sigma * following)
        trial = x0 + (middle / sigma) * (x - x0)
        x0 = denoise(trial, middle)
        x = x0 + (following / sigma) * (x - x0)
    return x


def sample_dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """DPM-Solver++(2M) (algorithm 2): x0 in the middle of the step, extrapolated from the last two guesses.

    The first step has no history, and the step to sigma = 0 is the guess x0 itself.
    """
    return sample_dpmpp_2m_sde(denoise, x, sigmas, callback, eta=0.0)


def sample_dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    callback: Callback | None = None,
    *,
    noise: Noise = no_noise,
    eta: float = 1.0,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022): `sample_dpmpp_2m` with noise."""
    previous_x0, previous_h = None, 0.0
    for step, sigma, following in intervals(sigmas):
        x0 = first_guess(denoise, x, sigma, step, callback)
        if following == 0:
            return x0
        h = math.log(sigma / following)
        middle = x0 if previous_x0 is None else x0 + (h / (2 * previous_h)) * (x0 - previous_x0)
        kept = math.exp(-(1 + eta) * h)
        x = kept * x + (1 - kept) * middle + fresh(noise, step, following, eta, h)
        previous_x0, previous_h = x0, h
    return x


def sample_dpmpp_3m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    callback: Callback | None = None,
    *,
    noise: Noise = no_noise,
    eta: float = 1.0,
) -> Tensor:
    """SDE-DPM-Solver++(3M), as k-diffusion made it of DPM-Solver-3: x0 and two of its differences in lambda.

    The curvature has half the weight that a parabola through three guesses has, in all implementations alike. That
    and the first step, one of Euler's, leave the order at 2, with smaller errors than 2M.
    """
    guesses: list[Tensor] = []  # newest first, with the step that followed each
    lengths: list[float] = []
    for step, sigma, following in intervals(sigmas):
        x0 = first_guess(denoise, x, sigma, step, callback)
        if following == 0:
            return x0
        h = math.log(sigma / following)
        guesses, lengths = [x0, *guesses[:2]], [h, *lengths[:2]]
        z = (1 + eta) * h
        slope, curvature = differences(guesses, lengths)
        first = 1 + math.expm1(-z) / z  # of the integral over the step of the slope and the curvature
        second = 0.5 - first / z
        x = math.exp(-z) * x - math.expm1(-z) * x0 + fresh(noise, step, following, eta, h)
        x = x + first * slope + second * curvature
    return x


def differences(guesses: list[Tensor], lengths: list[float]) -> tuple[Tensor | float, Tensor | float]:
    """Slope and divided second difference of the guesses (newest first) at the newest, per newest length."""
    if len(guesses) == 1:
        return 0.0, 0.0
    h, before = lengths[0], lengths[1]
    last = (guesses[0] - guesses[1]) * (h / before)
    if len(guesses) == 2:
        return last, 0.0
    curvature = (last - (guesses[1] - guesses[2]) * (h / lengths[2])) * (h / (before + lengths[2]))
    return last + (before / h) * curvature, curvature


def fresh(noise: Noise, step: int, following: float, eta: float, h: float) -> Tensor | float:
    """The noise of one step of length h in lambda."""
    return following * math.sqrt(-math.expm1(-2 * eta * h)) * noise(step) if eta > 0 else 0.0
