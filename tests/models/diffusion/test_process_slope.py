"""How fast a prediction changes along a path, of networks whose derivative is known."""

import pytest
import torch
from torch import Tensor

from conf.schema import Prediction, ProcessConfig
from models.diffusion.process import REACH, Process

T = 1000
FLOW = Process(ProcessConfig(prediction=Prediction.flow))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """x_t, timesteps and where x_t moves with each of them."""
    x, dx = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([250.0, 500.0, 800.0], dtype=torch.float64), dx / T


def shaped(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction", [Prediction.flow, Prediction.v])
def test_slope_is_the_derivative_of_what_is_smooth(prediction: Prediction) -> None:
    x, t, dx = inputs()
    found = Process(ProcessConfig(prediction=prediction)).slope(
        lambda x, t: x.sin() * (2 * shaped(t) / T).cos(), x, t, dx
    )
    time = 2 * shaped(t) / T
    derivative = x.cos() * dx * time.cos() - 2 / T * x.sin() * time.sin()
    torch.testing.assert_close(found, derivative, rtol=0, atol=1e-3 * float(derivative.abs().max()))


def test_ripples_of_the_time_s_waves_do_not_count() -> None:
    x, t, dx = inputs()
    found = FLOW.slope(lambda x, t: 0 * x + shaped(t) / T + 0.01 * shaped(t).sin(), x, t, dx)
    assert float((T * found - 1).abs().max()) < 0.6  # where the derivative goes from -9 to 11


@pytest.mark.parametrize(
    ("prediction", "timestep", "seen"),
    [
        (Prediction.flow, 990.0, (970.0, 1000.0)),
        (Prediction.v, 999.0, (979.0, 999.0)),
        (Prediction.flow, 5.0, (0.0, 25.0)),
    ],
)
def test_it_is_seen_between_timesteps_that_there_are(
    prediction: Prediction, timestep: float, seen: tuple[float, float]
) -> None:
    x, t, asked = torch.ones(1, 2), torch.tensor([timestep]), list[float]()

    def network(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        torch.testing.assert_close(x, 1 + (t - timestep) * torch.tensor([[1.0, 2.0]]) / T)
        return x * t

    found = Process(ProcessConfig(prediction=prediction)).slope(network, x, t, torch.tensor([[1.0, 2.0]]) / T)
    assert sorted(asked) == pytest.approx(seen)
    ends = [(1 + (end - timestep) * torch.tensor([[1.0, 2.0]]) / T) * end for end in seen]
    torch.testing.assert_close(found, (ends[1] - ends[0]) / (seen[1] - seen[0]))


def test_it_goes_no_further_back_than_it_may() -> None:
    asked = list[Tensor]()
    t, least = torch.tensor([500.0, 500.0, 500.0]), torch.tensor([500.0, 495.0, 100.0])
    FLOW.slope(lambda x, t: asked.append(t) or x, torch.zeros(3, 1), t, torch.zeros(3, 1), least=least)
    assert torch.equal(asked[1], torch.tensor([500.0, 495.0, 500.0 - REACH * T]))
    assert torch.equal(asked[0], t + REACH * T)


def test_it_leaves_no_gradients() -> None:
    weight, (x, t, dx) = torch.ones((), requires_grad=True), inputs()
    found = FLOW.slope(lambda x, t: (weight * x).half(), x, t, dx)
    assert not found.requires_grad and found.dtype == x.dtype
