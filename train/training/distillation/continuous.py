"""Continuous-time consistency distillation (sCM): neighbours on the path that are infinitely near.

Lu & Song 2024, "Simplifying, stabilizing and scaling continuous-time consistency models". Where two neighbours of
`consistency` meet, their distance becomes a slope: with f = x0 that the student F means, and the teacher's path,

    d f / d lambda,    lambda = log(std / alpha),

must be zero. Its step in F is the tangent g = (d f / d lambda) / std. For v this is the paper's g in TrigFlow, whose
angle is that of alpha = cos and std = sin (algorithm 1); a flow has the same paths in other variables:

    v       g = -alpha^2 (F - F_teacher) - r (alpha std x_t + dF / d lambda)
    flow    g = -alpha   (F - F_teacher) - r dF / d lambda

Of its stabilisers: the student's own slope dF is seen over a few hundredths of the path, not between the waves of its
time (`Process.slope`), and vanishes at both ends; its weight r grows from 0 to 1; g is normalised to g / (|g| + c),
c = 0.1, |g| per value of a latent. What is then squared has one size everywhere, so that the paper's learnt weight of
timesteps has nothing left to balance and is left out.
"""

from torch import Tensor

from conf.schema import Prediction
from models.diffusion.process import Process
from train.training.distillation.consistency import Lesson, Level, Predict

TANGENT = 0.1  # c
TINY = 1e-6  # at the ends of the path, where nothing changes


def continuous_loss(
    student: Predict,
    teacher: Predict,
    process: Process,
    level: Level,
    x0: Tensor,
    noise: Tensor,
    warmup: float,
    normalised: bool = True,
) -> Lesson:
    """Squared distance between the student's prediction and the one that its tangent leads to, mean over a latent.

    Args:
        student: in training; it is called for its slope first, without gradients.
        teacher: guided.
        level: of each sample.
        x0, noise: [B, C, h, w].
        warmup: r, in [0, 1].
        normalised: False: the squared tangent itself, which is 0 for a student that is consistent.
    """
    x_t = level.noisy(x0, noise)
    velocity = teacher(x_t, level.timesteps).to(x_t.dtype)
    pace = level.alpha * level.std  # of the angle, and of a flow's time, by lambda
    rate = process.pace(level.timesteps).view(level.std.shape).clamp(min=TINY)  # of timesteps
    turn = rate * process.slope(student, x_t, level.timesteps, pace / rate * velocity)
    prediction = student(x_t, level.timesteps).to(x_t.dtype)
    now = prediction.detach()
    flow = process.cfg.prediction is Prediction.flow
    drift = turn if flow else turn + pace * x_t
    g = -(level.alpha if flow else level.alpha**2) * (now - velocity) - warmup * drift
    if normalised:
        size = g.flatten(1).square().mean(1).sqrt().view(level.std.shape)
        g = g / (size + TANGENT)
    losses = (prediction - now - g).square().flatten(1).mean(1)
    return Lesson(losses, prediction, process.guess(prediction, x_t, level.alpha, level.std), level.timesteps)
