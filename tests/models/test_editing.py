"""Edits: one that changes nothing is plain sampling, bit for bit; every sampler, batch and guidance can edit."""

import re
import zlib

import pytest
import torch

from conf.errors import UserError
from conf.networks import AutoencoderConfig, UNetConfig
from conf.schema import ConditionsConfig, Edit, EditMode, Prediction, ProcessConfig, Sampler, SamplingConfig
from models.autoencoder import Autoencoder
from models.conditions import Conditions, Surroundings
from models.denoiser import Denoiser
from models.editing import Edited, edit_pictures
from models.pipeline import DiffusionPipeline
from models.process import Process
from models.unet import UNet

LENGTH, WIDTH = 12, 16
START, END = 1, 2
RED, BLUE, LONG = "a red monster on a hill", "a blue monster on a hill", "a sad red monster on a hill"


class SyllableText:
    """A text tower with start, end and padding, for which a word of more than four letters is several tokens.

    States depend on all tokens before, as those of CLIP.
    """

    text_width, context_length = WIDTH, LENGTH

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        rows = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            pieces = [piece for word in re.findall(r"\w+|[^\w\s]", text) for piece in re.findall(".{1,4}", word)]
            tokens = [3 + zlib.crc32(piece.encode()) % 1000 for piece in pieces[: LENGTH - 2]]
            row[: len(tokens) + 2] = torch.tensor([START, *tokens, END])
        return rows

    def text_states(self, tokens: torch.Tensor) -> torch.Tensor:
        waves = torch.sin((tokens.unsqueeze(-1) + 1) * torch.arange(1, WIDTH + 1))  # [B, L, D]
        return waves + waves.cumsum(1) / torch.arange(1, LENGTH + 1).view(-1, 1)


def build(prediction: Prediction = Prediction.flow) -> DiffusionPipeline:
    torch.manual_seed(0)
    cfg = UNetConfig(
        sample_size=8,
        block_out_channels=[16, 32],
        layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        cross_attention_dim=WIDTH,
        attention_head_dim=[2],
        norm_num_groups=8,
    )
    unet = UNet(cfg)
    with torch.no_grad():
        for parameter in unet.parameters():  # no layer that starts at zero may hide a dependence
            parameter.add_(0.1 * torch.randn_like(parameter))
    autoencoder = Autoencoder(
        AutoencoderConfig(
            block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False
        )
    )
    mean, std = torch.zeros(4), torch.ones(4)
    around = Surroundings.of(cfg, downscale=2, latent_mean=mean, latent_std=std)
    denoiser = Denoiser(unet.eval(), Conditions(ConditionsConfig(), around))
    process = Process(ProcessConfig(prediction=prediction))
    return DiffusionPipeline(denoiser, autoencoder.eval(), SyllableText(), process, mean, std)


MODEL = build()


def made(*edits: Edit, watch: bool = False, **options: object) -> list[Edited]:
    sampling = SamplingConfig(**{"steps": 4, **options})  # type: ignore[arg-type]
    return edit_pictures(MODEL, edits, [0] * len(edits), sampling, watch=watch)


def plain(prompts: list[str], noise_of: str = RED, **options: object) -> torch.Tensor:
    sampling = SamplingConfig(**{"steps": 4, **options})  # type: ignore[arg-type]
    return MODEL(prompts, [0] * len(prompts), sampling, noise_of=[noise_of] * len(prompts))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", list(Sampler))
def test_edit_without_a_change_is_plain_sampling(sampler: Sampler, guidance_scale: float) -> None:
    options = {"sampler": sampler, "guidance_scale": guidance_scale}
    expected = plain([RED, RED], **options)
    for edit in (Edit(prompt=RED), Edit(prompt=RED, edit=RED, mode=EditMode.refine, weights={"red": 1.0})):
        (edited,) = made(edit, **options)
        assert torch.equal(edited.source.image, expected[0])
        assert torch.equal(edited.result.image, expected[1])


@pytest.mark.parametrize("sampler", list(Sampler))
def test_edit_that_takes_nothing_is_the_sample_of_its_own_prompt(sampler: Sampler) -> None:
    for prompt in (BLUE, LONG):
        (edited,) = made(Edit(prompt=RED, edit=prompt, replace_until=0, self_until=0), sampler=sampler)
        expected = plain([RED, prompt], sampler=sampler)
        assert torch.equal(edited.source.image, expected[0])
        assert torch.equal(edited.result.image, expected[1])
        (kept,) = made(Edit(prompt=RED, edit=prompt), sampler=sampler)
        assert (kept.result.image - expected[1]).abs().max() > 1e-4


def test_word_that_is_not_there_is_named() -> None:
    with pytest.raises(
        UserError, match=r"^'green' is not in the prompt 'a red monster on a hill': choose among a, red"
    ):
        made(Edit(prompt=RED, weights={"green": 2.0}))
