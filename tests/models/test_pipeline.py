"""Text to image: a picture belongs to (prompt, seed, index) and to nothing else."""

import hashlib

import pytest
import torch

from conf.errors import UserError
from conf.networks import AutoencoderConfig, UNetConfig
from conf.schema import Prediction, ProcessConfig, Sampler
from models.autoencoder import Autoencoder
from models.pipeline import TextToImage, picture_noise
from models.process import Process
from models.unet import UNet

LENGTH, WIDTH = 6, 16


class HashedText:
    """A text tower whose states are a digest of the caption."""

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        digests = [hashlib.sha256(caption.encode()).digest()[:LENGTH] for caption in captions]
        return torch.tensor([list(digest) for digest in digests])

    def text_states(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.sin(tokens.unsqueeze(-1) * torch.arange(1, WIDTH + 1))  # [B, L, D]


def build(prediction: Prediction = Prediction.flow) -> TextToImage:
    torch.manual_seed(0)
    unet = UNet(
        UNetConfig(
            sample_size=8,
            block_out_channels=[16, 32],
            layers_per_block=1,
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
            cross_attention_dim=WIDTH,
            attention_head_dim=[2],
            norm_num_groups=8,
        )
    )
    with torch.no_grad():
        for parameter in unet.parameters():  # no layer that starts at zero may hide a dependence
            parameter.add_(0.02 * torch.randn_like(parameter))
    autoencoder = Autoencoder(
        AutoencoderConfig(
            block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False
        )
    )
    mean, std = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 0.5, 3.0, 0.1])
    process = Process(ProcessConfig(prediction=prediction))
    return TextToImage(unet.eval(), autoencoder.eval(), HashedText(), process, mean, std)


PIPELINE = build()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", list(Sampler))
def test_picture_does_not_depend_on_its_batch(sampler: Sampler, guidance_scale: float) -> None:
    options = {"sampler": sampler, "steps": 4, "guidance_scale": guidance_scale}
    prompts, seeds, indices = ["a red planet", "a hill", "a red planet", "a monster"], [5, 5, 5, 6], [0, 0, 1, 0]
    together = PIPELINE(prompts, seeds, indices=indices, **options)  # type: ignore[arg-type]
    for position in (3, 0, 2):
        alone = PIPELINE(
            [prompts[position]],
            [seeds[position]],
            indices=[indices[position]],
            **options,  # type: ignore[arg-type]
        )
        torch.testing.assert_close(alone[0], together[position], rtol=0, atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.01  # another index, another picture


def test_pictures_are_in_range_and_of_the_right_size() -> None:
    images = PIPELINE(["a", "b"], [0, 0], steps=2)
    assert images.shape == (2, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1


@pytest.mark.parametrize("prediction", list(Prediction))
def test_prompt_and_guidance_change_the_picture(prediction: Prediction) -> None:
    pipeline = build(prediction)
    contexts = pipeline._contexts(["a red planet"], guided=True)
    assert torch.equal(contexts[1], pipeline.text_tower.text_states(pipeline.text_tower.tokenize([""])))
    plain, guided = (pipeline(["a red planet"], [0], steps=3, guidance_scale=scale) for scale in (1.0, 4.0))
    assert plain.isfinite().all()
    assert (plain - guided).abs().max() > 1e-3


def test_latents_are_denormalised_per_channel_before_decoding() -> None:
    latents = torch.randn(2, 4, 8, 8)
    mean, std = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 0.5, 3.0, 0.1])
    with torch.no_grad():
        expected = PIPELINE.autoencoder.decode(latents * std.view(1, 4, 1, 1) + mean.view(1, 4, 1, 1)).clamp(-1, 1)
        torch.testing.assert_close(PIPELINE.decode(latents), expected)


def test_noise_of_a_picture_is_fixed_for_all_time() -> None:
    noise = picture_noise("a red planet", 7, 0, (4, 16, 16))
    assert noise.mean() == pytest.approx(0, abs=0.1) and noise.std() == pytest.approx(1, abs=0.1)
    assert noise.ravel()[:3].tolist() == pytest.approx([0.5508155, 1.1311103, -0.8541543])
    others = [
        picture_noise("a red planet", 7, 1, (2,)),
        picture_noise("a red planet", 8, 0, (2,)),
        picture_noise("a", 7, 0, (2,)),
    ]
    assert all(abs(other[0] - noise.ravel()[0]) > 1e-6 for other in others)


def test_large_pictures_can_be_decoded_in_tiles() -> None:
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
        TextToImage(model.unet, model.autoencoder, model.text_tower, model.process, torch.zeros(4), torch.ones(4), 17)


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
        PIPELINE(["a", "b"], [0], steps=1)
