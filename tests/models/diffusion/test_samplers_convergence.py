"""Solvers on data whose denoiser is known in closed form: the error falls with the order that theory says.

In one dimension the probability-flow ODE carries every quantile of the noisy density to the same quantile of the next
one, so that its exact solution is known for a mixture of Gaussians, too. Everything is in float64.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import STOCHASTIC, Prediction, ProcessConfig, Sampler
from models.diffusion.process import Process
from models.diffusion.samplers import SAMPLERS, no_noise, sampler_of

WEIGHTS, MEANS, STDS = torch.tensor([[0.5, 0.3, 0.2], [-1.0, 0.5, 2.0], [0.5, 0.4, 0.6]], dtype=torch.float64)
START, END = 8.0, 0.2
STRENGTHS = torch.linspace(-2, 2, 33, dtype=torch.float64)  # of the noise, in standard deviations
ORDERS = {
    Sampler.ddim: 1,
    Sampler.euler: 1,
    Sampler.pndm: 2,
    Sampler.heun: 2,
    Sampler.dpm2: 2,
    Sampler.dpmpp_2s: 2,
    Sampler.dpmpp_2m: 2,
    Sampler.dpmpp_2m_sde: 2,
    Sampler.dpmpp_3m_sde: 2,
    Sampler.unipc: 3,
    Sampler.mean_flow: 1,
}


def mixture(x: Tensor, sigma: float) -> Tensor:
    """Mean of x0 given x = x0 + sigma noise, for x0 of the mixture."""
    variances = STDS**2 + sigma**2
    distance = x.unsqueeze(-1) - MEANS
    share = torch.softmax(WEIGHTS.log() - distance**2 / (2 * variances) - variances.log() / 2, dim=-1)
    return (share * (MEANS + STDS**2 / variances * distance)).sum(-1)


def below(x: Tensor, sigma: float) -> Tensor:
    """Distribution function of x0 + sigma noise."""
    return (WEIGHTS * torch.special.ndtr((x.unsqueeze(-1) - MEANS) / (STDS**2 + sigma**2).sqrt())).sum(-1)


def exact(x: Tensor) -> Tensor:
    """Where the flow carries x from START to END: the same quantile, found by bisection."""
    wanted = below(x, START)
    low, high = torch.full_like(x, -20.0), torch.full_like(x, 20.0)
    for _ in range(60):
        middle = (low + high) / 2
        less = below(middle, END) < wanted
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return (low + high) / 2


def log_spaced(steps: int, start: float = START, end: float = END) -> Tensor:
    return torch.linspace(math.log(start), math.log(end), steps + 1, dtype=torch.float64).exp()


def slopes(error: Callable[[int], float], steps: int) -> list[float]:
    """Of log error against log steps, at two doublings."""
    errors = [error(steps * factor) for factor in (1, 2, 4)]
    return [math.log2(errors[0] / errors[1]), math.log2(errors[1] / errors[2])]


@pytest.mark.parametrize(("sampler", "order"), ORDERS.items())
def test_error_on_a_mixture_falls_with_the_order_of_the_solver(sampler: Sampler, order: int) -> None:
    x = START * STRENGTHS
    options: dict[str, Any] = {"eta": 0.0} if sampler in STOCHASTIC else {}

    def error(steps: int) -> float:
        return float((SAMPLERS[sampler](mixture, x, log_spaced(steps), **options) - exact(x)).abs().mean())

    assert slopes(error, 40) == pytest.approx([order, order], abs=0.3)


@pytest.mark.parametrize(("sampler", "order"), [(Sampler.heun, 2), (Sampler.dpm2, 2), (Sampler.pndm, 3)])
def test_error_of_slopes_along_a_flow_falls_with_the_order(sampler: Sampler, order: int) -> None:
    """Steps are even in t here, so that PNDM's weights are right; its first two steps keep it from the fourth order."""

    def error(steps: int) -> float:
        t = torch.linspace(START / (1 + START), END / (1 + END), steps + 1, dtype=torch.float64)
        sample = sampler_of(sampler, no_noise, fade=1.0)
        return float((sample(mixture, START * STRENGTHS, t / (1 - t)) - exact(START * STRENGTHS)).abs().mean())

    assert slopes(error, 60) == pytest.approx([order, order], abs=0.35)


def test_every_solver_without_noise_has_an_order() -> None:
    assert set(ORDERS) == set(Sampler) - {Sampler.ddpm, Sampler.euler_ancestral, Sampler.lcm}


def spread(sampler: Sampler, steps: int, std: float) -> float:
    """Standard deviation that a sampler with eta = 1 makes for data N(0, std^2), at END.

    All is linear: the response to the first noise and to that of each step, one row each, adds up in squares.
    """
    gain = torch.eye(steps + 1, dtype=torch.float64)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return std**2 / (std**2 + sigma**2) * x

    sample = sampler_of(sampler, lambda step: gain[step + 1], 1.0 if sampler is not Sampler.ddpm else None)
    start = gain[0] * (std**2 + START**2) ** 0.5
    return float(sample(denoise, start, log_spaced(steps)).square().sum().sqrt())


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (Sampler.ddpm, 1),
        (Sampler.ddim, 1),
        (Sampler.euler_ancestral, 1),
        (Sampler.dpmpp_2m_sde, 2),
        (Sampler.dpmpp_3m_sde, 2),
    ],
)
def test_spread_of_stochastic_samples_falls_into_place_with_the_order(sampler: Sampler, order: int) -> None:
    std = 0.6
    truth = (std**2 + END**2) ** 0.5
    assert slopes(lambda steps: abs(spread(sampler, steps, std) - truth), 40) == pytest.approx([order] * 2, abs=0.3)


@pytest.mark.parametrize(
    "options",
    [
        {"prediction": Prediction.eps},
        {"prediction": Prediction.v, "zero_terminal_snr": True},
        {"prediction": Prediction.flow, "shift": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("sampler", list(Sampler))
def test_samples_have_mean_and_deviation_of_the_data(sampler: Sampler, options: dict[str, Any]) -> None:
    """From the first to the last level of every kind of process, in float32."""
    mean, std = 0.4, 0.6
    process = Process(ProcessConfig(**options))
    sigmas = process.sigmas(200)

    def noise(step: int) -> Tensor:
        return torch.randn(20_000, generator=torch.Generator().manual_seed(step + 1))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        share = std**2 / (std**2 + sigma**2)
        return mean + (share**0.5 if sampler is Sampler.lcm else share) * (x - mean)  # lcm: the end of the whole path

    sample = sampler_of(sampler, noise, fade=process.fade)
    samples = sample(denoise, process.initial(noise(-1), float(sigmas[0])), sigmas)
    assert float(samples.mean()) == pytest.approx(mean, abs=0.03)
    assert float(samples.std()) == pytest.approx(std, abs=0.03)
