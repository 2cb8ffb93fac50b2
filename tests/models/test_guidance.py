"""Classifier-free guidance: its formula and the number of calls."""

import pytest
import torch

from models.guidance import classifier_free


class Recorder:
    """A network whose answer shows its inputs."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x_t: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(x_t))
        return x_t * context.mean((1, 2)).view(-1, 1, 1, 1) + timesteps.view(-1, 1, 1, 1)


X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
T = torch.tensor([1.0, 2.0, 3.0])
COND, NULL = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1)), torch.ones(1, 5, 7)


def test_guidance_extrapolates_in_one_batched_call() -> None:
    network = Recorder()
    guided = classifier_free(network, COND, NULL, 3.0)(X, T)
    assert network.batches == [6]
    uncond, cond = Recorder()(X, T, NULL.expand(3, -1, -1)), Recorder()(X, T, COND)
    torch.testing.assert_close(guided, uncond + 3.0 * (cond - uncond))


def test_scale_one_is_a_single_conditional_call() -> None:
    network = Recorder()
    assert torch.equal(classifier_free(network, COND, NULL, 1.0)(X, T), Recorder()(X, T, COND))
    assert network.batches == [3]


def test_scale_zero_ignores_the_prompt() -> None:
    torch.testing.assert_close(
        classifier_free(Recorder(), COND, NULL, 0.0)(X, T), Recorder()(X, T, NULL.expand(3, -1, -1))
    )


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_texts_are_prepared_once_for_all_calls(scale: float) -> None:
    prepared: list[torch.Size] = []

    def prepare(context: torch.Tensor) -> torch.Tensor:
        prepared.append(context.shape)
        return 2 * context

    guided = classifier_free(Recorder(), COND, NULL, scale, prepare)
    assert torch.equal(guided(X, T), guided(X, T))
    assert len(prepared) == 1
    torch.testing.assert_close(guided(X, T), classifier_free(Recorder(), 2 * COND, 2 * NULL, scale)(X, T))
