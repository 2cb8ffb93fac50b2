"""What all samplers share: the walk through the noise levels, and what they are given beside the network."""

from collections.abc import Callable, Iterator
from itertools import pairwise

from torch import Tensor

from models.process import Denoise

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
    """In place of the noise, where a sampler should need none."""
    raise ValueError("a sampler with eta > 0 needs noise: a function of the step")
