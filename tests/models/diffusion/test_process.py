"""The process against diffusers' schedulers and the formulas of the papers."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from conf.errors import UserError
from conf.schema import BetaSchedule, Distance, Prediction, ProcessConfig, TimestepSampling
from models.diffusion.process import Network, Process, read_scheduler
from models.diffusion.samplers import sample_ddim

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


NAMES = {
    BetaSchedule.linear: "linear",
    BetaSchedule.scaled_linear: "scaled_linear",
    BetaSchedule.cosine: "squaredcos_cap_v2",
    BetaSchedule.sigmoid: "sigmoid",
}


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("schedule", list(BetaSchedule))
def test_noising_and_velocity_equal_diffusers(schedule: BetaSchedule, zero_terminal_snr: bool) -> None:
    process = process_of(Prediction.v, schedule=schedule, zero_terminal_snr=zero_terminal_snr)
    peer = DDPMScheduler(
        beta_schedule=NAMES[schedule],
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    x0, noise = batch()
    timesteps = torch.tensor([0, 1, 250, 500, 998, 999])
    torch.testing.assert_close(
        process.add_noise(x0, noise, timesteps.float()), peer.add_noise(x0, noise, timesteps), rtol=0, atol=5e-5
    )
    torch.testing.assert_close(
        process.target(x0, noise, timesteps.float()), peer.get_velocity(x0, noise, timesteps), rtol=0, atol=5e-5
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
            Prediction.x0: clean,
            Prediction.flow: unit - clean,
        }[prediction]
        inputs: list[torch.Tensor] = []
        denoise = process.denoiser(recording(inputs, answer))
        torch.testing.assert_close(denoise(clean + sigma * unit, sigma), clean, rtol=0, atol=1e-5)
        torch.testing.assert_close(inputs[0], alpha * (clean + sigma * unit))
        torch.testing.assert_close(inputs[1], timestep)


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
@pytest.mark.parametrize("prediction", [Prediction.eps, Prediction.v, Prediction.x0])
def test_weights_follow_the_formulas_on_the_ratio_of_diffusers(prediction: Prediction, weighting: str) -> None:
    options = {"min_snr_gamma": 5.0} if weighting == "min_snr" else {"p2_gamma": 0.5, "p2_k": 2.0}
    process = process_of(prediction, **options)
    timesteps = torch.arange(0, 1000, 37)
    snr = compute_snr(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), timesteps)
    of_x0 = snr.clamp(max=5.0) if weighting == "min_snr" else snr / (2 + snr).sqrt()
    expected = of_x0 / {Prediction.eps: snr, Prediction.v: snr + 1, Prediction.x0: torch.ones_like(snr)}[prediction]
    torch.testing.assert_close(process.weight(timesteps.float()), expected, rtol=1e-4, atol=1e-7)
    x0, noise = batch(2)
    errors = process.loss(torch.zeros_like(x0), x0, noise, timesteps[:2].float())
    targets = process.target(x0, noise, timesteps[:2].float()).square().flatten(1).mean(1)
    torch.testing.assert_close(errors, expected[:2] * targets, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", ["min_snr_gamma", "p2_gamma"])
def test_weighted_losses_of_all_predictions_are_the_same_loss(weighting: str) -> None:
    """Of one and the same guess x0, whatever the network calls it."""
    x0, noise = batch()
    timesteps = torch.tensor([5.0, 100.0, 300.0, 500.0, 700.0, 950.0])
    guess = x0 + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    losses = []
    for prediction in (Prediction.eps, Prediction.v, Prediction.x0):
        process = process_of(prediction, **{weighting: 1.0})
        x_t = process.add_noise(x0, noise, timesteps).double()
        alpha, std = (level.double() for level in process.levels(timesteps, x0))
        told = (x_t - alpha * guess) / std  # the noise that belongs to the guess
        losses.append(process.loss(process.target(guess.double(), told, timesteps), x0.double(), noise, timesteps))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-3, atol=0)


@pytest.mark.parametrize("loss", list(Distance))
def test_losses_equal_those_of_torch(loss: Distance) -> None:
    process = process_of(Prediction.x0, loss=loss, huber_delta=0.5)
    x0, noise = batch()
    peers = {
        Distance.l2: torch.nn.functional.mse_loss,
        Distance.l1: torch.nn.functional.l1_loss,
        Distance.huber: partial(torch.nn.functional.huber_loss, delta=0.5),
    }
    actual = process.loss(noise, x0, noise, torch.full((6,), 500.0))
    expected = torch.stack([peers[loss](*pair) for pair in zip(noise, x0, strict=True)])
    torch.testing.assert_close(actual, expected)


def test_x0_prediction_is_what_diffusers_calls_sample() -> None:
    process = process_of(Prediction.x0)
    x0, noise = batch()
    assert torch.equal(process.target(x0, noise, torch.zeros(6)), x0)
    assert process.scheduler_config()["prediction_type"] == "sample"


def test_offset_noise_moves_whole_channels() -> None:
    process = process_of(Prediction.eps, offset_noise=0.1)
    _, noise = batch()
    offset = torch.randn(6, 4, 1, 1)
    moved = process.with_offset(noise, offset) - noise
    torch.testing.assert_close(moved, 0.1 * offset.expand_as(noise), rtol=0, atol=1e-6)


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


def test_shifted_timesteps_of_training_equal_diffusers() -> None:
    u = torch.linspace(1e-3, 1, 50)
    drawn = process_of(Prediction.flow, shift=3.0).draw_timesteps(u)
    peer = FlowMatchEulerDiscreteScheduler(shift=3.0)
    peer.set_timesteps(sigmas=u.tolist())
    torch.testing.assert_close(drawn / 1000, peer.sigmas[:-1], rtol=0, atol=1e-6)


def test_logit_normal_timesteps_are_distributed_as_those_of_diffusers() -> None:
    process = process_of(
        Prediction.flow, timestep_sampling=TimestepSampling.logit_normal, logit_mean=0.5, logit_std=0.8
    )
    peer = compute_density_for_timestep_sampling(
        "logit_normal", 20_000, logit_mean=0.5, logit_std=0.8, generator=torch.Generator().manual_seed(0)
    )
    at = torch.linspace(0.05, 0.95, 19)
    torch.testing.assert_close(process.draw_timesteps(at) / 1000, peer.quantile(at), rtol=0, atol=0.01)


def test_zero_terminal_snr_ends_in_noise_alone() -> None:
    process = process_of(Prediction.v, zero_terminal_snr=True, min_snr_gamma=5.0)
    x0, noise = batch()
    last = torch.full((6,), 999.0)
    assert torch.equal(process.add_noise(x0, noise, last), noise)
    assert torch.equal(process.target(x0, noise, last), -x0)
    assert process.weight(last).tolist() == [0.0] * 6
    assert process.sigmas(10).isfinite().all()
    assert process.timestep(float(process.sigmas(10)[0])) == 999


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": BetaSchedule.sigmoid},
        {"shift": 2.0},
        {"zero_terminal_snr": True},
        {"schedule": BetaSchedule.cosine, "shift": 0.5, "zero_terminal_snr": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("prediction", [Prediction.v, Prediction.x0])
def test_exported_scheduler_has_our_noise_levels_and_draws_our_images(
    prediction: Prediction, options: dict[str, object]
) -> None:
    process = process_of(prediction, **options)
    peer = DDIMScheduler.from_config(process.scheduler_config())
    x0, noise = batch()
    timesteps = torch.tensor([0, 1, 250, 500, 998, 999])
    expected = peer.add_noise(x0, noise, timesteps)
    torch.testing.assert_close(process.add_noise(x0, noise, timesteps.float()), expected, rtol=0, atol=1e-4)

    def network(x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x_t) * (1 - timesteps.view(-1, 1, 1, 1) / 2000)

    sigmas = process.sigmas(10)
    drawn = sample_ddim(process.denoiser(network), process.initial(noise, float(sigmas[0])), sigmas)
    peer.set_timesteps(10)
    x = noise
    for timestep in peer.timesteps:
        x = peer.step(network(x, torch.full((len(x),), float(timestep))), timestep, x).prev_sample
    torch.testing.assert_close(drawn, x, rtol=0, atol=1e-4)


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


@pytest.mark.parametrize("schedule", [BetaSchedule.linear, BetaSchedule.cosine])
@pytest.mark.parametrize("prediction", list(Prediction))
def test_process_comes_back_from_its_scheduler_config(
    prediction: Prediction, schedule: BetaSchedule, tmp_path: Path
) -> None:
    options = {"shift": 3.0} if prediction is Prediction.flow else {"schedule": schedule, "beta_start": 0.002}
    process = process_of(prediction, train_timesteps=500, **options)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(process.scheduler_config()))
    assert read_scheduler(tmp_path / "scheduler_config.json") == process.cfg


def test_process_of_others_has_their_defaults_and_what_is_unknown_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "PNDMScheduler"}))
    betas = DDIMScheduler().betas
    assert torch.allclose(Process(read_scheduler(path))._tables[0] ** 2, torch.cumprod(1 - betas, 0))
    strange = {"beta_schedule": "sigmoid", "prediction_type": "x", "trained_betas": [0.1], "sigma_data": 0.5}
    for name, value in strange.items():
        path.write_text(json.dumps({name: value}))
        with pytest.raises(UserError, match=name):
            read_scheduler(path)
