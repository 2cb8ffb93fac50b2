"""UniPC (Zhao et al. 2023): a predictor of second order, and a corrector that needs no further call of the network."""

import math

from torch import Tensor

from models.process import Denoise
from models.solvers.common import Callback, first_guess, intervals

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
