"""Conditions as arrays: what is made of a sample's image and labels, once, for the cache or before an image is drawn.

Nothing here has parameters, so a precompute needs no network; `embedder` has what makes the U-Net's inputs of the
arrays.

Shapes, in all files of this folder: B samples, H x W the image, C channels of the latent, h x w its size, L tokens of
width D, K channels beside the latent, E width of the time embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from conf.errors import UserError

Inputs = dict[str, Tensor]  # arrays of B samples, by name
# Random numbers of a sample, by purpose: normal ones of a shape; None: one in [0, 1).
Wanted = dict[str, tuple[int, ...] | None]
ClassNames = Mapping[str, Sequence[str]]  # by group and number, as the data set has them; "": a class without a name


class BoxLike(Protocol):
    """A box around an object, in fractions of the image's sides: left, top, right, bottom."""

    @property
    def corners(self) -> tuple[float, float, float, float]: ...
    @property
    def class_id(self) -> int: ...
    @property
    def area(self) -> float: ...


class LabelsLike(Protocol):
    """Labels of an image; all of them may be missing."""

    @property
    def class_id(self) -> int | None: ...
    @property
    def boxes(self) -> Sequence[BoxLike]: ...
    @property
    def segments(self) -> np.ndarray | None: ...  # uint8 [H, W]


class FrozenNetworks(Protocol):
    """Trained networks that conditions may ask for features of an image."""

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to the means of their latents [B, C, h, w], on the CPU."""

    def image_embeddings(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to CLIP's embeddings [B, E], on the CPU."""


@dataclass(frozen=True, slots=True)
class Samples:
    """B images with their labels: what the arrays of conditions are made of."""

    images: Tensor  # [B, 3, H, W] in [-1, 1]
    labels: Sequence[LabelsLike]
    framings: Tensor  # [B, 4] float32, pixels: height and width of the original, top and left corner of the cut
    generators: Sequence[np.random.Generator]  # one per sample, for masks and degradations
    masks: Tensor | None = None  # bool [B, H, W], true: to be painted; None: drawn at random
    already_small: bool = False  # the images are those that a user wants enlarged
    keys: Sequence[str] = ()  # by which errors name them

    def class_number(self, row: int, field: str, number: int | None, classes: int) -> int:
        """A class id of a sample, or the null class for None; raises UserError when it is out of range."""
        if number is None:
            return classes
        if not 0 <= number < classes:
            of = f"sample '{self.keys[row]}': " if self.keys and self.keys[row] else ""
            raise UserError(f"{of}{field}: {number} is out of range, this network knows the classes 0 to {classes - 1}")
        return number


class Condition:
    """One condition as arrays; the methods of this class are those of one that needs nothing special.

    Args:
        cfg: its section of `conf.schema.conditions`.
        names: of the classes in the data set.
    """

    group = ""  # of the names that its class ids refer to; "": it has no class ids
    needs_image = False  # whether it is made of one
    needs_mask = False  # whether an image of a user's own must come with one
    baseline_names: tuple[str, ...] = ()

    def __init__(self, cfg: Any, names: ClassNames) -> None:
        self.cfg, self.names = cfg, names

    def facts(self) -> dict[str, Any]:
        """Options that decide the arrays, in plain values: a cache with others does not fit."""
        return {}

    def labels_of_prompt(self, prompt: str) -> dict[str, Any]:
        """Labels, as a sample's JSON has them, that a prompt names for a network without text; raises UserError."""
        return {}

    def prepare(self, samples: Samples, frozen: FrozenNetworks) -> Inputs:
        """Make the arrays, once: for the cache, or before an image is drawn."""
        return {}

    def wanted(self, inputs: Inputs) -> Wanted:
        """Random numbers that its embedder asks for in training (`embedder.ConditionRng`), to be drawn beforehand."""
        return {}

    def finish(self, images: Tensor, originals: Tensor, inputs: Inputs) -> Tensor:
        """Correct drawn images [B, 3, H, W]; the originals are those that the arrays were made of."""
        return images

    def baselines(self, originals: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """Images [B, 3, H, W] that need no training, to be beaten, by name."""
        return {}

    def region(self, inputs: Inputs) -> Tensor | None:
        """Region in which an image is to be compared with the original, bool [B, H, W]; None: everywhere."""
        return None

    def titles(self, inputs: Inputs) -> list[str]:
        """The condition in words, for each image; empty where it has none."""
        return []

    def show(self, originals: Tensor, inputs: Inputs) -> Tensor | None:
        """The condition as images [B, 3, H', W'] in [-1, 1]; None where it is none."""
        return None

    def class_of(self, words: str) -> int:
        """The class of a name, or of a number in words; raises UserError where there is none."""
        names, classes = [*self.names.get(self.group, ())], self.cfg.classes
        if words.isdecimal() and int(words) < classes:
            return int(words)
        if words not in names or not words:
            known = f": {', '.join(filter(None, names))}, or" if any(names) else ":"
            raise UserError(
                f"prompt '{words}': no class of this network; take one of its classes{known} 0 to {classes - 1}"
            )
        return names.index(words)

    def class_name(self, number: int) -> str:
        """A class in words."""
        names = self.names.get(self.group, ())
        return (names[number] if number < len(names) else "") or f"class {number}"
