"""Inversion: steps that are walked back lead to the image again, and guidance is kept from changing it."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from conf.errors import UserError
from conf.schema import Edit, InversionMethod, Prediction, Sampler, SamplingConfig
from models.diffusion.process import Process
from models.diffusion.samplers import Student
from models.editing.editing import edit_images
from models.editing.inversion import FIT_RATE, FIT_STEPS, invert, step, walk_back
from models.pipeline import DiffusionPipeline
from models.prompts import plain
from tiny_pipeline import worded_pipeline

MODEL = worded_pipeline()
RED, BLUE = "a red monster on a hill", "a blue monster on a hill"
GIVEN = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
DDIM = SamplingConfig(sampler=Sampler.ddim, steps=6)


def walked(model: DiffusionPipeline, sampling: SamplingConfig, path: list[torch.Tensor]) -> torch.Tensor:
    """Where DDIM gets to from the beginning of a path."""
    denoise, _ = model.denoiser_of([RED, BLUE], sampling)
    sigmas = model.process.sigmas(sampling.steps)
    x = path[0]
    for sigma, following in pairwise(sigmas.tolist()):
        x = step(x, denoise(x, sigma), sigma, following)
    return x


@torch.no_grad()
@pytest.mark.parametrize("prediction", [Prediction.flow, Prediction.v])
def test_steps_from_where_walking_back_gets_to_lead_to_the_image(prediction: Prediction) -> None:
    model = worded_pipeline(prediction)
    unguided = SamplingConfig(sampler=Sampler.ddim, steps=20, guidance_scale=1.0)
    x0, sigmas = model.encode(GIVEN), model.process.sigmas(20)
    denoise, _ = model.denoiser_of([RED, BLUE], unguided)
    missed = [
        (walked(model, unguided, walk_back(denoise, x0, sigmas, corrections)) - x0).abs().mean() / x0.abs().mean()
        for corrections in (1, 4, 16)
    ]
    assert missed[0] > 2 * missed[1] > 4 * missed[2] and missed[2] < 0.01


def test_one_correction_is_exact_for_normal_latents() -> None:
    """Of standard normal latents the guess is x / (1 + sigma^2), whose steps have the slope that is assumed."""
    process = Process(MODEL.process.cfg)
    sigmas, x0 = process.sigmas(8)[:-1], torch.randn(2, 4, 8, 8, dtype=torch.float64)
    path = walk_back(lambda x, sigma: x / (1 + sigma**2), x0, sigmas, corrections=1)
    expected = x0 * ((1 + sigmas[0] ** 2) / (1 + sigmas[-1] ** 2)) ** 0.5
    assert len(path) == 8
    for x, after, (sigma, following) in zip(path, path[1:], pairwise(sigmas.tolist()), strict=False):
        torch.testing.assert_close(step(x, x / (1 + sigma**2), sigma, following), after)
    assert (path[0] / expected).mean() == pytest.approx(1, abs=0.5)  # of the same scale


@torch.no_grad()
def test_guidance_changes_the_image_least_with_the_methods_that_undo_it() -> None:
    found = {}
    for method in InversionMethod:
        start = invert(MODEL, GIVEN, [RED, BLUE], DDIM, method)
        again = MODEL([RED, BLUE], [0, 0], DDIM, start=start)
        found[method] = (again - MODEL.decode(MODEL.encode(GIVEN))).abs().mean().item()
    assert found[InversionMethod.negative_prompt] < 0.1 * found[InversionMethod.ddim]
    assert found[InversionMethod.null_text] < 0.9 * found[InversionMethod.ddim]


@torch.no_grad()
def test_null_text_is_fitted_as_published() -> None:
    """Algorithm 1 of Mokady et al. 2023, in their variables: eps, z_t with alpha^2 + std^2 = 1, steps of DDIM."""
    model, scale = worded_pipeline(Prediction.eps), 3.0
    sampling = SamplingConfig(sampler=Sampler.ddim, steps=4, guidance_scale=scale)
    start = invert(model, GIVEN, [RED, BLUE], sampling, InversionMethod.null_text)
    denoise, _ = model.denoiser_of([RED, BLUE], SamplingConfig(steps=4, guidance_scale=1.0))
    levels = model.process.sigmas(4).tolist()
    path = walk_back(denoise, model.encode(GIVEN), model.process.sigmas(4))
    alphas = [1 / (1 + sigma**2) ** 0.5 for sigma in levels]
    stds = [sigma * alpha for sigma, alpha in zip(levels, alphas, strict=True)]
    text = model.states([plain(RED)[0], plain(BLUE)[0]])
    null = torch.nn.Parameter(model.states(plain("")).expand(2, -1, -1).clone())
    z = path[0] * alphas[0]

    def eps(z: torch.Tensor, states: torch.Tensor, number: int) -> torch.Tensor:
        time = torch.full((2,), model.process.timestep(levels[number]))
        return model.denoiser.predict(z, time, model.denoiser.conditions({"text": states}))

    def moved(z: torch.Tensor, number: int) -> torch.Tensor:
        both = [eps(z, states, number) for states in (null, text)]
        noise = both[0] + scale * (both[1] - both[0])
        z0 = (z - stds[number] * noise) / alphas[number]
        return alphas[number + 1] * z0 + stds[number + 1] * noise

    for number in range(4):
        optimizer = torch.optim.Adam([null], lr=FIT_RATE * (1 - number / 8))
        for _ in range(FIT_STEPS):
            optimizer.zero_grad()
            with torch.enable_grad():
                missed = moved(z, number) - alphas[number + 1] * path[number + 1]
                missed.square().mean((1, 2, 3)).sum().backward()
            optimizer.step()
        z = moved(z, number)
        torch.testing.assert_close(start.null_texts[number], null.data, rtol=0, atol=2e-4)


@pytest.mark.parametrize("inversion", list(InversionMethod))
def test_given_image_is_edited_in_any_batch(inversion: InversionMethod) -> None:
    edits = [
        Edit(prompt=RED, edit=BLUE, blend_change=True),
        Edit(prompt=RED, edit="a green monster on a hill"),
        Edit(prompt=BLUE, weights={"blue": 2.0}),
    ]
    given = GIVEN[[0, 0, 1]]
    together = edit_images(MODEL, edits, [0, 0, 0], DDIM, source_images=given, inversion=inversion)
    for edit, image, one in zip(edits, given, together, strict=True):
        (alone,) = edit_images(MODEL, [edit], [0], DDIM, source_images=image[None], inversion=inversion)
        assert torch.equal(one.source.image, image)
        assert one.reconstruction is not None and alone.reconstruction is not None
        torch.testing.assert_close(alone.reconstruction, one.reconstruction, rtol=0, atol=2e-3)
        torch.testing.assert_close(alone.result.image, one.result.image, rtol=0, atol=2e-3)
        assert (one.result.image - one.reconstruction).abs().max() > 1e-3
    assert together[0].source is together[1].source  # inverted once
    region = together[0].region
    assert region is not None and 0 < region.float().mean() < 1
    assert torch.equal(together[0].result.image[:, ~region], GIVEN[0][:, ~region])


def test_edit_without_a_change_is_the_image_drawn_again() -> None:
    (made,) = edit_images(MODEL, [Edit(prompt=RED)], [0], DDIM, source_images=GIVEN[:1])
    assert made.reconstruction is not None
    torch.testing.assert_close(made.result.image, made.reconstruction, rtol=0, atol=1e-4)
    (unguided,) = edit_images(
        MODEL,
        [Edit(prompt=RED)],
        [0],
        SamplingConfig(sampler=Sampler.ddim, guidance_scale=1.0),
        source_images=GIVEN[:1],
    )
    assert unguided.reconstruction is not None


def test_a_student_is_walked_back_along_its_own_path_or_not_at_all() -> None:
    student = worded_pipeline(time_cond_proj_dim=256)
    student.student = Student("guidance", [2.0, 4.0])
    sampling = SamplingConfig(sampler=Sampler.ddim, steps=6, guidance_scale=3.0)
    start = invert(student, GIVEN, [RED, BLUE], sampling, InversionMethod.ddim)
    denoise, _ = student.denoiser_of([RED, BLUE], sampling)  # told the scale that it is drawn with
    own = walk_back(denoise, student.encode(GIVEN), student.process.sigmas(6))
    torch.testing.assert_close(start.x, own[0])
    for method in (InversionMethod.negative_prompt, InversionMethod.null_text):
        with pytest.raises(UserError, match=r"^inversion=\w+: undoes guidance, which this network has inside; set inv"):
            invert(student, GIVEN, [RED, BLUE], sampling, method)
    student.student = Student("lcm", [2.0, 4.0])
    with pytest.raises(UserError, match=r"^this network is a student .* set unet= to its teacher"):
        invert(student, GIVEN, [RED, BLUE], sampling, InversionMethod.ddim)


@pytest.mark.parametrize(
    ("options", "method", "message"),
    [
        ({"sampler": Sampler.ddpm}, "ddim", "^sampler=ddpm: adds noise"),
        ({"sampler": Sampler.dpmpp_2m_sde}, "ddim", "^sampler=dpmpp_2m_sde: adds noise"),
        ({"sampler": Sampler.ddim, "eta": 0.5}, "ddim", "^sampler=ddim: adds noise"),
        ({}, "null_text", "^inversion=null_text: is fitted to the steps of sampler=ddim, not dpmpp_2m"),
        ({"size": [16, 32]}, "ddim", r"^has 16 x 16 pixels, .* where 16 x 32 are drawn"),
    ],
)
def test_what_cannot_be_walked_back_is_refused(options: dict[str, Any], method: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        invert(MODEL, GIVEN, [RED, BLUE], SamplingConfig(**options), InversionMethod(method))
