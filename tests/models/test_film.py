"""What a film shows: the guesses of even steps, decoded as the image is, and the image at the end."""

import pytest
import torch
from torch import Tensor

from models.film import Film


class Doubled:
    """A model whose decoder multiplies by 2."""

    def decode(self, latents: Tensor) -> Tensor:
        assert len(latents) > 0
        return 2 * latents


def filmed(frames: int, steps: int, rows: list[int]) -> tuple[Film, Tensor]:
    """Film of a batch of four whose guess at a step is 10 · row + step, and whose images are -row."""
    film, batch = Film(frames, steps, rows), torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    for step in range(steps):
        film(step, torch.zeros(4, 3, 2, 2), 10 * batch + step)
    return film, film.frames(Doubled(), -batch)  # type: ignore[arg-type]


def test_frames_are_even_from_the_first_step_to_the_image() -> None:
    film, frames = filmed(4, 10, [3, 1])
    assert film.labels == ["step 1", "step 4", "step 7", "step 10"]
    assert frames.shape == (2, 4, 3, 2, 2)
    assert frames[:, :, 0, 0, 0].tolist() == [[60, 66, 72, -3], [20, 26, 32, -1]]


@pytest.mark.parametrize(("frames", "steps", "shown"), [(2, 20, [1, 20]), (9, 3, [1, 2, 3]), (5, 1, [1])])
def test_no_more_frames_than_steps(frames: int, steps: int, shown: list[int]) -> None:
    film, strip = filmed(frames, steps, [0])
    assert film.labels == [f"step {step}" for step in shown]
    assert strip.shape[:2] == (1, len(shown))
    assert float(strip[0, -1, 0, 0, 0]) == 0


def test_guesses_are_kept_apart_from_what_the_sampler_works_on() -> None:
    film, x0 = Film(2, 2, [0]), torch.ones(1, 3, 2, 2)
    film(0, x0, x0)
    x0.zero_()
    assert film.guesses[0].min() == 1
