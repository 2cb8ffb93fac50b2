"""The process against diffusers' schedulers and the formulas of the papers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from conf.errors import UserError
from conf.schema import BetaSchedule, Prediction, ProcessConfig, TimestepSampling
from models.process import Network, Process

# diffusers 0.42 calls np.array(tensor), which numpy 2 finds fault with
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def process_of(prediction: Prediction, **options: object) -> Process:
    return Process(ProcessConfig(prediction=prediction, **options))  # type: ignore[arg-type]


def batch(samples: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, samples, 4, 3, 3, generator=generator)
    return x0, noise


def recording(inputs: list[torch.Tensor], answer: torch.Tensor) -> Network:
    """A network that keeps what it is given and answers as told."""

    def network(x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        inputs.extend([x_t, timesteps])
        return answer

    return network


@pytest.mark.parametrize("schedule", list(BetaSchedule))
def test_noising_and_velocity_equal_diffusers(schedule: BetaSchedule) -> None:
    process = process_of(Prediction.v, schedule=schedule)
    config = process.scheduler_config()
    peer = DDPMScheduler(
        **{key: config[key] for key in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")}
    )
    x0, noise = batch()
    timesteps = torch.tensor([0, 1, 250, 500, 998, 999])
    torch.testing.assert_close(
        process.add_noise(x0, noise, timesteps.float()), peer.add_noise(x0, noise, timesteps), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        process.target(x0, noise, timesteps.float()), peer.get_velocity(x0, noise, timesteps), rtol=0, atol=1e-5
    )


def test_flow_noising_equals_diffusers() -> None:
    process, peer = process_of(Prediction.flow), FlowMatchEulerDiscreteScheduler()
    x0, noise = batch()
    timesteps = peer.timesteps[[0, 1, 250, 500, 998, 999]]
    torch.testing.assert_close(process.add_noise(x0, noise, timesteps), peer.scale_noise(x0, timesteps, noise))
    torch.testing.assert_close(process.target(x0, noise, timesteps), noise - x0)


@pytest.mark.parametrize("prediction", list(Prediction))
def test_perfect_prediction_has_no_loss_and_denoises_exactly(prediction: Prediction) -> None:
    process = process_of(prediction)
    x0, noise = batch()
    timesteps = process.draw_timesteps(torch.tensor([0.01, 0.2, 0.5, 0.7, 0.9, 0.99]))
    target = process.target(x0, noise, timesteps)
    assert process.loss(target, x0, noise, timesteps).abs().max() == 0
    for i, sigma in enumerate([0.1, 1.0, 10.0]):
        timestep = torch.full((1,), process.timestep(sigma))
        alpha = 1 / (1 + sigma) if prediction is Prediction.flow else (1 + sigma**2) ** -0.5
        clean, unit = x0[i : i + 1], noise[i : i + 1]
        answer = {
            Prediction.eps: unit,
            Prediction.v: alpha * unit - alpha * sigma * clean,
            Prediction.flow: unit - clean,
        }[prediction]
        inputs: list[torch.Tensor] = []
        denoise = process.denoiser(recording(inputs, answer))
        torch.testing.assert_close(denoise(clean + sigma * unit, sigma), clean, rtol=0, atol=1e-5)
        torch.testing.assert_close(inputs[0], alpha * (clean + sigma * unit))
        torch.testing.assert_close(inputs[1], timestep)


@pytest.mark.parametrize("prediction", [Prediction.eps, Prediction.v])
def test_min_snr_weights_follow_the_formula(prediction: Prediction) -> None:
    process = process_of(prediction, min_snr_gamma=5.0)
    timesteps = torch.arange(0, 1000, 37)
    alphas_cumprod = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    snr = alphas_cumprod[timesteps] / (1 - alphas_cumprod[timesteps])
    expected = torch.minimum(snr, torch.tensor(5.0)) / (snr + (prediction is Prediction.v))
    torch.testing.assert_close(process.weight(timesteps.float()), expected, rtol=1e-4, atol=1e-7)
    x0, noise = batch(2)
    errors = process.loss(torch.zeros_like(x0), x0, noise, timesteps[:2].float())
    targets = process.target(x0, noise, timesteps[:2].float()).square().flatten(1).mean(1)
    torch.testing.assert_close(errors, expected[:2] * targets, rtol=1e-4, atol=1e-6)


def test_weights_are_one_without_gamma() -> None:
    for prediction in Prediction:
        assert process_of(prediction).weight(torch.tensor([1.0, 999.0])).tolist() == [1.0, 1.0]


def test_timesteps_are_a_pure_function_of_the_uniform_draw() -> None:
    u = torch.linspace(0, 1, 10_001)
    discrete = process_of(Prediction.eps).draw_timesteps(u)
    assert discrete.unique().tolist() == list(range(1000))  # every timestep, and u = 1 stays inside
    flow = process_of(Prediction.flow).draw_timesteps(u)
    torch.testing.assert_close(flow, 1000 * u)
    normal = process_of(Prediction.flow, timestep_sampling=TimestepSampling.logit_normal)
    inner = u[1:-1]
    drawn = normal.draw_timesteps(inner) / 1000
    torch.testing.assert_close(torch.special.ndtr(torch.logit(drawn.double())).float(), inner, rtol=0, atol=1e-5)
    assert normal.draw_timesteps(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0.0, 500.0, 1000.0]
    single = torch.cat([normal.draw_timesteps(value.view(1)) for value in inner[:5]])
    assert torch.equal(single, normal.draw_timesteps(inner[:5]))  # no sample depends on another


@pytest.mark.parametrize("steps", [1, 7, 20, 30, 1000])
@pytest.mark.parametrize("prediction", [Prediction.eps, Prediction.v])
def test_discrete_noise_levels_equal_diffusers_trailing_spacing(prediction: Prediction, steps: int) -> None:
    process = process_of(prediction)
    config = {
        k: v
        for k, v in process.scheduler_config().items()
        if k not in ("_class_name", "set_alpha_to_one", "clip_sample")
    }
    peer = DPMSolverMultistepScheduler(**config)
    peer.set_timesteps(steps)
    sigmas = process.sigmas(steps)
    torch.testing.assert_close(sigmas.float(), peer.sigmas, rtol=1e-5, atol=1e-6)
    timesteps = [process.timestep(sigma) for sigma in sigmas.tolist()[:-1]]
    torch.testing.assert_close(torch.tensor(timesteps), peer.timesteps.float(), rtol=0, atol=1e-6)


def test_flow_noise_levels_are_even_in_time_and_start_as_those_of_diffusers() -> None:
    process = process_of(Prediction.flow)
    sigmas = process.sigmas(4)
    timesteps = torch.tensor([process.timestep(sigma) for sigma in sigmas.tolist()])
    torch.testing.assert_close(timesteps, torch.tensor([999.0, 749.25, 499.5, 249.75, 0.0]))
    assert sigmas.isfinite().all()


@pytest.mark.parametrize("prediction", list(Prediction))
def test_first_network_input_is_unit_noise(prediction: Prediction) -> None:
    process = process_of(prediction)
    noise = batch()[1]
    sigma = float(process.sigmas(10)[0])
    inputs: list[torch.Tensor] = []
    process.denoiser(recording(inputs, noise))(process.initial(noise, sigma), sigma)
    torch.testing.assert_close(inputs[0], noise, rtol=2e-5, atol=0)


def test_timestep_between_two_levels_is_linear_in_log_sigma() -> None:
    process = process_of(Prediction.eps)
    first, second = process.sigmas(1000)[[499, 500]].tolist()  # timesteps 500 and 499
    assert process.timestep((first * second) ** 0.5) == pytest.approx(499.5, abs=1e-6)


def test_more_steps_than_timesteps_is_refused() -> None:
    with pytest.raises(UserError, match=r"steps=1001: must not exceed process\.train_timesteps=1000"):
        process_of(Prediction.eps).sigmas(1001)


def test_bfloat16_predictions_give_float32_losses() -> None:
    process = process_of(Prediction.flow)
    x0, noise = batch()
    assert process.loss(noise.bfloat16(), x0, noise, torch.full((6,), 500.0)).dtype == torch.float32


@pytest.mark.parametrize("prediction", list(Prediction))
def test_scheduler_config_names_a_scheduler_of_diffusers(prediction: Prediction) -> None:
    config = process_of(prediction).scheduler_config()
    kind = DPMSolverMultistepScheduler if prediction is Prediction.flow else DDIMScheduler
    assert config["_class_name"] == kind.__name__
    scheduler = kind.from_config(config)
    assert all(scheduler.config[key] == value for key, value in config.items() if key != "_class_name")
