"""Consistency distillation and training: a network that knows from each point of a path where the path ends.

Song et al. 2023, "Consistency models": f(x_t, t) is the same for all points of one path of the probability flow and
x0 at its end. Two neighbours of N + 1 noise levels, the noisier one first,

    x_t = alpha_t x0 + std_t noise,    x_s = one step of DDIM from x_t, with the teacher's guess of x0,
    loss = d(f(x_t, t, w), stopgrad f(x_s, s, w)),

where d is the pseudo-Huber distance (Song & Dhariwal 2023, section 3.2) and the target is the network itself, not an
average of it (section 3.1). The teacher's guess is guided by a scale w that the student is told (Luo et al. 2023,
"Latent consistency models", eq. 14); without a teacher x_s is of the same x0 and noise (eq. 10 of the first paper).
Here f is the guess of x0 that a prediction means: at the last level, without noise, it is x itself, as it must be.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from conf.schema import Spacing
from models.diffusion.process import Process

Predict = Callable[[Tensor, Tensor], Tensor]  # (x_t [B, ...], timesteps [B]) -> prediction [B, ...]


class Level(NamedTuple):
    """A noise level of each sample; alpha and std are shaped to multiply latents."""

    timesteps: Tensor  # [B]
    alpha: Tensor  # [B, 1, ...]
    std: Tensor

    def noisy(self, x0: Tensor, noise: Tensor) -> Tensor:
        """x_t [B, ...]."""
        return self.alpha * x0 + self.std * noise

    def step(self, x_t: Tensor, x0: Tensor, following: "Level") -> Tensor:
        """DDIM (Song et al. 2021, eq. 12 with eta = 0) from x_t with the guess x0 to the level that follows."""
        return following.noisy(x0, (x_t - self.alpha * x0) / self.std)


class Lesson(NamedTuple):
    """What a batch teaches."""

    losses: Tensor  # [B]
    prediction: Tensor  # of the student, [B, ...]
    guess: Tensor  # x0 that it means, [B, ...]
    timesteps: Tensor  # [B] at which it does


class Levels:
    """N + 1 noise levels from the noisiest to none, on the device.

    Args:
        steps: N.
    """

    def __init__(self, process: Process, steps: int, spacing: Spacing, shift: float | None) -> None:
        sigmas = process.sigmas(steps, spacing, shift).tolist()
        alphas = [process.alpha(sigma) for sigma in sigmas]
        timesteps = [process.timestep(sigma) if sigma > 0 else 0.0 for sigma in sigmas]
        stds = [sigma * alpha for sigma, alpha in zip(sigmas, alphas, strict=True)]
        self.steps, self.table = steps, torch.tensor([timesteps, alphas, stds])  # [3, N + 1]

    def to(self, device: torch.device) -> Self:
        """On a device."""
        self.table = self.table.to(device)
        return self

    def at(self, numbers: Tensor, like: Tensor) -> Level:
        """Levels of these numbers [B], shaped to multiply `like` [B, ...]."""
        timesteps, alpha, std = self.table[:, numbers]
        shape = (-1,) + (1,) * (like.ndim - 1)
        return Level(timesteps, alpha.view(shape), std.view(shape))

    def neighbours(self, u: Tensor, like: Tensor) -> tuple[Level, Level]:
        """A pair for each draw in [0, 1), u [B]: a level with noise, and the one that follows it."""
        numbers = (u * self.steps).long().clamp(max=self.steps - 1)  # in fp32 a draw below 1 may round to it
        return self.at(numbers, like), self.at(numbers + 1, like)


def consistency_loss(
    student: Predict,
    teacher: Predict | None,
    process: Process,
    levels: tuple[Level, Level],
    x0: Tensor,
    noise: Tensor,
    huber: float,
) -> Lesson:
    """Distance between what the student says of two neighbours on a path, mean over a latent.

    Args:
        student: in training; it is called for the target first, without gradients.
        teacher: guided; None: the path is that of x0 and noise.
        levels: of the two neighbours.
        x0, noise: [B, C, h, w].
        huber: c of the pseudo-Huber distance sqrt(d² + c²) - c.
    """
    now, following = levels
    x_t = now.noisy(x0, noise)

    with torch.no_grad():
        x_s = following.noisy(x0, noise)
        if teacher is not None:
            guess = process.guess(teacher(x_t, now.timesteps).to(x_t.dtype), x_t, now.alpha, now.std)
            x_s = now.step(x_t, guess, following)
        prediction = student(x_s, following.timesteps).to(x_s.dtype)
        ending = process.guess(prediction, x_s, following.alpha, following.std)
        target = torch.where(following.std > 0, ending, x_s)  # a prediction of x0 forgets its input
    prediction = student(x_t, now.timesteps).to(x_t.dtype)
    guess = process.guess(prediction, x_t, now.alpha, now.std)
    difference = guess - target
    # Without c the root has no gradient where nothing differs.
    distance = (difference.square() + huber**2).sqrt() - huber if huber > 0 else difference.abs()
    return Lesson(distance.flatten(1).mean(1), prediction, guess, now.timesteps)
