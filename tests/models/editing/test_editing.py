"""Edits: one that changes nothing is plain sampling, bit for bit; every sampler, batch and guidance can edit."""

import pytest
import torch

from conf.errors import UserError
from conf.schema import Edit, EditMode, Prediction, Sampler, SamplingConfig, Weighting
from models.editing.alignment import words_of
from models.editing.editing import (
    Edited,
    Editor,
    Rows,
    edit_images,
    factors,
    renewed,
    token_control,
    watch_images,
)
from models.pipeline import SamplingStart
from tiny_pipeline import LENGTH, SAMPLERS, SyllableText, worded_pipeline

RED, BLUE, LONG = "a red monster on a hill", "a blue monster on a hill", "a sad red monster on a hill"


MODEL = worded_pipeline()


def made(*edits: Edit, watch: bool = False, **options: object) -> list[Edited]:
    sampling = SamplingConfig(**{"steps": 3, **options})  # type: ignore[arg-type]
    return edit_images(MODEL, edits, [0] * len(edits), sampling, watch=watch)


def plain(prompts: list[str], noise_of: str = RED, **options: object) -> torch.Tensor:
    sampling = SamplingConfig(**{"steps": 3, **options})  # type: ignore[arg-type]
    return MODEL(prompts, [0] * len(prompts), sampling, noise_of=[noise_of] * len(prompts))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_edit_without_a_change_is_plain_sampling(sampler: Sampler, guidance_scale: float) -> None:
    options = {"sampler": sampler, "guidance_scale": guidance_scale}
    expected = plain([RED, RED], **options)
    for edit in (Edit(prompt=RED), Edit(prompt=RED, edit=RED, mode=EditMode.refine, weights={"red": 1.0})):
        (edited,) = made(edit, **options)
        assert torch.equal(edited.source.image, expected[0])
        assert torch.equal(edited.result.image, expected[1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_edit_that_takes_nothing_is_the_sample_of_its_own_prompt(sampler: Sampler) -> None:
    for prompt in (BLUE, LONG):
        (edited,) = made(Edit(prompt=RED, edit=prompt, replace_until=0, self_until=0), sampler=sampler)
        expected = plain([RED, prompt], sampler=sampler)
        assert torch.equal(edited.source.image, expected[0])
        assert torch.equal(edited.result.image, expected[1])
        (kept,) = made(Edit(prompt=RED, edit=prompt), sampler=sampler)
        assert (kept.result.image - expected[1]).abs().max() > 1e-4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_stays_the_source_outside_the_region(sampler: Sampler) -> None:
    """To the last bit; of attention to words, of disagreement, and of both."""
    both = {"blend": ["monster"], "blend_change": True}
    edits = [Edit(prompt=RED, edit=BLUE, **only) for only in ({"blend": ["monster"]}, {"blend_change": True}, both)]  # type: ignore[arg-type]
    for edited in made(*edits, sampler=sampler):
        assert edited.region is not None and 0 < edited.region.float().mean() < 1
        differs = (edited.result.image != edited.source.image).any(0)
        assert differs.any() and not (differs & ~edited.region).any()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_edits_in_one_batch_are_those_of_separate_runs(guidance_scale: float) -> None:
    edits = [
        Edit(prompt=RED, edit=BLUE, blend=["monster"]),
        Edit(prompt=RED, edit=LONG, until={"red": 0.3}),
        Edit(prompt=LONG, weights={"red": -1.0, "sad": 0.0}),
        Edit(prompt=RED, weights={"a#2": 2.0}, self_until=1.0),
    ]
    options = {"sampler": Sampler.dpmpp_2m_sde, "guidance_scale": guidance_scale}
    together = made(*edits, watch=True, **options)
    for edit, one in zip(edits, together, strict=True):
        (alone,) = made(edit, watch=True, **options)
        for first, second in ((alone.source, one.source), (alone.result, one.result)):
            torch.testing.assert_close(first.image, second.image, rtol=0, atol=1e-4)
            assert first.maps.keys() == second.maps.keys()
            for word in first.maps:
                torch.testing.assert_close(first.maps[word], second.maps[word], rtol=0, atol=1e-4)
    assert together[0].source is together[1].source  # drawn once


@pytest.mark.parametrize("prediction", list(Prediction))
def test_every_process_can_be_edited(prediction: Prediction) -> None:
    sampling = SamplingConfig(steps=2, guidance_interval=[0.5, 1e6])  # the last call has no rows of guidance
    (edited,) = edit_images(
        worded_pipeline(prediction), [Edit(prompt=RED, edit=BLUE, until={"blue": 0.5})], [0], sampling
    )
    assert edited.result.image.isfinite().all()
    assert (edited.result.image - edited.source.image).abs().max() > 1e-4


def test_masked_word_has_no_say_and_masked_padding_changes_nothing() -> None:
    words = words_of(SyllableText(), RED)
    padding = dict.fromkeys([0, *range(words.end, LENGTH)], 0.0)
    assert torch.equal(factors(words, padding), torch.ones(LENGTH))
    every = dict.fromkeys(words.words, 0.0)
    masked = token_control(Edit(prompt=RED, weights=every), 0, words, words, Weighting.tokens).weights
    assert masked.tolist() == [0.0 if words.start <= token < words.end else 1.0 for token in range(LENGTH)]
    (edited,) = made(Edit(prompt=RED, weights={"monster": 0.0}), weighting=Weighting.tokens)
    assert (edited.result.image - plain([RED])[0]).abs().max() > 1e-4


def test_a_word_of_weight_zero_is_the_edit_that_leaves_it_out() -> None:
    left_out = Edit(prompt=LONG, edit=RED, replace_until=0, self_until=0)
    masked, edited = made(Edit(prompt=LONG, weights={"sad": 0}), left_out, watch=True)
    assert torch.equal(masked.result.image, edited.result.image)
    assert masked.result.maps.keys() == edited.result.maps.keys()


def test_weights_alone_take_no_attention_and_act_as_in_a_prompt() -> None:
    weighted = {"weights": {"red": 2.0}}
    windows = ({}, {"red": (0.0, 1.0)})
    during, always = made(*(Edit(prompt=RED, **weighted, during=window) for window in windows))  # type: ignore[arg-type]
    for edited, text in ((during, "a (red:2@0.5) monster on a hill"), (always, "a (red:2@1) monster on a hill")):
        expected = plain([text], prompt_syntax=True)[0]
        torch.testing.assert_close(edited.result.image, expected, rtol=0, atol=1e-4)


def test_a_word_that_is_masked_in_some_steps_keeps_the_rows_in_their_places() -> None:
    window = {"weights": {"red": 0.0}, "during": {"red": (0.0, 0.5)}}
    edits = [Edit(prompt=RED, **window), Edit(prompt=LONG, edit=BLUE, mode=EditMode.refine)]  # type: ignore[arg-type]
    for edit, one in zip(edits, made(*edits, watch=True), strict=True):
        torch.testing.assert_close(made(edit)[0].result.image, one.result.image, rtol=0, atol=1e-4)
    expected = plain(["a (red:0@0.5) monster on a hill"], prompt_syntax=True)[0]
    torch.testing.assert_close(made(edits[0])[0].result.image, expected, rtol=0, atol=1e-4)


def test_new_noise_is_of_the_edit_alone_and_has_the_variance_of_noise() -> None:
    old, some, all_new = made(*(Edit(prompt=RED, edit=BLUE, new_noise=share) for share in (0.0, 0.5, 1.0)))
    assert torch.equal(old.source.image, some.source.image) and torch.equal(old.source.image, all_new.source.image)
    torch.testing.assert_close(old.result.image, made(Edit(prompt=RED, edit=BLUE))[0].result.image, rtol=0, atol=1e-4)
    nearer, farther = ((edited.result.image - old.result.image).abs().mean() for edited in (some, all_new))
    assert 1e-3 < nearer < farther
    start = SamplingStart(torch.randn(3, 4, 64, 64))
    mixed = renewed(start, torch.randn(3, 4, 64, 64), [0.0, 0.3, 1.0]).x
    assert torch.equal(mixed[0], start.x[0])
    torch.testing.assert_close(mixed.std((1, 2, 3)), torch.ones(3), rtol=0, atol=0.03)


def test_heat_maps_are_the_mean_attention_of_words() -> None:
    """Of one step and layer those that the network computed, summed over a word's tokens; in all no more than 1."""
    seen: dict[str, torch.Tensor] = {}
    sampling, words = SamplingConfig(steps=1, guidance_scale=1.0), words_of(SyllableText(), RED)
    original = Editor.attention

    class Spy(Editor):
        def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *of: object) -> torch.Tensor:
            if of[1]:
                seen[str(of[0])] = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)[0]  # [N, L]
            return original(self, q, k, v, *of)  # type: ignore[arg-type]

    spy = Spy(Rows([words], {}, Weighting.difference), True, torch.device("cpu"))
    image = MODEL([RED], [0], sampling, control=spy)
    assert spy.maps is not None and len(seen) == 7
    for name, maps in seen.items():
        side = round(len(maps) ** 0.5)
        for word in ("red", "monster", "a#2"):
            expected = maps[:, words.find(word if "#" in word else f"{word}#1")].sum(1).unflatten(0, (side, side))
            torch.testing.assert_close(spy.maps.of(0, word, (side, side), name), expected)
    (drawn,) = watch_images(MODEL, [RED], [0], sampling)
    assert torch.equal(drawn.image, image[0])
    assert list(drawn.maps) == ["a#1", "red", "monster", "on", "a#2", "hill"]
    assert all(heat.shape == (16, 16) and (heat >= 0).all() for heat in drawn.maps.values())
    assert torch.stack(list(drawn.maps.values())).sum(0).max() <= 1 + 1e-5


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"weights": {"green": 2.0}}, r"^'green' is not in the prompt 'a red monster on a hill': choose among a, red"),
        ({"edit": BLUE, "blend": ["tree"]}, r"^'tree' is not in the prompt 'a blue monster on a hill'"),
        ({"edit": "a hill", "mode": EditMode.replace}, r"^mode=replace: .* has 6 words and 'a hill' 2; write as many"),
        (
            {"edit": "one two three four five six seven eight nine"},
            r"tokens of the text encoder, .* 'eight nine'",
        ),
    ],
)
def test_edit_that_cannot_be_is_refused_in_one_line(edit: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        made(Edit(prompt=RED, **edit))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_network_without_words_is_refused() -> None:
    model = worded_pipeline()
    model.text_tower = None
    with pytest.raises(UserError, match=r"^this network was trained without conditions\.caption"):
        edit_images(model, [Edit(prompt=RED)], [0])
    with pytest.raises(UserError, match=r"^during=red: weights of some steps need weighting=difference$"):
        made(Edit(prompt=RED, weights={"red": 2.0}, during={"red": (0.0, 0.5)}), weighting=Weighting.tokens)
    with pytest.raises(UserError, match=r"^the prompt of a given image says what it shows: write weights of words in"):
        sampling = SamplingConfig(steps=2, prompt_syntax=True)
        edit_images(MODEL, [Edit(prompt="(a red monster:2)")], [0], sampling, source_images=torch.zeros(1, 3, 16, 16))
    with pytest.raises(UserError, match=r"an edit takes no AND"):
        made(Edit(prompt="a AND b"), prompt_syntax=True)
