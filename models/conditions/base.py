"""What every condition of the U-Net has in common.

Shapes, in all files of this folder: B samples, H x W the image, C channels of the latent, h x w its size, L tokens of
width D, K channels beside the latent, E width of the time embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema.networks import UNetConfig
from models.attention import Context
from models.unet import timestep_embedding

Inputs = dict[str, Tensor]  # arrays of B samples, by name
WAVES = 256  # channels of the embedding of a number


class Conditioning(NamedTuple):
    """What the U-Net takes beside the noisy latent and the time."""

    context: Context | None = None  # tokens [B, L, D]
    channels: Tensor | None = None  # [B, K, h, w], concatenated to the latent
    vector: Tensor | None = None  # [B, E], added to the time's embedding

    def followed_by(self, other: "Conditioning") -> "Conditioning":
        """What is told of this one's rows, then of the other's; before tokens became keys and values."""

        def both(mine: Any, theirs: Any) -> Any:
            return None if mine is None else torch.cat([mine, theirs])

        return Conditioning(*map(both, self, other))


class BoxLike(Protocol):
    """Where something is, in fractions of the image's sides: left, top, right, bottom."""

    @property
    def corners(self) -> tuple[float, float, float, float]: ...
    @property
    def class_id(self) -> int: ...
    @property
    def area(self) -> float: ...


class LabelsLike(Protocol):
    """What is known of an image; all of it may be missing."""

    @property
    def class_id(self) -> int | None: ...
    @property
    def boxes(self) -> Sequence[BoxLike]: ...
    @property
    def segments(self) -> np.ndarray | None: ...  # uint8 [H, W]


class Frozen(Protocol):
    """Networks that conditions may ask."""

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to the means of their latents [B, C, h, w], on the CPU."""

    def image_embeddings(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to CLIP's embeddings [B, E], on the CPU."""


@dataclass(frozen=True, slots=True)
class Samples:
    """What conditions are made of: B images and what is known of them."""

    images: Tensor  # [B, 3, H, W] in [-1, 1]
    labels: Sequence[LabelsLike]
    framings: Tensor  # [B, 4] float32, pixels: height and width of the original, top and left corner of the cut
    generators: Sequence[np.random.Generator]  # one per sample, for masks and degradations
    masks: Tensor | None = None  # bool [B, H, W], true: to be painted; None: drawn at random
    as_given: bool = False  # the images are small ones already
    keys: Sequence[str] = ()  # by which errors name them

    def class_number(self, row: int, field: str, number: int | None, classes: int) -> int:
        """A class id of a sample, or the null class for None; raises UserError when it is out of range."""
        if number is None:
            return classes
        if not 0 <= number < classes:
            of = f"sample '{self.keys[row]}': " if self.keys and self.keys[row] else ""
            raise UserError(f"{of}{field}: {number} is out of range, this network knows the classes 0 to {classes - 1}")
        return number


class ConditionRng(Protocol):
    """Random numbers that belong to the samples of a batch."""

    def uniform(self, purpose: str) -> Tensor:
        """[B] in [0, 1)."""

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal [B, *shape]."""


@dataclass(frozen=True, slots=True)
class ConditionContext:
    """What a condition has to know of its network and its data."""

    width: int | None  # D
    embedding: int  # E
    downscale: int  # H / h
    latent_mean: Tensor  # [C]
    latent_std: Tensor  # [C]
    null_text: Tensor | None = None  # text states [L, D] of the empty caption; None: the pipeline brings others
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of classes, in groups, as the data set has them

    @classmethod
    def of(cls, model: UNetConfig, **known: Any) -> Self:
        """Those of a U-Net."""
        return cls(width=model.cross_attention_dim, embedding=4 * model.block_out_channels[0], **known)


class Condition(nn.Module):
    """One thing that the network is told; the methods of this class are those of one that needs nothing special."""

    names = ""  # group of names in the data set that its class ids refer to
    classes = 0  # of that group that it knows
    needs_image = False  # whether it is made of one
    needs_mask = False  # whether an image of a user's own must come with one
    rivals: tuple[str, ...] = ()  # names of its baselines
    tokens = 0  # L, that it gives
    channels = 0  # K, that it puts beside the latent

    def facts(self) -> dict[str, Any]:
        """What decides its arrays, in plain values."""
        return {}

    def asked_in(self, words: str) -> dict[str, Any]:
        """LabelsLike, as a sample's JSON has them, of a prompt for a network without text; raises UserError."""
        return {}

    def prepare(self, samples: Samples, frozen: Frozen) -> Inputs:
        """Its arrays, made once: for the cache, or before an image is drawn."""
        return {}

    def null(self, inputs: Inputs) -> Inputs:
        """Its arrays when nothing is told."""
        return {}

    def vary(self, inputs: Inputs, draws: ConditionRng) -> Inputs:
        """What a training does to its arrays at random."""
        return {}

    def finish(self, images: Tensor, originals: Tensor, inputs: Inputs) -> Tensor:
        """Images [B, 3, H, W] after they were drawn; the originals are those that the arrays were made of."""
        return images

    def baselines(self, originals: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """Images [B, 3, H, W] that need no training, to be beaten, by name."""
        return {}

    def region(self, inputs: Inputs) -> Tensor | None:
        """Where an image is to be compared with the original, bool [B, H, W]; None: everywhere."""
        return None

    def titles(self, inputs: Inputs) -> list[str]:
        """What it asks for, in words, of each image; empty where it has none."""
        return []

    def show(self, originals: Tensor, inputs: Inputs) -> Tensor | None:
        """What it asks for, as images [B, 3, H', W'] in [-1, 1]."""
        return None

    def forward(self, inputs: Inputs) -> Conditioning:
        """What the network takes of it."""
        raise NotImplementedError


def tokens_width(name: str, around: ConditionContext) -> int:
    """D; refuses a network that takes no tokens."""
    if around.width is None:
        raise UserError(f"conditions.{name}: gives tokens, for which model.cross_attention_dim must be set")
    return around.width


def number_of(around: ConditionContext, group: str, classes: int, words: str) -> int:
    """The class of a name, or of a number in words; raises UserError where there is none."""
    names = [*around.names.get(group, ())]
    if words.isdecimal() and int(words) < classes:
        return int(words)
    if words not in names or not words:
        known = f": {', '.join(filter(None, names))}, or" if any(names) else ":"
        raise UserError(
            f"prompt '{words}': no class of this network; take one of its classes{known} 0 to {classes - 1}"
        )
    return names.index(words)


def named(around: ConditionContext, group: str, number: int) -> str:
    """A class in words."""
    names = around.names.get(group, ())
    return (names[number] if number < len(names) else "") or f"class {number}"


def waves(numbers: Tensor) -> Tensor:
    """[N] -> [N, WAVES], as times are embedded."""
    return timestep_embedding(numbers, WAVES, flip_sin_to_cos=True, freq_shift=0)
