"""An image on its way out of the noise: the guess x0 of the steps, decoded (Ho et al. 2020, figure 6)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.pipeline import DiffusionPipeline


class Film:
    """A callback for `DiffusionPipeline`: keeps the guesses of some steps, evenly chosen from the first to the last.

    Args:
        frames: how many, 2 or more; no more than there are steps.
        steps: of the sampler.
        rows: which images of the batch are filmed.
    """

    def __init__(self, frames: int, steps: int, rows: Sequence[int]) -> None:
        self.steps = sorted({round(frame * (steps - 1) / (frames - 1)) for frame in range(frames)})
        self.rows = list(rows)
        self.guesses: list[Tensor] = []  # latents [R, C, h, w] of all but the last of these steps

    def __call__(self, step: int, x: Tensor, x0: Tensor) -> None:
        if step in self.steps[:-1]:
            self.guesses.append(x0[self.rows])

    @property
    def labels(self) -> list[str]:
        """Title of each frame."""
        return [f"step {step + 1}" for step in self.steps]

    @torch.no_grad()
    def frames(self, model: DiffusionPipeline, images: Tensor) -> Tensor:
        """Images [R, F, 3, H, W] in [-1, 1], one step decoded at a time.

        The last frame is of `images` [B, 3, H, W], which most samplers end with the last guess itself.
        """
        decoded = [model.decode(guess) for guess in self.guesses]
        return torch.stack([*decoded, images[self.rows]], dim=1)
