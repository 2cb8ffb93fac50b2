"""Noise levels that sampling stops at, against diffusers' schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from conf.errors import UserError
from conf.schema import Prediction, ProcessConfig, Spacing
from models.diffusion.process import Process

# diffusers 0.42 calls np.array(tensor), which numpy 2 finds fault with
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def process_of(prediction: Prediction, **options: object) -> Process:
    return Process(ProcessConfig(prediction=prediction, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 7, 20, 30, 1000])
@pytest.mark.parametrize("prediction", [Prediction.eps, Prediction.v])
def test_discrete_noise_levels_equal_diffusers_trailing_spacing(prediction: Prediction, steps: int) -> None:
    process = process_of(prediction)
    config = {
        k: v
        for k, v in process.scheduler_config().items()
        if k not in ("_class_name", "set_alpha_to_one", "clip_sample", "rescale_betas_zero_snr")
    }
    peer = DPMSolverMultistepScheduler(**config)
    peer.set_timesteps(steps)
    sigmas = process.sigmas(steps)
    torch.testing.assert_close(sigmas.float(), peer.sigmas, rtol=1e-5, atol=1e-6)
    timesteps = [process.timestep(sigma) for sigma in sigmas.tolist()[:-1]]
    torch.testing.assert_close(torch.tensor(timesteps), peer.timesteps.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 7, 20, 50])
@pytest.mark.parametrize("spacing", [Spacing.trailing, Spacing.leading, Spacing.linspace])
def test_timesteps_equal_those_of_diffusers_ddim(spacing: Spacing, steps: int) -> None:
    process = process_of(Prediction.eps)
    config = {k: v for k, v in process.scheduler_config().items() if k != "_class_name"}
    peer = DDIMScheduler(**config | {"timestep_spacing": spacing.value})
    peer.set_timesteps(steps)
    timesteps = [round(process.timestep(sigma), 3) for sigma in process.sigmas(steps, spacing).tolist()[:-1]]
    if (steps, spacing) == (1, Spacing.linspace):  # theirs is a single step at the first timestep
        assert timesteps == [999]
    else:
        assert timesteps == peer.timesteps.tolist()


@pytest.mark.parametrize("spacing", [Spacing.karras, Spacing.exponential])
@pytest.mark.parametrize("prediction", [Prediction.eps, Prediction.v])
def test_spaced_noise_levels_equal_diffusers(prediction: Prediction, spacing: Spacing) -> None:
    process = process_of(prediction)
    config = {k: v for k, v in process.scheduler_config().items() if k not in ("_class_name", "set_alpha_to_one")}
    del config["clip_sample"], config["rescale_betas_zero_snr"]
    peer = DPMSolverMultistepScheduler(**config | {f"use_{spacing.value}_sigmas": True})
    peer.set_timesteps(12)
    torch.testing.assert_close(process.sigmas(12, spacing).float(), peer.sigmas, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spacing", [spacing for spacing in Spacing if spacing is not Spacing.leading])
@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("prediction", list(Prediction))
def test_noise_levels_descend_to_zero(prediction: Prediction, steps: int, spacing: Spacing) -> None:
    process = process_of(prediction)
    sigmas = process.sigmas(steps, spacing)
    assert len(sigmas) == steps + 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert sigmas[0] == pytest.approx(float(process.sigmas(1)[0]))


@pytest.mark.parametrize("steps", [500, 999, 1000])
def test_leading_timesteps_stay_within_the_process(steps: int) -> None:
    assert (process_of(Prediction.eps).sigmas(steps, Spacing.leading).diff() < 0).all()


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_flow_shift_equals_diffusers(shift: float) -> None:
    peer = FlowMatchEulerDiscreteScheduler(shift=shift)
    t = process_of(Prediction.flow).sigmas(9)
    t = t / (1 + t)
    peer.set_timesteps(sigmas=t[:-1].tolist())
    for sigmas in (
        process_of(Prediction.flow).sigmas(9, shift=shift),
        process_of(Prediction.flow, shift=shift).sigmas(9),
    ):
        torch.testing.assert_close((sigmas / (1 + sigmas)).float(), peer.sigmas, rtol=0, atol=1e-6)


def test_shift_of_a_discrete_process_is_a_shift_of_its_noise_levels() -> None:
    plain, twice = process_of(Prediction.v), process_of(Prediction.v, shift=2.0)
    torch.testing.assert_close(twice.sigmas(1000), 2 * plain.sigmas(1000))
    with pytest.raises(UserError, match=r"^shift=2\.0: only for process\.prediction=flow; leave it at null$"):
        plain.sigmas(10, shift=2.0)


def test_flow_noise_levels_are_even_in_time_and_start_as_those_of_diffusers() -> None:
    process = process_of(Prediction.flow)
    sigmas = process.sigmas(4)
    timesteps = torch.tensor([process.timestep(sigma) for sigma in sigmas.tolist()])
    torch.testing.assert_close(timesteps, torch.tensor([999.0, 749.25, 499.5, 249.75, 0.0]))
    assert sigmas.isfinite().all()


def test_more_steps_than_timesteps_is_refused() -> None:
    with pytest.raises(UserError, match=r"steps=1001: must not exceed process\.train_timesteps=1000"):
        process_of(Prediction.eps).sigmas(1001)
    with pytest.raises(UserError, match=r"^spacing=leading: would end at a flow's last level, 0; choose"):
        process_of(Prediction.flow).sigmas(10, Spacing.leading)
