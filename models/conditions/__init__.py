"""What the U-Net is told beside the noisy latent: classes, boxes, images … as tokens, channels or a vector.

Each condition has two halves, side by side in `labels` or `images`: a `Condition` makes arrays of a sample's image and
labels (`base`; the precompute needs this half alone), an `Embedder` is the part of the network that reads them
(`embedder`). A new one is such a pair, with its line in that file's KINDS, and a section of that name in
`conf/schema/conditions.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema.conditions import ConditionsConfig
from models.conditions import images, labels
from models.conditions.base import ClassNames, Condition, FrozenNetworks, Inputs, Samples, Wanted
from models.conditions.embedder import ConditionContext, Conditioning, ConditionRng, Embedder

__all__ = [
    "ClassNames",
    "Condition",
    "ConditionContext",
    "ConditionRng",
    "Conditioning",
    "Conditions",
    "Embedder",
    "Embedders",
    "FrozenNetworks",
    "Inputs",
    "Samples",
    "Wanted",
]

KINDS = {**labels.KINDS, **images.KINDS}


class Conditions:
    """All conditions of one network, as arrays.

    Args:
        cfg: which ones, with their options.
        names: of the classes in the data set, where they are known.
    """

    def __init__(self, cfg: ConditionsConfig, names: ClassNames | None = None) -> None:
        self.sections = dict(cfg.chosen())
        self.kinds: dict[str, Condition] = {
            name: KINDS[name][0](section, names or {}) for name, section in self.sections.items()
        }

    @property
    def takes_text(self) -> bool:
        """Whether the caption is one of them."""
        return "caption" in self.kinds

    @property
    def need_labels(self) -> bool:
        """Whether one of them is made of labels."""
        return any(part.group for part in self.kinds.values())

    @property
    def need_images(self) -> bool:
        """Whether one of them is made of an image."""
        return any(part.needs_image for part in self.kinds.values())

    @property
    def can_drop(self) -> bool:
        """Whether the network was trained without its conditions, too: otherwise there is no guidance."""
        return any(section.drop > 0 for section in self.sections.values())

    @property
    def baseline_names(self) -> tuple[str, ...]:
        """Names of the images that `baselines` makes, known before they are made."""
        return tuple(name for part in self.kinds.values() for name in part.baseline_names)

    def facts(self) -> dict[str, Any]:
        """Options that decide the arrays, by condition."""
        return {name: part.facts() for name, part in self.kinds.items()}

    def check_names(self, names: ClassNames) -> None:
        """Refuse a data set with more classes than a condition knows, or without any; {}: it does not say.

        Raises:
            UserError: naming the condition.
        """
        for name, part in self.kinds.items():
            found = len(names.get(part.group, ()))
            if names and part.group and not 0 < found <= part.cfg.classes:
                raise UserError(
                    f"conditions.{name}.classes={part.cfg.classes}: this data set has {found} {part.group}"
                    + ("; set it to that" if found else ", so take another data set or condition")
                )

    def labels_of_prompt(self, prompt: str) -> dict[str, Any]:
        """Labels, as a sample's JSON has them, that a prompt names for a network without text.

        Raises:
            UserError: words that name nothing it knows.
        """
        if self.takes_text:
            return {}
        return {name: value for part in self.kinds.values() for name, value in part.labels_of_prompt(prompt).items()}

    def prepare(self, samples: Samples, frozen: FrozenNetworks) -> Inputs:
        """Make all arrays [B, ...] but the text states."""
        return {key: array for part in self.kinds.values() for key, array in part.prepare(samples, frozen).items()}

    def wanted(self, inputs: Inputs) -> Wanted:
        """Random numbers of a sample that training asks for: for noise on a condition, and for dropping it."""
        found = Wanted()
        for name, part in self.kinds.items():
            found |= part.wanted(inputs) | ({f"{name}_drop": None} if self.sections[name].drop > 0 else {})
        return found

    def finish(self, images: Tensor, originals: Tensor, inputs: Inputs) -> Tensor:
        """Correct drawn images [B, 3, H, W]: known pixels are put back, small images met."""
        for part in self.kinds.values():
            images = part.finish(images, originals, inputs)
        return images

    def baselines(self, originals: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """Images [B, 3, H, W] that need no training, to be beaten, by name."""
        return {name: made for part in self.kinds.values() for name, made in part.baselines(originals, inputs).items()}

    def region(self, inputs: Inputs) -> Tensor | None:
        """Region in which an image is to be compared with the original, bool [B, H, W]; None: everywhere."""
        found = (part.region(inputs) for part in self.kinds.values())
        return next((region for region in found if region is not None), None)

    def titles(self, captions: Sequence[str], inputs: Inputs) -> list[str]:
        """The conditions in words, for each image."""
        columns = [part.titles(inputs) for part in self.kinds.values()]
        columns = [list(captions) if self.takes_text else [""] * len(captions), *(c for c in columns if c)]
        return [", ".join(filter(None, words)) for words in zip(*columns, strict=True)]

    def show(self, originals: Tensor, inputs: Inputs) -> list[Tensor]:
        """The conditions as images [B, 3, H', W'] in [-1, 1], of each one that is one."""
        shown = (part.show(originals, inputs) for part in self.kinds.values())
        return [images for images in shown if images is not None]


class Embedders(nn.Module):
    """All conditions of one network, as its parts.

    Args:
        source: makes the arrays.
        context: the network.
    """

    def __init__(self, source: Conditions, context: ConditionContext) -> None:
        super().__init__()
        self.source = source
        self.parts = nn.ModuleDict({name: KINDS[name][1](cfg, context) for name, cfg in source.sections.items()})
        self.drops = {name: cfg.drop for name, cfg in source.sections.items()}

    @property
    def kinds(self) -> dict[str, Embedder]:
        """Embedders by the name of their condition."""
        return dict(self.parts.items())  # type: ignore[arg-type]

    @property
    def channels(self) -> int:
        """K, beside the latent's own."""
        return sum(part.channels for part in self.kinds.values())

    @property
    def tokens(self) -> int:
        """L, of all of them; without those of a caption where its length is not known."""
        return sum(part.tokens for part in self.kinds.values())

    @property
    def give_tokens(self) -> bool:
        """Whether there is something for cross-attention to see."""
        return self.source.takes_text or self.tokens > 0

    def null(self, inputs: Inputs) -> Inputs:
        """Arrays with all that training drops in its null, the rest as it is: what guidance leads away from."""
        for name, part in self.kinds.items():
            if self.drops[name] > 0:
                inputs = inputs | part.null(inputs)
        return inputs

    def vary(self, inputs: Inputs, draws: ConditionRng, drop: bool = True) -> Inputs:
        """Arrays as training sees them: with noise on a condition, and conditions dropped, each by its own draw."""
        for name, part in self.kinds.items():
            inputs = inputs | part.vary(inputs, draws)
            if drop and self.drops[name] > 0:
                dropped = draws.uniform(f"{name}_drop") < self.drops[name]  # [B]
                nulls = part.null(inputs)
                inputs = inputs | {key: torch.where(_like(dropped, n), n, inputs[key]) for key, n in nulls.items()}
        return inputs

    def forward(self, inputs: Inputs) -> Conditioning:
        """Tokens and channels side by side, vectors added."""
        made = [part(inputs) for part in self.kinds.values()]
        tokens = [one.context for one in made if isinstance(one.context, Tensor)]
        beside = [one.channels for one in made if one.channels is not None]
        added = [one.vector for one in made if one.vector is not None]
        return Conditioning(
            torch.cat(tokens, dim=1) if tokens else None,
            torch.cat(beside, dim=1) if beside else None,
            torch.stack(added).sum(dim=0) if added else None,
        )


def _like(rows: Tensor, array: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] with as many dimensions."""
    return rows.to(array.device).view(-1, *[1] * (array.ndim - 1))
