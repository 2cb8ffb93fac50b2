"""Does each pixel of an image show the class that a semantic map asks for?"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conf.errors import UserError
from data.labels import MAP, UNLABELLED
from train.evaluation.judges.judge import Item, Judge

WIDTHS = (32, 64, 96, 96)  # channels at 1/2, 1/4, 1/8 and 1/16 of the image's size


def block(before: int, after: int, stride: int = 1) -> nn.Module:
    """3x3 convolution, norm, ReLU."""
    convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())


class Segmenter(nn.Module):
    """Fully convolutional: down to 1/16 of the size and up to 1/2, where what was seen on the way down is added.

    First and last layer work on 2 x 2 pixels at a time (Shi et al. 2016): full size is dear on a CPU.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        pairs = list(pairwise(WIDTHS))
        self.first = block(3 * 4, WIDTHS[0])
        self.down = nn.ModuleList([block(before, after, stride=2) for before, after in pairs])
        self.middle = block(WIDTHS[-1], WIDTHS[-1])
        self.up = nn.ModuleList([block(after, before) for before, after in reversed(pairs)])
        self.last = nn.Sequential(block(WIDTHS[0], WIDTHS[0]), nn.Conv2d(WIDTHS[0], classes * 4, 1))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1], sides even -> logits [B, classes, H, W]."""
        h = self.first(F.pixel_unshuffle(images, 2))  # [B, 32, H/2, W/2]
        skips = []
        for down in self.down:
            skips.append(h)
            h = down(h)
        h = self.middle(h)  # [B, 96, H/16, W/16]
        for up in self.up:
            skip = skips.pop()
            h = skip + F.interpolate(up(h), size=skip.shape[-2:])
        return F.pixel_shuffle(self.last(h), 2)


class SegmentJudge(Judge):
    """Reads the class of each pixel."""

    option, group = "judges=[segments]", "label_following"
    steps, batch = 220, 32
    columns = ("pixel",)

    facts: list[int]  # pixels of each class

    def __init__(self, facts: list[int]) -> None:
        super().__init__(facts)
        self.network = Segmenter(len(facts))

    @classmethod
    def require(cls, item: Item) -> None:
        """Raise UserError where a sample has no map."""
        if item["labels"].segments is None:
            raise UserError(
                f"{cls.option}: sample '{item['key']}' has no {MAP}; leave segments out, or build shards with maps"
            )

    @classmethod
    def facts_of(cls, items: Sequence[Item]) -> list[int]:
        """Pixels of each class in all maps."""
        counts = sum(np.bincount(item["labels"].segments.flat, minlength=UNLABELLED + 1) for item in items)
        known = np.asarray(counts)[:UNLABELLED]
        return [int(count) for count in known[: 1 + max(known.nonzero()[0], default=0)]]

    def loss(self, images: Tensor, items: Sequence[Item], generator: torch.Generator) -> Tensor:
        """Cross-entropy of the labelled pixels; a rare class weighs more by the root of how rare it is."""
        logits = self.network(images)
        weights = torch.tensor(self.facts, device=logits.device).clamp(min=1).rsqrt()
        return F.cross_entropy(logits, maps(items).to(logits.device), weights, ignore_index=UNLABELLED)

    @torch.no_grad()
    def correct(self, images: Tensor, items: Sequence[Item]) -> dict[str, Tensor]:
        """`pixel` [B, classes + 1, 2]: pixels read rightly and all of them, by the class asked for.

        The last row is for classes that training never saw.
        """
        read, truth = self.network(images).argmax(1).cpu(), maps(items)  # [B, H, W] each
        known = torch.where(truth == UNLABELLED, UNLABELLED, truth.clamp(max=len(self.facts))).flatten(1)
        wanted = F.one_hot(known, UNLABELLED + 1)[..., : len(self.facts) + 1]  # [B, H·W, classes + 1]
        right = wanted * (read == truth).flatten(1)[..., None]
        return {"pixel": torch.stack([right.sum(1), wanted.sum(1)], dim=-1)}

    def scores(self, columns: dict[str, Tensor]) -> dict[str, float]:
        """Share of all pixels, and the mean of the classes' shares, in which a large background counts as one class."""
        right, truth = columns["pixel"].sum(dim=0).double().unbind(-1)  # [classes + 1] each
        occurring = truth > 0
        shares = right[occurring] / truth[occurring]
        return {"pixel": (right.sum() / truth.sum()).item(), "segment": shares.mean().item()}


def maps(items: Sequence[Item]) -> Tensor:
    """The class of each pixel, int64 [B, H, W]."""
    return torch.from_numpy(np.stack([item["labels"].segments for item in items])).long()
