"""Samplers against diffusers' schedulers and against the closed form of a Gaussian."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from conf.schema import Prediction, ProcessConfig, Sampler
from models.process import Network, Process
from models.samplers import SAMPLERS, sample_ddim, sample_dpmpp_2m

# diffusers 0.42 calls np.array(tensor), which numpy 2 finds fault with
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MEAN, STD = 0.4, 0.6
NOISE = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def alpha_std(prediction: Prediction, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if prediction is Prediction.flow:
        return 1 - timesteps / 1000, timesteps / 1000
    alphas_cumprod = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    chosen = alphas_cumprod.double()[timesteps.long()]
    return chosen.sqrt(), (1 - chosen).sqrt()


def exact_network(prediction: Prediction) -> Network:
    """The best possible prediction for data N(MEAN, STD^2), in closed form."""

    def predict(x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        alpha, std = (level.view(-1, 1, 1, 1) for level in alpha_std(prediction, timesteps.double()))
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + std**2) * (x_t.double() - alpha * MEAN)
        noise = (x_t - alpha * x0) / std
        answer = {Prediction.eps: noise, Prediction.v: alpha * noise - std * x0, Prediction.flow: noise - x0}
        return answer[prediction].to(x_t.dtype)

    return predict


def ours(prediction: Prediction, sampler: Sampler, steps: int, noise: torch.Tensor = NOISE) -> torch.Tensor:
    process = Process(ProcessConfig(prediction=prediction))
    sigmas = process.sigmas(steps)
    x = process.initial(noise, float(sigmas[0]))
    return SAMPLERS[sampler](process.denoiser(exact_network(prediction)), x, sigmas, None)


def by_diffusers(scheduler: object, network: Network) -> torch.Tensor:
    x = NOISE
    for timestep in scheduler.timesteps:  # type: ignore[attr-defined]
        prediction = network(x, torch.full((len(x),), float(timestep)))
        x = scheduler.step(prediction, timestep, x).prev_sample  # type: ignore[attr-defined]
    return x


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("prediction", [Prediction.eps, Prediction.v])
@pytest.mark.parametrize("sampler", list(Sampler))
def test_discrete_sampling_equals_diffusers(sampler: Sampler, prediction: Prediction, steps: int) -> None:
    config = Process(ProcessConfig(prediction=prediction)).scheduler_config()
    kind = {Sampler.ddim: DDIMScheduler, Sampler.dpmpp_2m: DPMSolverMultistepScheduler}[sampler]
    scheduler = kind.from_config(config)
    scheduler.set_timesteps(steps)
    expected = by_diffusers(scheduler, exact_network(prediction))
    torch.testing.assert_close(ours(prediction, sampler, steps), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [5, 20])
def test_flow_sampling_equals_diffusers(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(0.999, 0.999 / steps, steps).tolist())
    expected = by_diffusers(scheduler, exact_network(Prediction.flow))
    torch.testing.assert_close(ours(Prediction.flow, Sampler.ddim, steps), expected, rtol=0, atol=1e-4)


def test_exported_flow_scheduler_samples_the_same_distribution() -> None:
    scheduler = DPMSolverMultistepScheduler.from_config(
        Process(ProcessConfig(prediction=Prediction.flow)).scheduler_config()
    )
    scheduler.set_timesteps(50)
    expected = by_diffusers(scheduler, exact_network(Prediction.flow))
    torch.testing.assert_close(ours(Prediction.flow, Sampler.dpmpp_2m, 50), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("sampler", list(Sampler))
def test_samples_have_mean_and_std_of_the_data(sampler: Sampler, prediction: Prediction) -> None:
    noise = torch.randn(16, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    samples = ours(prediction, sampler, 100, noise)
    assert samples.mean() == pytest.approx(MEAN, abs=0.02)
    assert samples.std() == pytest.approx(STD, abs=0.02)


def closed_form(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """End of the probability-flow ODE from x at sigma, for data N(MEAN, STD^2)."""
    return MEAN + (x - MEAN) * STD / (STD**2 + sigma**2) ** 0.5


@pytest.mark.parametrize(("sample", "order"), [(sample_ddim, 1), (sample_dpmpp_2m, 2)])
def test_error_falls_with_the_order_of_the_solver(sample: Callable[..., torch.Tensor], order: int) -> None:
    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)

    def error(steps: int) -> float:
        start, end = 10.0, 0.05
        sigmas = torch.logspace(1, torch.tensor(end).log10().item(), steps + 1, dtype=torch.float64)
        x = start * NOISE.double()
        exact = MEAN + (x - MEAN) * ((STD**2 + end**2) / (STD**2 + start**2)) ** 0.5
        return float((sample(denoise, x, sigmas) - exact).abs().max())

    slope = torch.tensor([error(40) / error(80), error(80) / error(160)]).log2()
    assert ((slope - order).abs() < 0.25).all(), slope


@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("sampler", list(Sampler))
def test_more_steps_come_closer_to_the_exact_solution(sampler: Sampler, prediction: Prediction) -> None:
    process = Process(ProcessConfig(prediction=prediction))
    sigma = float(process.sigmas(10)[0])
    exact = closed_form(process.initial(NOISE, sigma), sigma)
    errors = [float((ours(prediction, sampler, steps) - exact).abs().max()) for steps in (5, 20, 100)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors


@pytest.mark.parametrize("sample", [sample_ddim, sample_dpmpp_2m])
def test_callback_sees_every_step(sample: Callable[..., torch.Tensor]) -> None:
    steps: list[int] = []
    guesses: list[torch.Tensor] = []

    def callback(step: int, x: torch.Tensor, x0: torch.Tensor) -> None:
        steps.append(step)
        guesses.append(x0)

    result = sample(lambda x, sigma: x / (1 + sigma), NOISE, torch.tensor([3.0, 1.0, 0.0]), callback)
    assert steps == [0, 1]
    assert torch.equal(guesses[-1], result)
