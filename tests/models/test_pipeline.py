"""Sampling: an image belongs to (prompt, seed, index) and to nothing else."""

import hashlib

import pytest
import torch

from conf.errors import UserError
from conf.schema import STOCHASTIC, Prediction, Sampler, SamplingConfig, Spacing
from models.pipeline import DiffusionPipeline, image_noise
from tiny_pipeline import SAMPLERS, WIDTH, tiny_pipeline

LENGTH = 6


class HashedText:
    """A text tower whose states are a digest of the caption."""

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        digests = [hashlib.sha256(caption.encode()).digest()[:LENGTH] for caption in captions]
        return torch.tensor([list(digest) for digest in digests])

    def text_states(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.sin(tokens.unsqueeze(-1) * torch.arange(1, WIDTH + 1))  # [B, L, D]


def build(prediction: Prediction = Prediction.flow) -> DiffusionPipeline:
    return tiny_pipeline(
        HashedText(),
        prediction,
        perturbed=0.02,
        mean=(0.5, -1.0, 0.0, 2.0),
        std=(1.0, 0.5, 3.0, 0.1),
        block_out_channels=[16, 32],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
    )


PIPELINE = build()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_does_not_depend_on_its_batch(sampler: Sampler, guidance_scale: float) -> None:
    sampling = SamplingConfig(sampler=sampler, steps=4, guidance_scale=guidance_scale)
    prompts, seeds, indices = ["a red planet", "a hill", "a red planet", "a monster"], [5, 5, 5, 6], [0, 0, 1, 0]
    together = PIPELINE(prompts, seeds, sampling, indices=indices)
    for position in (3, 0, 2):
        alone = PIPELINE([prompts[position]], [seeds[position]], sampling, indices=[indices[position]])
        torch.testing.assert_close(alone[0], together[position], rtol=0, atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.01  # another index, another image


def test_images_are_in_range_and_of_the_right_size() -> None:
    images = PIPELINE(["a", "b"], [0, 0], SamplingConfig(steps=2))
    assert images.shape == (2, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1


@pytest.mark.parametrize("prediction", list(Prediction))
def test_prompt_and_guidance_change_the_image(prediction: Prediction) -> None:
    pipeline = build(prediction)
    plain, guided, other = (
        pipeline([prompt], [0], SamplingConfig(steps=3, guidance_scale=scale))
        for prompt, scale in (("a red planet", 1.0), ("a red planet", 4.0), ("a hill", 1.0))
    )
    assert plain.isfinite().all()
    assert (plain - guided).abs().max() > 1e-3
    assert (plain - other).abs().max() > 1e-3


def drawn(prompt: str = "a red planet", **options: object) -> torch.Tensor:
    options = {"steps": 3, "guidance_scale": 4.0} | options
    return PIPELINE([prompt], [0], SamplingConfig(**options))[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_rescale": 0.7},
        {"guidance_interval": [0.3, 5.0]},
        {"negative_prompt": "a hill"},
        {"spacing": Spacing.karras},
        {"shift": 3.0},
        {"sampler": Sampler.ddim, "eta": 0.5},
    ],
    ids=str,
)
def test_every_option_changes_the_image(options: dict[str, object]) -> None:
    plain = drawn(sampler=options.get("sampler", Sampler.dpmpp_2m))
    assert (drawn(**options) - plain).abs().max() > 1e-4


def test_guidance_at_all_levels_is_guidance_without_interval() -> None:
    assert torch.equal(drawn(guidance_interval=[0.0, 1e6]), drawn())
    torch.testing.assert_close(drawn(guidance_interval=[1e5, 1e6]), drawn(guidance_scale=1.0))
    assert torch.equal(drawn(negative_prompt=""), drawn())


def test_prompts_are_plain_text_unless_their_syntax_is_asked_for() -> None:
    plain, read = (drawn("a (red:1.5) planet", prompt_syntax=syntax) for syntax in (False, True))
    assert (plain - read).abs().max() > 1e-3
    assert torch.equal(drawn("a red planet", prompt_syntax=True), drawn("a red planet"))


def test_prompts_of_one_image_do_not_disturb_the_others() -> None:
    sampling = SamplingConfig(steps=3, prompt_syntax=True)
    prompts = ["a hill", "a red planet AND a hill :0.5", "a moon"]
    together = PIPELINE(prompts, [0, 0, 0], sampling)
    for prompt, image in zip(prompts, together, strict=True):
        torch.testing.assert_close(PIPELINE([prompt], [0], sampling)[0], image, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match=r"^negative_prompt=a AND b: takes no AND"):
        drawn(negative_prompt="a AND b", prompt_syntax=True)


@pytest.mark.parametrize("sampler", sorted(STOCHASTIC - {Sampler.ddim}, key=lambda sampler: sampler.value))
def test_noise_of_the_steps_belongs_to_the_image(sampler: Sampler) -> None:
    """With the noise of other steps it would be another image; each step's is drawn once."""
    draws: list[int] = []
    model = build()
    original = model.noise
    model.noise = lambda *of, **named: (draws.append(of[-1]), original(*of, **named))[1]  # type: ignore[method-assign,func-returns-value]
    model(["a", "b"], [0, 0], SamplingConfig(sampler=sampler, steps=4))
    assert draws == [0, 1, 2, 3]  # the last step ends without noise


def test_latents_are_denormalised_per_channel_before_decoding() -> None:
    latents = torch.randn(2, 4, 8, 8)
    mean, std = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 0.5, 3.0, 0.1])
    with torch.no_grad():
        expected = PIPELINE.autoencoder.decode(latents * std.view(1, 4, 1, 1) + mean.view(1, 4, 1, 1)).clamp(-1, 1)
        torch.testing.assert_close(PIPELINE.decode(latents), expected)


def test_noise_of_a_image_is_fixed_for_all_time() -> None:
    noise = image_noise("a red planet", 7, 0, (4, 16, 16))
    assert noise.mean() == pytest.approx(0, abs=0.1) and noise.std() == pytest.approx(1, abs=0.1)
    assert noise.ravel()[:3].tolist() == pytest.approx([0.5508155, 1.1311103, -0.8541543])
    others = [
        image_noise("a red planet", 7, 1, (2,)),
        image_noise("a red planet", 8, 0, (2,)),
        image_noise("a", 7, 0, (2,)),
        image_noise("a red planet", 7, 0, (2,), draw=1),
        image_noise("a red planet", 7, 0, (2,), draw=2),
    ]
    assert all(abs(other[0] - noise.ravel()[0]) > 1e-6 for other in others)


def test_large_images_can_be_decoded_in_tiles() -> None:
    model = build()
    latents = torch.randn(2, 4, 16, 8)  # 32 x 16 pixels
    whole, seen = model.decode(latents), []
    model.autoencoder.decoder.register_forward_hook(lambda module, given, made: seen.append(tuple(made.shape)))
    model.tile = 16
    tiled = model.decode(latents)
    assert tiled.shape == whole.shape == (2, 3, 32, 16)
    assert set(seen) == {(1, 3, 16, 16)}
    assert (tiled - whole).abs().mean() < 0.5 * whole.std()
    with pytest.raises(UserError, match=r"tile=17.*multiple of 2"):
        DiffusionPipeline(
            model.denoiser, model.autoencoder, HashedText(), model.process, torch.zeros(4), torch.ones(4), 17
        )


def test_what_overflows_in_fp16_is_decoded_in_fp32() -> None:
    """As the autoencoder of Stable Diffusion XL: too large within, sound at the end."""
    model, latents = build(), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        model.autoencoder.decoder.conv_in.weight.mul_(1e6)  # the norms after it divide by as much
    expected = model.decode(latents)
    with torch.autocast("cpu", torch.float16):
        assert not model.autoencoder.decode(latents).isfinite().all()
        torch.testing.assert_close(model.decode(latents), expected)


def test_one_seed_per_prompt_is_required() -> None:
    with pytest.raises(ValueError, match="shorter"):
        PIPELINE(["a", "b"], [0], SamplingConfig(steps=1))
