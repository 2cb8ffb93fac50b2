"""A pipeline of tiny networks with random weights, for tests of what is drawn."""

import re
import zlib
from typing import Any

import torch

from conf.schema import ConditionsConfig, Prediction, ProcessConfig, Sampler
from conf.schema.networks import AutoencoderConfig, UNetConfig
from models.autoencoder import Autoencoder
from models.conditions import ConditionContext, Conditions, Embedders
from models.denoiser import Denoiser
from models.diffusion.process import Process
from models.pipeline import DiffusionPipeline
from models.unet import UNet

WIDTH = 16  # of the text states
LENGTH = 12  # tokens of a text
START, END = 1, 2
SAMPLERS = [sampler for sampler in Sampler if sampler is not Sampler.mean_flow]  # of a network that is none


def tiny_pipeline(
    tower: Any,
    prediction: Prediction = Prediction.flow,
    *,
    perturbed: float = 0.1,
    mean: tuple[float, ...] = (0, 0, 0, 0),
    std: tuple[float, ...] = (1, 1, 1, 1),
    **unet: Any,
) -> DiffusionPipeline:
    """Images of 16 x 16 pixels from latents of 8 x 8, always of the same weights.

    Args:
        tower: for text states of WIDTH channels.
        perturbed: deviation of what is added to the weights of the U-Net: no layer that starts at zero may hide a
            dependence.
        unet: its blocks and their widths.
    """
    torch.manual_seed(0)
    network = UNet(
        UNetConfig(
            sample_size=8,
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=[2],
            norm_num_groups=8,
            **unet,
        )
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(perturbed * torch.randn_like(parameter))
    autoencoder = Autoencoder(
        AutoencoderConfig(
            block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False
        )
    )
    means, deviations = torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
    context = ConditionContext.of(network.cfg, downscale=2, latent_mean=means, latent_std=deviations)
    denoiser = Denoiser(network.eval(), Embedders(Conditions(ConditionsConfig()), context))
    process = Process(ProcessConfig(prediction=prediction))
    return DiffusionPipeline(denoiser, autoencoder.eval(), tower, process, means, deviations)


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


def worded_pipeline(prediction: Prediction = Prediction.flow, **options: Any) -> DiffusionPipeline:
    """`tiny_pipeline` with attention to text in all of its blocks."""
    return tiny_pipeline(
        SyllableText(),
        prediction,
        block_out_channels=[16, 32],
        down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        **options,
    )
