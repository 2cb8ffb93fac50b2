"""Samplers against diffusers' schedulers with the same network, noise and levels."""

import math
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from conf.schema import STOCHASTIC, Prediction, ProcessConfig, Sampler
from models.diffusion.process import Network, Process
from models.diffusion.samplers import SAMPLERS, sampler_of

# diffusers 0.42 calls numpy with tensors, which numpy 2 finds fault with
pytestmark = pytest.mark.filterwarnings("ignore:__array_(_ implementation|wrap__ must):DeprecationWarning")

MEAN, STD = 0.4, 0.6
NOISE = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(1))
FRESH = torch.randn(20, *NOISE.shape, generator=torch.Generator().manual_seed(2))  # noise of each step


def alpha_std(prediction: Prediction, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """At any timestep; between two of them log sigma is linear."""
    if prediction is Prediction.flow:
        return 1 - timesteps / 1000, timesteps / 1000
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    levels = scheduler.alphas_cumprod.double().numpy()
    log_sigma = torch.from_numpy(np.interp(timesteps.numpy(), np.arange(1000), np.log((1 - levels) / levels) / 2))
    alpha = 1 / (1 + (2 * log_sigma).exp()).sqrt()
    return alpha, log_sigma.exp() * alpha


def exact_network(prediction: Prediction) -> Network:
    """The best possible prediction for data N(MEAN, STD^2), in closed form."""

    def predict(x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        alpha, std = (level.view(-1, 1, 1, 1) for level in alpha_std(prediction, timesteps.double()))
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + std**2) * (x_t.double() - alpha * MEAN)
        noise = (x_t - alpha * x0) / std
        answer = {Prediction.eps: noise, Prediction.v: alpha * noise - std * x0, Prediction.flow: noise - x0}
        return (answer | {Prediction.x0: x0})[prediction].to(x_t.dtype)

    return predict


def ours(
    prediction: Prediction, sampler: Sampler, steps: int, noise: torch.Tensor = NOISE, eta: float | None = None
) -> torch.Tensor:
    process = Process(ProcessConfig(prediction=prediction))
    sigmas = process.sigmas(steps)
    x = process.initial(noise, float(sigmas[0]))
    sample = sampler_of(sampler, lambda step: FRESH[step], eta, process.fade)
    return sample(process.denoiser(exact_network(prediction)), x, sigmas, None)


def by_diffusers(scheduler: Any, network: Network, x: torch.Tensor = NOISE, **options: Any) -> torch.Tensor:
    for timestep in scheduler.timesteps:
        prediction = network(scheduler.scale_model_input(x, timestep), torch.full((len(x),), float(timestep)))
        x = scheduler.step(prediction, timestep, x, **options).prev_sample
    return x


MULTISTEP = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler")
VARIANCE_EXPLODING = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
)
# class in diffusers, its options, eta
PEERS: dict[Sampler, tuple[str, dict[str, Any], float | None]] = {
    Sampler.ddpm: ("DDPMScheduler", {}, None),
    Sampler.ddim: ("DDIMScheduler", {}, 0.0),
    Sampler.pndm: ("PNDMScheduler", {"skip_prk_steps": True}, None),
    Sampler.euler: ("EulerDiscreteScheduler", {}, None),
    Sampler.euler_ancestral: ("EulerAncestralDiscreteScheduler", {}, 1.0),
    Sampler.heun: ("HeunDiscreteScheduler", {}, None),
    Sampler.dpm2: ("KDPM2DiscreteScheduler", {}, None),
    Sampler.dpmpp_2s: ("DPMSolverSinglestepScheduler", {}, None),
    Sampler.dpmpp_2m: ("DPMSolverMultistepScheduler", {}, None),
    Sampler.dpmpp_2m_sde: ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 1.0),
    # without noise: the stochastic form of theirs has another sign at its last term than k-diffusion's; see below
    Sampler.dpmpp_3m_sde: (
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "solver_type": "heun", "lower_order_final": False},
        0.0,
    ),
    Sampler.unipc: ("UniPCMultistepScheduler", {}, None),
    Sampler.lcm: ("LCMScheduler", {}, None),
    Sampler.mean_flow: ("DDIMScheduler", {}, 0.0),
}
# Their schedulers know eps alone, or mean v over steps as if it were eps; any prediction of ours is the same denoiser.
ON_EPS = (Sampler.pndm, Sampler.euler_ancestral, Sampler.heun, Sampler.dpm2)


def with_middles(scheduler: Any, process: Process, steps: int) -> None:
    """Levels and timesteps of our 2S, whose steps are pairs of theirs."""
    sigmas = process.sigmas(steps)
    middles = (sigmas[:-2] * sigmas[1:-1]).sqrt()
    levels = torch.stack([sigmas[:-2], middles], dim=1).flatten().tolist() + sigmas[-2:].tolist()
    put_levels(scheduler, process, levels)
    scheduler.order_list = [1, 2] * (steps - 1) + [1]


def put_levels(scheduler: Any, process: Process, levels: list[float]) -> None:
    """Noise levels std / alpha, and the fractional timesteps that schedulers round off otherwise."""
    sigmas = torch.tensor(levels)
    scheduler.sigmas = sigmas / (1 + sigmas) if process.flow else sigmas
    scheduler.timesteps = torch.tensor([process.timestep(level) for level in levels[:-1]])
    scheduler.num_inference_steps = len(levels) - 1


def peer_of(sampler: Sampler, prediction: Prediction, steps: int) -> Any:
    process = Process(ProcessConfig(prediction=prediction))
    name, options, _ = PEERS[sampler]
    kind = getattr(diffusers, name)
    config = process.scheduler_config() | {"clip_sample": False} | options
    if process.flow:
        config |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    scheduler = kind.from_config({k: v for k, v in config.items() if k != "_class_name"})
    scheduler.set_timesteps(steps)
    if sampler is Sampler.dpmpp_2s:
        with_middles(scheduler, process, steps)
    elif process.flow:
        put_levels(scheduler, process, process.sigmas(steps).tolist())
    elif sampler is Sampler.lcm:  # which has a grid of its own
        scheduler.timesteps = torch.tensor([round(process.timestep(s)) for s in process.sigmas(steps)[:-1].tolist()])
    return scheduler


def start_of(scheduler: Any, steps: int) -> torch.Tensor:
    """What its sampling begins with so that the network's first input is NOISE."""
    sigma = float(Process(ProcessConfig()).sigmas(steps)[0])
    return NOISE * (1 + sigma**2) ** 0.5 if type(scheduler).__name__ in VARIANCE_EXPLODING else NOISE


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """`same_noise(scheduler)`: its n-th draw is our noise of step n."""

    def patch(scheduler: Any) -> None:
        draws = iter(FRESH)
        module = sys.modules[type(scheduler).__module__]
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", lambda *shape, **options: next(draws))

    return patch


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("prediction", [Prediction.eps, Prediction.v, Prediction.x0])
@pytest.mark.parametrize("sampler", [sampler for sampler in Sampler if sampler not in ON_EPS])
def test_discrete_sampling_equals_diffusers(
    sampler: Sampler, prediction: Prediction, steps: int, same_noise: Callable[[Any], None]
) -> None:
    scheduler = peer_of(sampler, prediction, steps)
    same_noise(scheduler)
    expected = by_diffusers(scheduler, exact_network(prediction), start_of(scheduler, steps))
    actual = ours(prediction, sampler, steps, eta=PEERS[sampler][2])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("sampler", ON_EPS)
def test_sampling_with_any_prediction_equals_diffusers_with_eps(
    sampler: Sampler, steps: int, same_noise: Callable[[Any], None]
) -> None:
    scheduler = peer_of(sampler, Prediction.eps, steps)
    same_noise(scheduler)
    expected = by_diffusers(scheduler, exact_network(Prediction.eps), start_of(scheduler, steps))
    for prediction in (Prediction.eps, Prediction.v, Prediction.x0):
        actual = ours(prediction, sampler, steps, eta=PEERS[sampler][2])
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [5, 20])
def test_ddim_with_some_noise_equals_diffusers(steps: int, same_noise: Callable[[Any], None]) -> None:
    scheduler = peer_of(Sampler.ddim, Prediction.v, steps)
    same_noise(scheduler)
    expected = by_diffusers(scheduler, exact_network(Prediction.v), eta=0.6)
    actual = ours(Prediction.v, Sampler.ddim, steps, eta=0.6)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert (actual - ours(Prediction.v, Sampler.ddim, steps)).abs().max() > 0.1


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("sampler", [sampler for sampler in Sampler if PEERS[sampler][0] in MULTISTEP])
def test_flow_sampling_equals_diffusers_solvers(
    sampler: Sampler, steps: int, same_noise: Callable[[Any], None]
) -> None:
    scheduler = peer_of(sampler, Prediction.flow, steps)
    same_noise(scheduler)
    expected = by_diffusers(scheduler, exact_network(Prediction.flow))
    actual = ours(Prediction.flow, sampler, steps, eta=PEERS[sampler][2])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("sampler", [Sampler.ddim, Sampler.euler])
def test_flow_sampling_equals_diffusers_euler(sampler: Sampler, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(0.999, 0.999 / steps, steps).tolist())
    expected = by_flow(scheduler)
    torch.testing.assert_close(ours(Prediction.flow, sampler, steps), expected, rtol=0, atol=1e-4)


def by_flow(scheduler: Any) -> torch.Tensor:
    x, network = NOISE, exact_network(Prediction.flow)
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, torch.full((len(x),), float(timestep))), timestep, x).prev_sample
    return x


def test_exported_flow_scheduler_samples_the_same_distribution() -> None:
    scheduler = DPMSolverMultistepScheduler.from_config(
        Process(ProcessConfig(prediction=Prediction.flow)).scheduler_config()
    )
    scheduler.set_timesteps(50)
    expected = by_diffusers(scheduler, exact_network(Prediction.flow))
    torch.testing.assert_close(ours(Prediction.flow, Sampler.dpmpp_2m, 50), expected, rtol=0, atol=0.02)


def test_third_order_sde_solver_follows_its_formula() -> None:
    """The update of k-diffusion in phi functions, for three guesses at uneven steps, with the noise of the SDE."""
    x, x0s, noise = NOISE.double(), FRESH[:4].double(), FRESH[4:8].double()
    sigmas = torch.tensor([9.0, 5.0, 2.0, 1.2, 0.5], dtype=torch.float64)
    eta, lambdas, guesses = 0.7, -sigmas.log(), iter(x0s)
    actual = sampler_of(Sampler.dpmpp_3m_sde, lambda step: noise[step], eta)(
        lambda x, sigma: next(guesses), x, sigmas, None
    )
    for i in range(4):
        h = float(lambdas[i + 1] - lambdas[i])
        z = h * (1 + eta)
        phi_1 = 1 - math.exp(-z)
        phi_2 = 1 - phi_1 / z
        phi_3 = phi_2 / z - 0.5
        x = math.exp(-z) * x + phi_1 * x0s[i]
        ratios = [float(lambdas[i - k] - lambdas[i - k - 1]) / h for k in range(min(i, 2))]
        slopes = [(x0s[i - k] - x0s[i - k - 1]) / ratio for k, ratio in enumerate(ratios)]
        if len(ratios) == 1:
            x = x + phi_2 * slopes[0]
        if len(ratios) == 2:
            bend = (slopes[0] - slopes[1]) / sum(ratios)
            x = x + phi_2 * (slopes[0] + ratios[0] * bend) - phi_3 * bend
        x = x + sigmas[i + 1] * math.sqrt(1 - math.exp(-2 * eta * h)) * noise[i]
    torch.testing.assert_close(actual, x)


@pytest.mark.parametrize("steps", [5, 20])
def test_heun_for_flow_equals_diffusers(steps: int) -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(steps)
    times = Process(ProcessConfig(prediction=Prediction.flow)).sigmas(steps)
    times = (times / (1 + times)).float()
    scheduler.sigmas = torch.cat([times[:1], times[1:-1].repeat_interleave(2), times[-1:]])
    scheduler.timesteps = 1000 * scheduler.sigmas[:-1]
    expected = by_flow(scheduler)
    torch.testing.assert_close(ours(Prediction.flow, Sampler.heun, steps), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_consistency_sampling_of_a_flow_equals_diffusers(steps: int, same_noise: Callable[[Any], None]) -> None:
    process, scheduler = Process(ProcessConfig(prediction=Prediction.flow)), diffusers.FlowMatchLCMScheduler()
    scheduler.set_timesteps(steps)
    put_levels(scheduler, process, process.sigmas(steps).tolist())
    same_noise(scheduler)
    expected = by_flow(scheduler)
    torch.testing.assert_close(ours(Prediction.flow, Sampler.lcm, steps), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", [Sampler.pndm, Sampler.dpm2])
def test_slopes_of_a_flow_are_its_velocity(sampler: Sampler) -> None:
    """The same formulas in x_t and t, where diffusers has no scheduler: Adams-Bashforth (Liu et al. 2022), midpoint."""
    network, steps = exact_network(Prediction.flow), 6
    times = torch.linspace(0.999, 0, steps + 1).tolist()

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        return network(x, torch.full((len(x),), 1000 * t))

    x, past = NOISE, list[torch.Tensor]()
    for i, (now, then) in enumerate(pairwise(times)):
        v = velocity(x, now)
        past.append(v)
        if sampler is Sampler.dpm2:
            middle = (now * then) ** 0.5
            v = velocity(x + (middle - now) * v, middle) if then > 0 else v
        elif i == 0:
            v = (v + velocity(x + (then - now) * v, then)) / 2
        elif i == 1:
            v = (3 * past[1] - past[0]) / 2
        elif i == 2:
            v = (23 * past[2] - 16 * past[1] + 5 * past[0]) / 12
        else:
            v = (55 * past[i] - 59 * past[i - 1] + 37 * past[i - 2] - 9 * past[i - 3]) / 24
        x = x + (then - now) * v
    torch.testing.assert_close(ours(Prediction.flow, sampler, steps), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", list(Sampler))
def test_callback_sees_every_step(sampler: Sampler) -> None:
    steps: list[int] = []
    guesses: list[torch.Tensor] = []

    def callback(step: int, x: torch.Tensor, x0: torch.Tensor) -> None:
        steps.append(step)
        guesses.append(x0)

    sigmas = torch.tensor([3.0, 1.0, 0.5, 0.0])
    sample = sampler_of(sampler, lambda step: FRESH[step])
    result = sample(lambda x, sigma: x / (1 + sigma), NOISE, sigmas, callback)
    assert steps == [0, 1, 2]
    if sampler is not Sampler.pndm:  # its last step still looks at the slopes before
        torch.testing.assert_close(result, guesses[-1])


@pytest.mark.parametrize("sampler", sorted(STOCHASTIC - {Sampler.ddim}, key=lambda sampler: sampler.value))
def test_noise_that_was_not_given_is_missed(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match="needs noise"):
        SAMPLERS[sampler](lambda x, sigma: x / (1 + sigma), NOISE, torch.tensor([3.0, 1.0, 0.0]))
