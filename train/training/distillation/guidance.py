"""Distillation of guidance alone: one call of the student says what the guided teacher says in two.

Meng et al. 2023, "On distillation of guided diffusion models", stage one (eq. 3): the student F, told a scale w, learns

    F(x_t, t, w) = F_teacher(x_t, t, without) + w (F_teacher(x_t, t) - F_teacher(x_t, t, without)).

It stays a network for solvers with many steps, each at half the price.
"""

from torch import Tensor

from models.diffusion.process import Process
from train.training.distillation.consistency import Lesson, Level, Predict


def guidance_loss(
    student: Predict, teacher: Predict, process: Process, level: Level, x0: Tensor, noise: Tensor
) -> Lesson:
    """Squared distance between the predictions of student and guided teacher, mean over a latent; sizes as there."""
    x_t = level.noisy(x0, noise)
    prediction = student(x_t, level.timesteps).to(x_t.dtype)
    losses = (prediction - teacher(x_t, level.timesteps).to(x_t.dtype)).square().flatten(1).mean(1)
    return Lesson(losses, prediction, process.guess(prediction, x_t, level.alpha, level.std), level.timesteps)
