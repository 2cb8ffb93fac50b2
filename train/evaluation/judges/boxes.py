"""Is the object that was asked for to be found in its box, and nothing where none was asked for?"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from conf.errors import UserError
from data.labels import Box
from data.order import rng
from train.evaluation.judges.judge import Item, Judge
from train.evaluation.judges.probe import ProbeNet

SIDE = 32  # pixels of what is read of a box
MARGIN = 0.1  # of the box's own width and height, shown beyond each of its sides
JITTER = 0.05  # of them likewise: standard deviation by which a box's sides are moved in training
EMPTY_SIDES = (0.25, 0.5)  # of the image: sides of boxes where nothing was asked for
TOUCHED = 0.1  # of such a box, at most, lies in the box of an object
TRIES = 20  # until an image counts as full


class BoxJudge(Judge):
    """Reads the class of what is in a box; the last class is nothing, learnt from places without an object."""

    option, group = "judges=[boxes]", "label_following"
    steps = 150
    columns = ("box", "empty_box")

    facts: int  # classes

    def __init__(self, facts: int) -> None:
        super().__init__(facts)
        self.network = ProbeNet({"object": facts + 1})

    @classmethod
    def require(cls, item: Item) -> None:
        """A canvas may be empty of objects, but then its JSON says so."""
        if "boxes" not in item["meta"]:
            raise UserError(
                f"{cls.option}: sample '{item['key']}' has no boxes in its JSON; leave boxes out, or build shards "
                "with boxes, such as source=layout"
            )

    @classmethod
    def facts_of(cls, items: Sequence[Item]) -> int:
        """Classes of all boxes."""
        return 1 + max((box.class_id for item in items for box in item["labels"].boxes), default=0)

    def loss(self, images: Tensor, items: Sequence[Item], generator: torch.Generator) -> Tensor:
        """Cross-entropy; boxes are moved a little, as drawn objects do not fill theirs to the pixel."""
        owners, corners, classes = self._places(items)
        sides = corners[:, 2:] - corners[:, :2]  # [N, 2]
        moved = corners + JITTER * sides.repeat(1, 2) * torch.randn(corners.shape, generator=generator)
        logits = self.network(crops(images, owners, moved))["object"]
        return F.cross_entropy(logits, classes.to(logits.device))

    @torch.no_grad()
    def correct(self, images: Tensor, items: Sequence[Item]) -> dict[str, Tensor]:
        """Two columns [B, 2]: boxes read rightly, and all of them; with an object, and without."""
        owners, corners, classes = self._places(items)
        read = self.network(crops(images, owners, corners))["object"].argmax(1).cpu()
        counts = torch.zeros(2, len(items), 2, dtype=torch.int64)  # with and without, image, right and all
        for owner, number, wanted in zip(owners.tolist(), read.tolist(), classes.tolist(), strict=True):
            counts[int(wanted == self.facts), owner] += torch.tensor([number == wanted, 1])
        return dict(zip(self.columns, counts, strict=True))

    def scores(self, columns: dict[str, Tensor]) -> dict[str, float]:
        """Shares of the boxes that are right, over all images."""
        totals = {name: column.sum(dim=0).tolist() for name, column in columns.items()}
        return {name: right / total for name, (right, total) in totals.items() if total}

    def _places(self, items: Sequence[Item]) -> tuple[Tensor, Tensor, Tensor]:
        """Number of the image [N], corners [N, 4] and class [N] of every box, and of an empty one in each image."""
        places: list[tuple[int, tuple[float, ...], int]] = []
        for number, item in enumerate(items):
            boxes = item["labels"].boxes
            places += [(number, box.corners, box.class_id) for box in boxes]
            free = empty_box(boxes, rng(0, item["position"], "empty box"))
            places += [] if free is None else [(number, free, self.facts)]
        owners, corners, classes = zip(*places, strict=True)
        return torch.tensor(owners), torch.tensor(corners), torch.tensor(classes)


def empty_box(boxes: Sequence[Box], random: np.random.Generator) -> tuple[float, ...] | None:
    """Corners of a place where no object is, drawn by chance; None where none is found."""
    taken = np.array([box.corners for box in boxes]).reshape(-1, 4)  # [N, 4]
    for _ in range(TRIES):
        sides = random.uniform(*EMPTY_SIDES, 2)
        start = random.random(2) * (1 - sides)
        end = start + sides
        common = np.minimum(end, taken[:, 2:]) - np.maximum(start, taken[:, :2])  # [N, 2]
        if (common.clip(0).prod(axis=1) <= TOUCHED * sides.prod()).all():
            return (*start.tolist(), *end.tolist())
    return None


def crops(images: Tensor, owners: Tensor, corners: Tensor) -> Tensor:
    """[N, 3, SIDE, SIDE]: of `images` [B, 3, H, W], each box [N, 4], in fractions, out of the image that owns it."""
    start, end = corners.to(images).split(2, dim=1)  # [N, 2] each: x and y
    scale = (end - start) * (1 + 2 * MARGIN)  # where the image reaches from -1 to 1, half a side is as long as this
    theta = torch.cat([torch.diag_embed(scale), (start + end - 1)[..., None]], dim=2)  # [N, 2, 3]
    grid = F.affine_grid(theta, [len(corners), 3, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images[owners.to(images.device)], grid, padding_mode="border", align_corners=False)
