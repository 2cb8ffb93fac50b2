"""Samplers: functions (denoise, x, sigmas, callback) -> x0 that never ask what the network predicts.

All solve dx/dsigma = (x - denoise(x, sigma)) / sigma (Karras et al. 2022, eq. 1 with s = 1) from sigmas[0] down to
sigmas[-1]. x [B, ...] is noise of scale sigmas[0] (`Process.initial`); sigmas [steps + 1] descend and may end in 0.
`callback(step, x, x0)` is called at each step with x before the step and the current guess x0.

Those that add noise also take `noise(step)`, standard normal of x's shape, and all but DDPM `eta`, how much of it (0:
none). Those that work with slopes take `fade`, in which variables the path is straight (`Process.fade`).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Self

from torch import Tensor

from conf.errors import UserError
from conf.schema import STOCHASTIC, DistillMethod, Sampler, SamplingConfig
from models.diffusion.process import Denoise

Callback = Callable[[int, Tensor, Tensor], None]  # (step, x before the step, guess x0)
Noise = Callable[[int], Tensor]  # step -> standard normal noise of the shape of x


def intervals(sigmas: Tensor) -> Iterator[tuple[int, float, float]]:
    """(step, noise level, following noise level) of sigmas [steps + 1]."""
    for step, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        yield step, sigma, following


def first_guess(denoise: Denoise, x: Tensor, sigma: float, step: int, callback: Callback | None) -> Tensor:
    """The guess x0 that a step begins with, shown to the callback."""
    x0 = denoise(x, sigma)
    if callback is not None:
        callback(step, x, x0)
    return x0


def no_noise(step: int) -> Tensor:
    """Refuse to make noise: the default of samplers, which need none with eta = 0."""
    raise ValueError("a sampler with eta > 0 needs noise: a function of the step")


# -------------------- first order: DDIM with all its names ------------------------------------------------------------
# In the variance-exploding form they are one update.


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
        # variances add: down² + up² = following², so the level after the noise is the one that the step is to end at
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


def sample_mean_flow(denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Steps of a flow by its mean velocity (Geng et al. 2025, eq. 12): x_t - (t - r) u, straight as those of DDIM.

    What is special is the guess, x_t - t u: the network knows where a step from this level ends (`guidance.stepping`).
    """
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


def sample_lcm(
    denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None, *, noise: Noise = no_noise
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): to the image, and back up by new noise.

    For students of distillation, whose guess is the end of the whole path; LCM has its name from Luo et al. 2023.
    """
    for step, sigma, following in intervals(sigmas):
        x = first_guess(denoise, x, sigma, step, callback)
        if following > 0:
            x = x + following * noise(step)
    return x


# -------------------- second order from several slopes ----------------------------------------------------------------
# Heun, the midpoint, or the slopes of earlier steps. The slope is that of y = (1 - fade tau) x0 + tau noise by tau,
# straight where the guess x0 does not change. fade = 0 is x by sigma (Karras et al. 2022); fade = 1 is a flow's x_t by
# t, which stays small where sigma grows without bound.

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
        if following == 0:  # the slope at 0 divides by 0
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
        if step == 0 and following > 0:  # one slope alone would make the first step one of first order
            trial = moved(x, sigma, following, slope, fade)
            mean = (slope + slope_of(trial, denoise(trial, following), following, fade)) / 2
        else:
            weighted = zip(WEIGHTS[len(slopes) - 1], slopes, strict=True)
            mean = sum((weight * slope for weight, slope in weighted), start=x.new_zeros(()))
        x = moved(x, sigma, following, mean, fade)
    return x


# -------------------- DPM-Solver++ ------------------------------------------------------------------------------------
# Lu et al. 2022: exponential integrators in lambda = -log sigma that extrapolate the guess x0. In the variance-
# exploding form, alpha = 1, the equation dx/dlambda = x0 - x is linear but for x0. Its exact solution over a step h of
# lambda (their proposition 4.1) is
#
#     x' = exp(-h) x + integral over tau from 0 to h of exp(tau - h) x0(tau)
#
# and solvers differ in what they take for x0(tau). With eta > 0 it is the stochastic equation: x fades faster, with
# exp(-(1 + eta) h), and gets sigma' sqrt(1 - exp(-2 eta h)) of noise instead.


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
        if following == 0:  # lambda is infinite there
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


# -------------------- UniPC -------------------------------------------------------------------------------------------
# Zhao et al. 2023: a predictor of second order, and a corrector that needs no further call of the network.

Point = tuple[float, Tensor]  # (lambda, x0)


def sample_unipc(denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """UniPC-2 for x0 with B(h) = exp(h) - 1. Third order with one call per step.

    The callback sees x before its correction; the step to sigma = 0 is the guess x0 itself.
    """
    points: list[Point] = []  # newest first
    start = x
    for step, sigma, following in intervals(sigmas):
        point = -math.log(sigma), first_guess(denoise, x, sigma, step, callback)
        if points:
            x = corrected(start, points, point)
        points = [point, *points[:1]]
        if following == 0:
            return point[1]
        start = x
        x = predicted(start, points, -math.log(following))
    return x


def predicted(x: Tensor, points: list[Point], end: float) -> Tensor:
    """UniP: x at lambda = end from x at the newest of one or two points; equal to DPM-Solver++(2M)."""
    (now, x0), h = points[0], end - points[0][0]
    if len(points) == 2:
        before, older = points[1]
        x0 = x0 + (x0 - older) * (h / (now - before)) / 2
    return math.exp(-h) * x - math.expm1(-h) * x0


def corrected(x: Tensor, points: list[Point], end: Point) -> Tensor:
    """UniC: x at `end` again, now that the guess there is known.

    With two points the weights are exact where x0 is a parabola in lambda; with one it is the mean of both ends.
    """
    (now, x0), h = points[0], end[0] - points[0][0]
    new, old = 0.5 * (end[1] - x0), x0.new_zeros(())
    if len(points) == 2:
        before, older = points[1]
        ratio = (before - now) / h
        first = (1 + math.expm1(-h) / h) / -math.expm1(-h)  # of the integral over the step of tau / h ...
        second = (1 - 2 * (1 + math.expm1(-h) / h) / h) / -math.expm1(-h)  # ... and of (tau / h)^2
        weight = (first - second) / (1 - ratio)
        old, new = weight * (older - x0) / ratio, (first - weight) * (end[1] - x0)
    return math.exp(-h) * x - math.expm1(-h) * (x0 + old + new)


# -------------------- the choice among them ---------------------------------------------------------------------------

SAMPLERS: dict[Sampler, Callable[..., Tensor]] = {
    Sampler.ddpm: sample_ddpm,
    Sampler.ddim: sample_ddim,
    Sampler.pndm: sample_pndm,
    Sampler.euler: sample_euler,
    Sampler.euler_ancestral: sample_euler_ancestral,
    Sampler.heun: sample_heun,
    Sampler.dpm2: sample_dpm2,
    Sampler.dpmpp_2s: sample_dpmpp_2s,
    Sampler.dpmpp_2m: sample_dpmpp_2m,
    Sampler.dpmpp_2m_sde: sample_dpmpp_2m_sde,
    Sampler.dpmpp_3m_sde: sample_dpmpp_3m_sde,
    Sampler.unipc: sample_unipc,
    Sampler.lcm: sample_lcm,
    Sampler.mean_flow: sample_mean_flow,
}


WITH_FADE = {Sampler.pndm, Sampler.heun, Sampler.dpm2}


def sampler_of(sampler: Sampler, noise: Noise, eta: float | None = None, fade: float = 0.0) -> Callable[..., Tensor]:
    """The function (denoise, x, sigmas, callback) -> x0 of a sampler; eta None: its own."""
    if sampler in WITH_FADE:
        return partial(SAMPLERS[sampler], fade=fade)
    if sampler in STOCHASTIC:
        return partial(SAMPLERS[sampler], noise=noise, **({} if eta is None else {"eta": eta}))
    return SAMPLERS[sampler]


# -------------------- students of distillation ------------------------------------------------------------------------

MOST_STEPS = 8  # more of them only add the error of each


@dataclass(frozen=True, slots=True)
class Student:
    """What a network that learnt by distillation may be asked for; kept in `latentline.json` beside its weights.

    Args:
        method: of the distillation.
        guidance: lowest and highest scale that it was told; None: it is told none, whatever its teacher's was.
    """

    method: str
    guidance: list[float] | None

    @property
    def in_few_steps(self) -> bool:
        """Whether it says where its teacher's path ends; else it is like any network, with its guidance inside."""
        return self.method != DistillMethod.guidance.value

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Self | None:
        """Of plain values; None for a network that is no student. Raises TypeError for what no training writes."""
        if not found:
            return None
        scales = found.get("guidance")
        if scales is not None and not (
            isinstance(scales, list) and len(scales) == 2 and all(type(scale) in (int, float) for scale in scales)
        ):
            raise TypeError("student.guidance is no pair of numbers")
        return cls(str(found.get("method")), scales)

    def check(self, sampling: SamplingConfig) -> None:
        """Refuse options that it cannot follow, or that would be without effect.

        Raises:
            UserError: another sampler, too many steps, or guidance that it was not taught.
        """
        about = f"this network is a student of distillation ({self.method})"
        if not self.in_few_steps and sampling.sampler in (Sampler.lcm, Sampler.mean_flow):
            raise UserError(f"sampler={sampling.sampler.value}: {about}, for solvers; set another one, such as unipc")
        if self.in_few_steps and (sampling.sampler is not Sampler.lcm or sampling.steps > MOST_STEPS):
            raise UserError(
                f"sampler={sampling.sampler.value}, steps={sampling.steps}: {about}; set sampler=lcm and steps=1 to "
                f"{MOST_STEPS}"
            )
        scale = sampling.guidance_scale
        if self.guidance is None and scale != 1:
            raise UserError(f"guidance_scale={scale}: {about}, guided as its teacher was; set guidance_scale=1")
        if self.guidance is not None and not self.guidance[0] <= scale <= self.guidance[1]:
            low, high = self.guidance
            raise UserError(f"guidance_scale={scale}: {about}, which learnt scales from {low:g} to {high:g}")
        for option in ("negative_prompt", "guidance_rescale", "guidance_interval"):
            if value := getattr(sampling, option):
                raise UserError(f"{option}={value}: without effect, {about}, whose guidance is inside; leave it out")
