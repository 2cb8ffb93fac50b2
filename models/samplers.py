"""Samplers: functions (denoise, x, sigmas, callback) -> x0 that never ask what the network predicts.

All solve dx/dsigma = (x - denoise(x, sigma)) / sigma (Karras et al. 2022, eq. 1 with s = 1) from sigmas[0] down to
sigmas[-1]. x [B, ...] is noise of scale sigmas[0] (`Process.initial`); sigmas [steps + 1] descend and may end in 0.
`callback(step, x, x0)` is called at each step with x before the step and the current guess x0.
"""

import math
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from conf.schema import Sampler
from models.process import Denoise

Callback = Callable[[int, Tensor, Tensor], None]
SampleFunction = Callable[[Denoise, Tensor, Tensor, Callback | None], Tensor]


def sample_ddim(denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """DDIM with eta = 0 (Song et al. 2021, eq. 12): Euler's method in sigma. First order."""
    for step, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        x0 = denoise(x, sigma)
        if callback is not None:
            callback(step, x, x0)
        x = x0 + (following / sigma) * (x - x0)
    return x


def sample_dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2, with alpha = 1 and lambda = -log sigma). Second order.

    The first step has no history, and the step to sigma = 0 is the guess x0 itself.
    """
    previous_x0, previous_h = None, 0.0
    for step, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        x0 = denoise(x, sigma)
        if callback is not None:
            callback(step, x, x0)
        if following == 0:
            return x0
        h = math.log(sigma / following)
        extrapolated = x0 if previous_x0 is None else x0 + (h / (2 * previous_h)) * (x0 - previous_x0)
        x = (following / sigma) * x - math.expm1(-h) * extrapolated
        previous_x0, previous_h = x0, h
    return x


SAMPLERS: dict[Sampler, SampleFunction] = {Sampler.ddim: sample_ddim, Sampler.dpmpp_2m: sample_dpmpp_2m}
