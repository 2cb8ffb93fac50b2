"""Guidance: its formulas, and the number of calls."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from models.conditions import Conditioning
from models.diffusion.guidance import Joined, classifier_free, within


class Recorder:
    """A network whose answer shows its inputs."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x_t: torch.Tensor, timesteps: torch.Tensor, given: Conditioning) -> torch.Tensor:
        self.batches.append(len(x_t))
        context = given.context
        assert isinstance(context, torch.Tensor)
        return x_t * context.mean((1, 2)).view(-1, 1, 1, 1) + timesteps.view(-1, 1, 1, 1)


X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
T = torch.tensor([1.0, 2.0, 3.0])
TEXT, EMPTY = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1)), torch.ones(3, 5, 7)
COND, NULL = Conditioning(TEXT), Conditioning(EMPTY)


def test_guidance_extrapolates_in_one_batched_call() -> None:
    network = Recorder()
    guided = classifier_free(network, COND, NULL, 3.0)(X, T)
    assert network.batches == [6]
    uncond, cond = Recorder()(X, T, NULL), Recorder()(X, T, COND)
    torch.testing.assert_close(guided, uncond + 3.0 * (cond - uncond))


def test_scale_one_is_a_single_conditional_call() -> None:
    network = Recorder()
    assert torch.equal(classifier_free(network, COND, NULL, 1.0)(X, T), Recorder()(X, T, COND))
    assert network.batches == [3]


def test_scale_zero_ignores_the_prompt() -> None:
    torch.testing.assert_close(classifier_free(Recorder(), COND, NULL, 0.0)(X, T), Recorder()(X, T, NULL))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_texts_are_prepared_once_for_all_calls(scale: float) -> None:
    prepared: list[torch.Size] = []

    def prepare(given: Conditioning) -> Conditioning:
        assert isinstance(given.context, torch.Tensor)
        prepared.append(given.context.shape)
        return Conditioning(2 * given.context)

    guided = classifier_free(Recorder(), COND, NULL, scale, prepare)
    assert torch.equal(guided(X, T), guided(X, T))
    assert len(prepared) == 1
    torch.testing.assert_close(
        guided(X, T), classifier_free(Recorder(), Conditioning(2 * TEXT), Conditioning(2 * EMPTY), scale)(X, T)
    )


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescaled_guidance_equals_diffusers(rescale: float) -> None:
    cond, plain = (classifier_free(Recorder(), COND, NULL, scale)(X, T) for scale in (1.0, 7.0))
    actual = classifier_free(Recorder(), COND, NULL, 7.0, rescale=rescale)(X, T)
    torch.testing.assert_close(actual, rescale_noise_cfg(plain, cond, rescale))
    if rescale == 1:
        torch.testing.assert_close(actual.std((1, 2, 3)), cond.std((1, 2, 3)))


def test_guidance_is_limited_to_its_interval() -> None:
    network = Recorder()
    inside, outside = (classifier_free(network, COND, NULL, scale) for scale in (3.0, 1.0))
    limited = within((200.0, 600.0), inside, outside)
    for timestep in (100.0, 200.0, 200.5, 600.0, 600.5):
        limited(X, torch.full((3,), timestep))
    assert network.batches == [3, 3, 6, 6, 3]
    t = torch.full((3,), 400.0)
    assert torch.equal(limited(X, t), inside(X, t))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_prompts_of_one_image_are_composed_with_their_weights(scale: float) -> None:
    """Liu et al. 2022, for an image of one prompt and one of two."""
    network = Recorder()
    joined = Joined(torch.tensor([0, 1, 1]), torch.tensor([1.0, 1.0, -0.5]))
    empty = Conditioning(EMPTY[:2])
    actual = classifier_free(network, COND, empty, scale, joined=joined)(X[:2], T[:2])
    assert network.batches == [5]
    uncond, first = (Recorder()(X[:2], T[:2], given) for given in (empty, Conditioning(TEXT[:2])))
    second = Recorder()(X[1:2], T[1:2], Conditioning(TEXT[2:]))
    torch.testing.assert_close(actual[0], uncond[0] + scale * (first[0] - uncond[0]))
    apart = (first[1] - uncond[1]) - 0.5 * (second[0] - uncond[1])
    torch.testing.assert_close(actual[1], uncond[1] + scale * apart)


def test_weights_whose_sum_is_one_need_no_prompt_that_is_dropped() -> None:
    network, joined = Recorder(), Joined(torch.tensor([0, 1, 1]), torch.tensor([1.0, 1.5, -0.5]))
    actual = classifier_free(network, COND, None, 1.0, joined=joined)(X[:2], T[:2])
    assert network.batches == [3]
    expected = classifier_free(network, COND, Conditioning(EMPTY[:2]), 1.0, joined=joined)(X[:2], T[:2])
    torch.testing.assert_close(actual, expected)
