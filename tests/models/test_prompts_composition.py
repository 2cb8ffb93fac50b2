"""What predictions are composed of: which words are left out with which, and the weight of each text at each step."""

import pytest
import torch

from conf.errors import UserError
from conf.schema import Sampler, SamplingConfig, Weighting
from models.prompts import parse, terms_of
from tiny_pipeline import SAMPLERS, worded_pipeline

RED, PLAIN = "a red monster on a hill", "a monster on a hill"
MODEL = worded_pipeline()


def terms(text: str, steps: int = 4, scale: float = 1.0) -> list[tuple[str, list[float]]]:
    found = terms_of([parse(text)], steps, Weighting.difference)
    return [(term.prompt.text, [round(weight, 6) for weight in term.weights_at(scale)]) for term in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a (red:0) planet", "a planet"),
        ("a red planet with a (ring:0) and a moon on navy", "a red planet with a moon on navy"),
        ("a red planet with a ring and a (moon:0) on navy", "a red planet with a ring on navy"),
        ("a monster with two eyes and (horns:0) on navy", "a monster with two eyes on navy"),
        ("a monster with (two eyes:0) and horns on navy", "a monster with horns on navy"),
        ("a monster with (two eyes:0) and (horns:0) on navy", "a monster on navy"),
        ("a monster with (two eyes and horns:0) on navy", "a monster on navy"),
        ("plains under a (cyan:0) sky with a sun", "plains under a sky with a sun"),
        ("plains under a (cyan sky:0) with a sun", "plains with a sun"),
        ("plains under a cyan sky (with a sun:0)", "plains under a cyan sky"),
        ("plains under a cyan sky with a (sun:0)", "plains under a cyan sky"),
        ("a cat, (blue eyes:0), fluffy", "a cat, fluffy"),
        ("a cat, (blue eyes:0)", "a cat"),
        ("(masterpiece:0), a cat", "a cat"),
        ("(a cat:0)", ""),
        ("ein (rotes:0) Haus und ein (Baum:0)", "ein Haus und ein"),  # joints of other languages stay
    ],
)
def test_a_masked_phrase_is_left_out_with_what_joins_it(text: str, expected: str) -> None:
    assert terms(text) == [(expected, [1.0] * 4)]


def test_each_weight_costs_one_text_whose_shares_sum_to_one() -> None:
    assert terms("a [red] (planet:1.5) (with a ring:1.5) and a (moon:0)") == [
        ("a planet with a ring", [0.090909] * 4),
        ("a red", [-0.5, -0.5, 0.0, 0.0]),
        ("a red planet with a ring", [1.409091, 1.409091, 0.909091, 0.909091]),
    ]


def test_weights_hold_in_their_steps() -> None:
    assert terms("a (red:2@0.5) (planet:3@0.25-0.75)") == [
        ("a planet", [-1.0, -1.0, 0.0, 0.0]),
        ("a red", [0.0, -2.0, -2.0, 0.0]),
        ("a red planet", [2.0, 4.0, 3.0, 1.0]),
    ]
    assert terms("a (red:0@0.5) planet") == [("a planet", [1.0, 1.0, 0, 0]), ("a red planet", [0, 0, 1.0, 1.0])]


@pytest.mark.parametrize(("scale", "more"), [(0.0, 1.0), (1.0, 1.0), (4.0, 0.25)])
def test_guidance_does_not_multiply_what_a_word_weighs_above_one(scale: float, more: float) -> None:
    assert terms("a (red:2) (planet:0.5)", 1, scale) == [
        ("a planet", [-more]),
        ("a red", [0.5]),
        ("a red planet", [0.5 + more]),
    ]


def test_prompts_that_are_joined_have_weights_of_their_own() -> None:
    assert terms("a (red:2) cat AND a dog :0.5", steps=1) == [("a cat", [-1.0]), ("a red cat", [2.0]), ("a dog", [0.5])]


def test_tokens_have_one_weight_in_all_steps() -> None:
    (term,) = terms_of([parse("a (red:2) cat")], 2, Weighting.tokens)
    assert (term.prompt, term.weights_at(3.0)) == (parse("a (red:2) cat")[0], (1.0, 1.0))
    with pytest.raises(UserError, match=r"^'red' is weighted in some of the steps: that needs weighting=difference$"):
        terms_of([parse("a (red:2@0.5) cat")], 2, Weighting.tokens)


def drawn(*prompts: str, **options: object) -> torch.Tensor:
    sampling = SamplingConfig(**{"steps": 4, "prompt_syntax": True, **options})  # type: ignore[arg-type]
    return MODEL(prompts, [0] * len(prompts), sampling, noise_of=[RED] * len(prompts))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_weight_zero_is_the_image_without_the_word_and_one_that_of_the_prompt(
    sampler: Sampler, guidance_scale: float
) -> None:
    options = {"sampler": sampler, "guidance_scale": guidance_scale}
    masked, without, whole, written = drawn(
        "a (red:0) monster on a hill", PLAIN, "a (red:1) monster on a hill", RED, **options
    )
    assert torch.equal(masked, without) and torch.equal(whole, written)
    assert (masked - written).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("weight", "share", "options"),
    [
        (-1.0, -1.0, {}),
        (0.5, 0.5, {"guidance_scale": 1.0}),
        (0.5, 0.5, {"guidance_interval": [0.5, 1e6]}),
        (2.0, 2.0, {"guidance_scale": 1.0}),
        (2.0, 1.25, {"guidance_scale": 4.0}),
    ],
)
def test_weights_compose_the_difference_that_a_word_makes(
    weight: float, share: float, options: dict[str, object]
) -> None:
    """As Liu et al. 2022 compose the two prompts, in the same batch as images without weights."""
    composed = f"{RED} :{share} AND {PLAIN} :{1 - share}"
    together = drawn(PLAIN, f"a (red:{weight}@1) monster on a hill", RED, **options)
    torch.testing.assert_close(together[1], drawn(composed, **options)[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(together[::2], drawn(PLAIN, RED, **options), rtol=0, atol=1e-4)
    assert (together[1] - together[2]).abs().max() > 1e-4


def test_more_than_is_written_holds_in_the_first_half_by_itself() -> None:
    more, half, always, never = drawn(
        *(f"a (red:2{when}) monster on a hill" for when in ("", "@0.5", "@0-1", "@0.98-0.99"))
    )
    assert torch.equal(more, half)
    assert (half - always).abs().max() > 1e-4
    torch.testing.assert_close(never, drawn(RED)[0], rtol=0, atol=1e-4)


def test_images_keep_their_places_whatever_the_weights_of_others() -> None:
    """Also where a step has one text of weight 1 for each image, but not in the order of the images, or none at all."""
    prompts = [PLAIN, "a (red:0@0.5) monster on a hill", "a hill :0 AND a monster :0", RED]
    together = drawn(*prompts)
    for prompt, image in zip(prompts, together, strict=True):
        torch.testing.assert_close(drawn(prompt)[0], image, rtol=0, atol=1e-4)
    assert min((together[i] - together[j]).abs().max() for i in range(4) for j in range(i)) > 1e-4


def test_a_weighted_word_costs_one_prediction_more_and_only_in_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, original = list[int](), MODEL.denoiser.predict

    def predict(x_t: torch.Tensor, *of: object, **named: object) -> torch.Tensor:
        rows.append(len(x_t))
        return original(x_t, *of, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(MODEL.denoiser, "predict", predict)
    drawn("a (red:2@0.5) monster on a hill")
    drawn("a (red:0) monster on a (hill:0.5)", guidance_scale=1.0)
    assert rows == [3, 3, 2, 2, *[2] * 4]
