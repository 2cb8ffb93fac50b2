"""What the U-Net is told: each condition makes tokens, channels or a vector of arrays that belong to a sample.

A new one is a class in a file of this folder, with its name in that file's KINDS, and a section of that name in
`conf/schema/conditions.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema.conditions import ConditionsConfig
from models.conditions import images, labels
from models.conditions.base import Condition, ConditionContext, Conditioning, ConditionRng, Frozen, Inputs, Samples

__all__ = [
    "PREPARING",
    "Condition",
    "ConditionContext",
    "ConditionRng",
    "Conditioning",
    "Conditions",
    "Frozen",
    "Inputs",
    "Samples",
]

KINDS = {**labels.KINDS, **images.KINDS}
PREPARING = ConditionContext(1, 1, 1, torch.zeros(1), torch.ones(1))  # of conditions that only make arrays


class Conditions(nn.Module):
    """All that one network is told, as one condition."""

    def __init__(self, cfg: ConditionsConfig, around: ConditionContext) -> None:
        super().__init__()
        sections = dict(cfg.chosen())
        self.parts = nn.ModuleDict({name: KINDS[name](section, around) for name, section in sections.items()})
        self.drops = {name: section.drop for name, section in sections.items()}

    @property
    def kinds(self) -> dict[str, Condition]:
        """By name."""
        return dict(self.parts.items())  # type: ignore[arg-type]

    @property
    def channels(self) -> int:
        """K, beside the latent's own."""
        return sum(part.channels for part in self.kinds.values())

    @property
    def give_tokens(self) -> bool:
        """Whether one of them does."""
        return self.takes_text or self.tokens > 0

    @property
    def tokens(self) -> int:
        """L, of all of them; without those of a caption where its length is not known."""
        return sum(part.tokens for part in self.kinds.values())

    @property
    def need_labels(self) -> bool:
        """Whether one of them is made of labels."""
        return any(part.names for part in self.kinds.values())

    @property
    def need_images(self) -> bool:
        """Whether one of them is made of an image."""
        return any(part.needs_image for part in self.kinds.values())

    @property
    def rivals(self) -> tuple[str, ...]:
        """Names of all baselines."""
        return tuple(name for part in self.kinds.values() for name in part.rivals)

    @property
    def can_drop(self) -> bool:
        """Whether the network knows what it is to be told nothing: without, there is no guidance."""
        return any(drop > 0 for drop in self.drops.values())

    @property
    def takes_text(self) -> bool:
        """Whether it is told a caption."""
        return "caption" in self.drops

    def facts(self) -> dict[str, Any]:
        """What decides the arrays, by condition."""
        return {name: part.facts() for name, part in self.kinds.items()}

    def check_names(self, names: Mapping[str, Sequence[str]]) -> None:
        """Refuse a data set with more classes than a condition knows, or without any; {}: it does not say.

        Raises:
            UserError: naming the condition.
        """
        for name, part in self.kinds.items():
            found = len(names.get(part.names, ()))
            if names and part.names and not 0 < found <= part.classes:
                raise UserError(
                    f"conditions.{name}.classes={part.classes}: this data set has {found} {part.names}"
                    + ("; set it to that" if found else ", so take another data set or condition")
                )

    def asked_in(self, words: str) -> dict[str, Any]:
        """Labels, as a sample's JSON has them, that a prompt asks a network without text for.

        Raises:
            UserError: words that ask for nothing it knows.
        """
        if self.takes_text:
            return {}
        return {name: value for part in self.kinds.values() for name, value in part.asked_in(words).items()}

    def prepare(self, samples: Samples, frozen: Frozen) -> Inputs:
        """All arrays [B, ...] but the text states."""
        return {key: array for part in self.kinds.values() for key, array in part.prepare(samples, frozen).items()}

    def null(self, inputs: Inputs) -> Inputs:
        """With all that can be dropped in its null, the rest as it is: what guidance leads away from."""
        for name, part in self.kinds.items():
            if self.drops[name] > 0:
                inputs = inputs | part.null(inputs)
        return inputs

    def vary(self, inputs: Inputs, draws: ConditionRng) -> Inputs:
        """With all that training does at random: noise on a condition, and conditions dropped."""
        for name, part in self.kinds.items():
            inputs = inputs | part.vary(inputs, draws)
            if self.drops[name] > 0:
                dropped = draws.uniform(f"{name}_drop") < self.drops[name]  # [B]
                nulls = part.null(inputs)
                inputs = inputs | {key: torch.where(_like(dropped, n), n, inputs[key]) for key, n in nulls.items()}
        return inputs

    def finish(self, images: Tensor, originals: Tensor, inputs: Inputs) -> Tensor:
        """Images [B, 3, H, W] after they were drawn."""
        for part in self.kinds.values():
            images = part.finish(images, originals, inputs)
        return images

    def baselines(self, originals: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """Images to be beaten, by name."""
        return {name: made for part in self.kinds.values() for name, made in part.baselines(originals, inputs).items()}

    def region(self, inputs: Inputs) -> Tensor | None:
        """Where an image is to be compared with the original, bool [B, H, W]; None: everywhere."""
        found = (part.region(inputs) for part in self.kinds.values())
        return next((region for region in found if region is not None), None)

    def titles(self, captions: Sequence[str], inputs: Inputs) -> list[str]:
        """What is asked for, in words, of each image."""
        columns = [part.titles(inputs) for part in self.kinds.values()]
        columns = [list(captions) if self.takes_text else [""] * len(captions), *(c for c in columns if c)]
        return [", ".join(filter(None, words)) for words in zip(*columns, strict=True)]

    def show(self, originals: Tensor, inputs: Inputs) -> list[Tensor]:
        """What is asked for, as images [B, 3, H', W'] in [-1, 1], of each condition that is one."""
        shown = (part.show(originals, inputs) for part in self.kinds.values())
        return [images for images in shown if images is not None]

    def forward(self, inputs: Inputs) -> Conditioning:
        """Tokens and channels side by side, vectors added."""
        told = [part(inputs) for part in self.kinds.values()]
        tokens = [one.context for one in told if isinstance(one.context, Tensor)]
        beside = [one.channels for one in told if one.channels is not None]
        added = [one.vector for one in told if one.vector is not None]
        return Conditioning(
            torch.cat(tokens, dim=1) if tokens else None,
            torch.cat(beside, dim=1) if beside else None,
            torch.stack(added).sum(dim=0) if added else None,
        )


def _like(rows: Tensor, array: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] with as many dimensions."""
    return rows.to(array.device).view(-1, *[1] * (array.ndim - 1))
