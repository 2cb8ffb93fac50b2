"""Does an image show what is asked for as a whole: the attributes in a demo caption, or a class?"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conf.errors import UserError
from data.building.sources.demo import attributes_of
from train.evaluation.judges.judge import Item, Judge

ATTRIBUTES = ("kind", "background", "color")


class ProbeNet(nn.Module):
    """Four strided convolutions and one linear head per attribute."""

    def __init__(self, classes: dict[str, int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 96), (96, 128)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(256, count) for name, count in classes.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] in [-1, 1] -> logits [B, classes] per attribute."""
        h = self.body(images)  # [B, 128, H/16, W/16]
        pooled = torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=1)  # [B, 256]
        return {name: head(pooled) for name, head in self.heads.items()}


class Probe(Judge):
    """Reads one value of each attribute from an image; one that its training never saw is never right.

    A sample may lack an attribute: it then says nothing about it.
    """

    facts: dict[str, list[Any]]  # the values that the classes of each attribute stand for

    def __init__(self, facts: dict[str, list[Any]]) -> None:
        super().__init__(facts)
        self.network = ProbeNet({name: len(values) for name, values in facts.items()})

    @staticmethod
    @abstractmethod
    def attributes(item: Item) -> dict[str, Any]:
        """The value of each attribute that a sample has."""

    @classmethod
    def facts_of(cls, items: Sequence[Item]) -> dict[str, list[Any]]:
        """All values that occur, in order."""
        wanted = [cls.attributes(item) for item in items]
        names = dict.fromkeys(name for values in wanted for name in values)
        return {name: sorted({values[name] for values in wanted if name in values}) for name in names}

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the attributes that are read."""
        return tuple(self.facts)

    def loss(self, images: Tensor, items: Sequence[Item], generator: torch.Generator) -> Tensor:
        """Cross-entropy, summed over the attributes."""
        wanted = [self.attributes(item) for item in items]
        total = torch.zeros((), device=images.device)
        for name, logits in self.network(images).items():
            index = {value: number for number, value in enumerate(self.facts[name])}
            rows = [row for row, values in enumerate(wanted) if name in values]
            targets = torch.tensor([index[wanted[row][name]] for row in rows], device=images.device)
            if rows:
                total = total + F.cross_entropy(logits[rows], targets)
        return total

    @torch.no_grad()
    def log_probability(self, images: Tensor, name: str, value: Any) -> Tensor:
        """Log-probability of a value of an attribute, [B] on the CPU."""
        return self.network(images)[name].log_softmax(1)[:, self.facts[name].index(value)].cpu()

    @torch.no_grad()
    def most_probable(self, images: Tensor, name: str) -> list[Any]:
        """The value of an attribute that each image shows."""
        return [self.facts[name][number] for number in self.network(images)[name].argmax(1).tolist()]

    @torch.no_grad()
    def correct(self, images: Tensor, items: Sequence[Item]) -> dict[str, Tensor]:
        """Per attribute, whether [B] the image shows what is asked for."""
        wanted, right = [self.attributes(item) for item in items], {}
        for name, logits in self.network(images).items():
            read = [self.facts[name][number] for number in logits.argmax(1).tolist()]
            known = [
                float(value == values[name]) if name in values else math.nan
                for value, values in zip(read, wanted, strict=True)
            ]
            right[name] = torch.tensor(known)
        return right

    def scores(self, columns: dict[str, Tensor]) -> dict[str, float]:
        """Shares of the images that have the attribute."""
        return {name: column.float().nanmean().item() for name, column in columns.items()}


class CaptionProbe(Probe):
    """Kind, colour and background, which the demo set's captions name."""

    option, group = "prompt_following=true", "prompt_following"

    @classmethod
    def require(cls, item: Item) -> None:
        """Only the demo set says all of it."""
        missing = [name for name in ATTRIBUTES if name not in item["meta"]]
        if missing:
            raise UserError(
                f"{cls.option}: sample '{item['key']}' names no {missing[0]} in its JSON; only the demo set "
                "does: set prompt_following=false"
            )

    @staticmethod
    def attributes(item: Item) -> dict[str, Any]:
        """Attributes by the sample's JSON."""
        return {name: item["meta"][name] for name in ATTRIBUTES}


class SceneProbe(Probe):
    """All that a scene of the demo set is described by."""

    option, group, steps = "the demo set", "scene_following", 800

    @classmethod
    def require(cls, item: Item) -> None:
        """Raise UserError where a sample has no attributes."""
        CaptionProbe.require(item)

    @staticmethod
    def attributes(item: Item) -> dict[str, Any]:
        """Attributes by the sample's JSON."""
        return attributes_of(item["meta"])


class ClassProbe(Probe):
    """The class of an image, by its number."""

    option, group = "judges=[classes]", "label_following"

    @classmethod
    def require(cls, item: Item) -> None:
        """A class must be known."""
        if item["labels"].class_id is None:
            raise UserError(
                f"{cls.option}: sample '{item['key']}' has no class_id in its JSON; leave classes out, or build shards "
                "with classes"
            )

    @staticmethod
    def attributes(item: Item) -> dict[str, Any]:
        """Attributes by the labels."""
        return {"class": item["labels"].class_id}
