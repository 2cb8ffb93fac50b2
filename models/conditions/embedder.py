"""Conditions inside the network: modules that make tokens, channels or a vector of the arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema.networks import UNetConfig
from models.attention import Context
from models.conditions.base import Inputs
from models.unet import timestep_embedding

WAVES = 256  # channels of the embedding of a number


class Conditioning(NamedTuple):
    """Inputs of the U-Net beside the noisy latent and the time."""

    context: Context | None = None  # tokens [B, L, D]
    channels: Tensor | None = None  # [B, K, h, w], concatenated to the latent
    vector: Tensor | None = None  # [B, E], added to the time's embedding
    guidance: Tensor | None = None  # [B], what `UNet` is told by this name: a scale, or the length of a step

    def followed_by(self, other: "Conditioning") -> "Conditioning":
        """These rows, then the other's, in one batch; before tokens became keys and values."""

        def both(mine: Any, theirs: Any) -> Any:
            return None if mine is None else torch.cat([mine, theirs])

        return Conditioning(*map(both, self, other))

    def select(self, rows: Tensor) -> "Conditioning":
        """Some rows [R], in this order; before tokens became keys and values."""

        def chosen(own: Any) -> Any:
            return None if own is None else own[rows]

        return Conditioning(*map(chosen, self))


class ConditionRng(Protocol):
    """Random numbers that belong to the samples of a batch."""

    def uniform(self, purpose: str) -> Tensor:
        """[B] in [0, 1)."""

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal [B, *shape]."""


@dataclass(frozen=True, slots=True)
class ConditionContext:
    """Sizes and statistics of the network and its data, which embedders are built for."""

    width: int | None  # D; None: the U-Net takes no tokens
    embedding: int  # E
    downscale: int  # H / h
    latent_mean: Tensor  # [C]
    latent_std: Tensor  # [C]
    null_text: Tensor | None = None  # text states [L, D] of the empty caption; None: the pipeline brings others

    @classmethod
    def of(cls, model: UNetConfig, **known: Any) -> Self:
        """Sizes of a U-Net; `known` are the other fields."""
        return cls(width=model.cross_attention_dim, embedding=4 * model.block_out_channels[0], **known)


class Embedder(nn.Module):
    """The part of a network that one condition's arrays go through.

    Args:
        cfg: the condition's section of `conf.schema.conditions`.
        context: the network that it is a part of.
    """

    tokens = 0  # L, that it gives
    channels = 0  # K, that it puts beside the latent

    def __init__(self, cfg: Any, context: ConditionContext) -> None:
        super().__init__()
        self.cfg = cfg

    def null(self, inputs: Inputs) -> Inputs:
        """The arrays that stand for "no condition", of the same shapes: what guidance leads away from."""
        return {}

    def vary(self, inputs: Inputs, draws: ConditionRng) -> Inputs:
        """Arrays that training changes at random, such as by noise."""
        return {}

    def forward(self, inputs: Inputs) -> Conditioning:
        """Tokens, channels or a vector of the arrays."""
        raise NotImplementedError


def tokens_width(name: str, context: ConditionContext) -> int:
    """D; refuses a network that takes no tokens."""
    if context.width is None:
        raise UserError(f"conditions.{name}: gives tokens, for which model.cross_attention_dim must be set")
    return context.width


def waves(numbers: Tensor) -> Tensor:
    """Sines and cosines [N, WAVES] of numbers [N], as times are embedded."""
    return timestep_embedding(numbers, WAVES, flip_sin_to_cos=True, freq_shift=0)
