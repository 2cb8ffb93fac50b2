"""Continuous-time consistency distillation against its equations, and on data whose paths are known in closed form."""

import pytest
import torch
from mixture import Learner, drawn_data, errors, exact_velocity
from torch import Tensor

from conf.schema import Prediction, ProcessConfig
from models.diffusion.process import Process
from train.training.distillation.consistency import Level
from train.training.distillation.continuous import TANGENT, continuous_loss

PREDICTIONS = [Prediction.v, Prediction.flow]


def case_of(prediction: Prediction) -> tuple[Process, Level, Tensor, Tensor]:
    """A process, six samples at levels all over it, and their noise."""
    process, (x0, noise) = Process(ProcessConfig(prediction=prediction)), torch.randn(2, 6, 1, 2, 3)
    timesteps = torch.tensor([30.0, 120.0, 333.0, 500.0, 871.0, 970.0])
    return process, Level(timesteps, *process.levels(timesteps, x0)), x0, noise


def student(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(x + t.view(-1, 1, 1, 1) / 300)


def teacher(x: Tensor, t: Tensor) -> Tensor:
    return torch.cos(x - t.view(-1, 1, 1, 1) / 200)


def means(prediction: Prediction, output: Tensor, x: Tensor, alpha: Tensor, std: Tensor) -> Tensor:
    return x - std * output if prediction is Prediction.flow else alpha * x - std * output


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_tangent_is_the_slope_of_what_the_student_means(prediction: Prediction) -> None:
    """By the product rule, from a path along which noise / signal grows and the teacher's guess stays."""
    torch.manual_seed(0)
    process, level, x0, noise = case_of(prediction)
    alpha, std, t = level.alpha, level.std, level.timesteps
    x = alpha * x0 + std * noise
    guess = means(prediction, teacher(x, t), x, alpha, std)
    if prediction is Prediction.flow:
        dalpha, dstd, dt = -alpha * std, alpha * std, 1000 * (alpha * std).flatten()
    else:
        sigmas = torch.from_numpy(process._sigma)
        rows = t.long()
        dt = (2 / (sigmas[rows + 1] / sigmas[rows - 1]).log()).float()  # of a table, between its neighbours
        dalpha, dstd = -(std**2) * alpha, alpha**2 * std
    dx = dalpha * guess + dstd * (x - alpha * guess) / std
    output = student(x, t)
    turn = torch.cos(x + t.view(-1, 1, 1, 1) / 300) * (dx + dt.view(-1, 1, 1, 1) / 300)
    df = dx - dstd * output - std * turn
    if prediction is Prediction.v:
        df = dalpha * x + alpha * dx - dstd * output - std * turn
    g = df / std
    found = continuous_loss(student, teacher, process, level, x0, noise, 1.0, normalised=False)
    torch.testing.assert_close(found.losses, g.square().flatten(1).mean(1), rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(found.guess, means(prediction, output, x, alpha, std))
    size = g.square().flatten(1).mean(1).sqrt()
    found = continuous_loss(student, teacher, process, level, x0, noise, 1.0)
    torch.testing.assert_close(found.losses, (size / (size + TANGENT)).square(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("warmup", [0.0, 0.3])
def test_tangent_of_v_is_that_of_trigflow(warmup: float) -> None:
    """Lu & Song 2024, algorithm 1, with x and the networks in units of sigma_d = 1."""
    torch.manual_seed(0)
    process, level, x0, noise = case_of(Prediction.v)
    angle = torch.atan2(level.std, level.alpha)
    x = angle.cos() * x0 + angle.sin() * noise
    dx, output, both = teacher(x, level.timesteps), student(x, level.timesteps), angle.cos() * angle.sin()
    shift = process.pace(level.timesteps).view(-1, 1, 1, 1) / 300
    turn = torch.cos(x + level.timesteps.view(-1, 1, 1, 1) / 300) * (both * dx + shift)
    g = -(angle.cos() ** 2) * (output - dx) - warmup * (both * x + turn)
    found = continuous_loss(student, teacher, process, level, x0, noise, warmup, normalised=False)
    torch.testing.assert_close(found.losses, g.square().flatten(1).mean(1), rtol=1e-2, atol=1e-4)


def test_gradient_leads_to_the_tangent() -> None:
    torch.manual_seed(0)
    process, level, x0, noise = case_of(Prediction.flow)
    shift = torch.zeros((), requires_grad=True)

    def moved(x: Tensor, t: Tensor) -> Tensor:
        return student(x, t) + shift

    lesson = continuous_loss(moved, teacher, process, level, x0, noise, 1.0)
    lesson.losses.sum().backward()
    x = level.noisy(x0, noise)
    pace = level.alpha * level.std
    turn = torch.cos(x + level.timesteps.view(-1, 1, 1, 1) / 300)
    turn = turn * (pace * teacher(x, level.timesteps) + 1000 * pace / 300)
    g = -level.alpha * (student(x, level.timesteps) - teacher(x, level.timesteps)) - turn
    g = g / (g.square().flatten(1).mean(1).sqrt().view(-1, 1, 1, 1) + TANGENT)
    assert shift.grad is not None
    torch.testing.assert_close(shift.grad, -2 * g.flatten(1).mean(1).sum(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_consistent_student_has_no_tangent(prediction: Prediction) -> None:
    """Of normal data, whose paths end at x0 = X s / sqrt(s² + sigma²) with X = x_t / alpha."""
    s, (process, level, x0, noise) = 0.7, case_of(prediction)
    tables = torch.from_numpy(process._log_sigma).float()

    def levels(t: Tensor) -> tuple[Tensor, Tensor]:
        if prediction is Prediction.flow:
            std = (t / 1000).view(-1, 1, 1, 1)
            return 1 - std, std
        row = t.detach().long().clamp(1, 998)
        width = (tables[row + 1] - tables[row - 1]) / 2
        sigma = (tables[row] + (t - row) * width).exp().view(-1, 1, 1, 1)  # its slope there is the table's
        return 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()

    def predicts(x0: Tensor, x: Tensor, alpha: Tensor, std: Tensor) -> Tensor:
        return (x - x0) / std if prediction is Prediction.flow else (alpha * x - x0) / std

    def consistent(x: Tensor, t: Tensor) -> Tensor:
        alpha, std = levels(t)
        return predicts(x / alpha * s / (s**2 + (std / alpha) ** 2).sqrt(), x, alpha, std)

    def exact(x: Tensor, t: Tensor) -> Tensor:
        alpha, std = levels(t)
        return predicts(x / alpha * s**2 / (s**2 + (std / alpha) ** 2), x, alpha, std)

    found = continuous_loss(consistent, exact, process, level, s * x0, noise, 1.0, normalised=False)
    assert float(found.losses.max()) < 1e-5
    found = continuous_loss(exact, exact, process, level, s * x0, noise, 1.0, normalised=False)
    assert float(found.losses[1:-1].min()) > 1e-3  # the teacher itself is not consistent


def test_student_of_one_step_is_nearer_to_the_ends_of_the_paths_than_ddim_with_four() -> None:
    process, student = Process(ProcessConfig(prediction=Prediction.flow)), Learner()
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3000)
    for step in range(3000):
        x0, timesteps = drawn_data(256), 999 * torch.rand(256) + 0.5
        level = Level(timesteps, *process.levels(timesteps, x0))
        noise, warmup = torch.randn(256, 1), min(1.0, step / 1000)
        lesson = continuous_loss(student, exact_velocity, process, level, x0, noise, warmup)
        optimizer.zero_grad()
        lesson.losses.mean().backward()
        optimizer.step()
        scheduler.step()
    of_one, of_four = errors(process, student)
    assert of_one < 0.8 * of_four
