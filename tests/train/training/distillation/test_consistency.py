"""Consistency distillation against its equations, and on data whose paths are known in closed form."""

import math

import pytest
import torch
from mixture import Learner, drawn_data, errors, exact_velocity
from torch import Tensor

from conf.schema import Prediction, ProcessConfig, Spacing
from models.diffusion.process import Process
from train.training.distillation.consistency import Level, Levels, consistency_loss

STEPS = 20
PREDICTIONS = [Prediction.eps, Prediction.v, Prediction.x0, Prediction.flow]


def levels_of(prediction: Prediction, steps: int = STEPS) -> tuple[Process, Levels]:
    process = Process(ProcessConfig(prediction=prediction))
    return process, Levels(process, steps, Spacing.trailing, None)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_levels_are_those_that_sampling_visits(prediction: Prediction) -> None:
    process, levels = levels_of(prediction)
    u, x0, noise = torch.tensor([0.0, 0.5, 0.999]), torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    now, following = levels.neighbours(u, x0)
    sigmas = process.sigmas(STEPS)
    torch.testing.assert_close((now.std / now.alpha).flatten().double(), sigmas[[0, 10, 19]], rtol=1e-5, atol=0)
    torch.testing.assert_close((following.std / following.alpha).flatten().double(), sigmas[[1, 11, 20]])
    torch.testing.assert_close(now.noisy(x0, noise), process.add_noise(x0, noise, now.timesteps), rtol=1e-4, atol=1e-4)
    assert now.timesteps.shape == (3,) and now.alpha.shape == (3, 1, 1)


def test_a_draw_that_rounds_to_one_is_of_the_last_pair() -> None:
    _, levels = levels_of(Prediction.flow)
    now, following = levels.neighbours(torch.tensor([1 - 2**-26, 0.999]), torch.zeros(2, 1))
    assert now.timesteps[0] == now.timesteps[1] and following.std[0] == 0


@pytest.mark.parametrize("huber", [0.0, 0.001])
def test_nothing_to_learn_has_no_gradient(huber: float) -> None:
    process, levels = levels_of(Prediction.x0)
    x0, noise = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    weight = torch.ones((), requires_grad=True)
    pair = levels.neighbours(torch.tensor([0.0, 0.3, 0.6, 0.9]), x0)
    lesson = consistency_loss(lambda x, t: x0 * weight, None, process, pair, x0, noise, huber)
    lesson.losses.sum().backward()
    assert lesson.losses.abs().max() == 0 or pair[1].std.min() == 0
    assert weight.grad is not None and weight.grad.isfinite()


@pytest.mark.parametrize("guided", [True, False], ids=["distillation", "training"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_is_that_of_the_equations(prediction: Prediction, guided: bool) -> None:
    """Each sample by itself, in floats, from the formulas of the three papers."""
    process, levels = levels_of(prediction)
    torch.manual_seed(0)
    x0, noise, u = torch.randn(6, 1, 2, 3), torch.randn(6, 1, 2, 3), torch.tensor([0.0, 0.23, 0.47, 0.72, 0.93, 0.999])

    def student(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x + t.view(-1, 1, 1, 1) / 300)

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        return torch.cos(x - t.view(-1, 1, 1, 1) / 200)

    def x0_of(answer: Tensor, x: Tensor, alpha: float, std: float) -> Tensor:
        match prediction:
            case Prediction.eps:
                return (x - std * answer) / alpha
            case Prediction.v:
                return alpha * x - std * answer
            case Prediction.flow:
                return x - std * answer
        return answer

    sigmas, c = process.sigmas(STEPS).tolist(), 0.1
    expected = []
    for row in range(6):
        number = math.floor(float(u[row]) * STEPS)
        (alpha, std, t), (alpha_s, std_s, s) = (
            (process.alpha(sigma), sigma * process.alpha(sigma), process.timestep(sigma) if sigma else 0.0)
            for sigma in sigmas[number : number + 2]
        )
        clean, noisy = x0[row : row + 1], alpha * x0[row : row + 1] + std * noise[row : row + 1]
        guess = x0_of(teacher(noisy, torch.tensor([t])), noisy, alpha, std) if guided else clean
        before = alpha_s * guess + std_s * (noisy - alpha * guess) / std
        target = x0_of(student(before, torch.tensor([s])), before, alpha_s, std_s) if std_s > 0 else before
        error = x0_of(student(noisy, torch.tensor([t])), noisy, alpha, std) - target
        expected.append(float(((error**2 + c**2).sqrt() - c).mean()))
    pair = levels.neighbours(u, x0)
    losses = consistency_loss(student, teacher if guided else None, process, pair, x0, noise, c).losses
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_no_gradient_goes_into_the_target() -> None:
    process, levels = levels_of(Prediction.flow)
    factor, x0, noise = torch.tensor(0.7, requires_grad=True), torch.randn(4, 1, 1, 1), torch.randn(4, 1, 1, 1)
    pair = levels.neighbours(torch.full((4,), 0.3), x0)
    consistency_loss(lambda x, t: factor * x, None, process, pair, x0, noise, 0.0).losses.sum().backward()
    now, following = pair
    x_t, x_s = now.noisy(x0, noise), following.noisy(x0, noise)
    sign = ((x_t - now.std * 0.7 * x_t) - (x_s - following.std * 0.7 * x_s)).sign()
    torch.testing.assert_close(factor.grad, (sign * -now.std * x_t).sum())


def test_student_of_one_step_is_nearer_to_the_ends_of_the_paths_than_ddim_with_four() -> None:
    process, levels = levels_of(Prediction.flow, steps=40)
    student = Learner()
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3000)
    for _ in range(3000):
        x0 = drawn_data(256)
        pair = levels.neighbours(torch.rand(256), x0)
        loss = consistency_loss(student, exact_velocity, process, pair, x0, torch.randn(256, 1), 0.001).losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    of_one, of_four = errors(process, student)
    assert of_one < 0.8 * of_four


def test_level_steps_along_a_straight_line() -> None:
    one, other = (
        Level(torch.tensor([900.0]), torch.tensor([[0.1]]), torch.tensor([[0.9]])),
        Level(torch.tensor([400.0]), torch.tensor([[0.6]]), torch.tensor([[0.4]])),
    )
    x0, noise = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    torch.testing.assert_close(one.step(one.noisy(x0, noise), x0, other), other.noisy(x0, noise))
