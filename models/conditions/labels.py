"""Conditions that say what an image shows, in words, classes, boxes and maps; and how it was cut."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conf.errors import UserError
from models.conditions.base import (
    WAVES,
    Condition,
    ConditionContext,
    Conditioning,
    Frozen,
    Inputs,
    Samples,
    named,
    number_of,
    tokens_width,
    waves,
)
from models.unet import VectorEmbedding

UNLABELLED = 255  # in a map of segments


class Caption(Condition):
    """Text states; they come from the cache or, of prompts, from the pipeline."""

    null_text: Tensor | None

    def __init__(self, cfg: Any, around: ConditionContext) -> None:
        super().__init__()
        self.register_buffer("null_text", around.null_text, persistent=False)
        self.tokens = 0 if around.null_text is None else len(around.null_text)

    def null(self, inputs: Inputs) -> Inputs:
        if self.null_text is None or "text" not in inputs:  # a pipeline brings states of its own
            return {}
        return {"text": self.null_text.expand_as(inputs["text"])}

    def forward(self, inputs: Inputs) -> Conditioning:
        return Conditioning(context=inputs["text"])


class _Class(Condition):
    names = "classes"

    def __init__(self, cfg: Any, around: ConditionContext, width: int) -> None:
        super().__init__()
        self.around = around
        self.classes = cfg.classes
        self.table = nn.Embedding(cfg.classes + 1, width)  # the last one: no class

    def facts(self) -> dict[str, Any]:
        return {"classes": self.classes}  # its number stands for no class

    def prepare(self, samples: Samples, frozen: Frozen) -> Inputs:
        ids = [
            samples.class_number(row, "class_id", found.class_id, self.classes)
            for row, found in enumerate(samples.labels)
        ]
        return {"class": torch.tensor(ids)}

    def asked_in(self, words: str) -> dict[str, Any]:
        return {"class_id": number_of(self.around, self.names, self.classes, words.strip())}

    def null(self, inputs: Inputs) -> Inputs:
        return {"class": torch.full_like(inputs["class"], self.classes)}

    def titles(self, inputs: Inputs) -> list[str]:
        ids = inputs["class"].tolist()
        return ["" if number == self.classes else named(self.around, self.names, number) for number in ids]


class ClassToken(_Class):
    """The class as a token, as the LDM paper's ImageNet network has it."""

    tokens = 1

    def __init__(self, cfg: Any, around: ConditionContext) -> None:
        super().__init__(cfg, around, tokens_width("class_token", around))

    def forward(self, inputs: Inputs) -> Conditioning:
        return Conditioning(context=self.table(inputs["class"])[:, None])


class ClassVector(_Class):
    """The class beside the time, as ADM has it (Dhariwal & Nichol 2021)."""

    def __init__(self, cfg: Any, around: ConditionContext) -> None:
        super().__init__(cfg, around, around.embedding)

    def forward(self, inputs: Inputs) -> Conditioning:
        return Conditioning(vector=self.table(inputs["class"]))


class Framing(Condition):
    """Original size and corner of the cut (Podell et al. 2023, section 2.2)."""

    def __init__(self, cfg: Any, around: ConditionContext) -> None:
        super().__init__()
        self.embedding = VectorEmbedding(4 * WAVES, around.embedding)

    def prepare(self, samples: Samples, frozen: Frozen) -> Inputs:
        return {"framing": samples.framings}

    def null(self, inputs: Inputs) -> Inputs:
        return {"framing": torch.zeros_like(inputs["framing"])}

    def forward(self, inputs: Inputs) -> Conditioning:
        numbers = inputs["framing"]
        return Conditioning(vector=self.embedding(waves(numbers.flatten()).unflatten(0, numbers.shape).flatten(1)))


class Boxes(Condition):
    """A token for each box, of its class and its corners (as Li et al. 2023, GLIGEN, eq. 5, ground theirs)."""

    names = "box_classes"
    frequencies = 8  # of the sines and cosines of each corner

    def __init__(self, cfg: Any, around: ConditionContext) -> None:
        super().__init__()
        width, self.around = tokens_width("boxes", around), around
        self.classes, self.most, self.tokens = cfg.classes, cfg.most, cfg.most
        self.table = nn.Embedding(cfg.classes + 1, width)  # the last one: no box
        self.place = VectorEmbedding(width + 8 * self.frequencies, width)

    def facts(self) -> dict[str, Any]:
        return {"classes": self.classes, "most": self.most}  # the number of classes stands for no box

    def prepare(self, samples: Samples, frozen: Frozen) -> Inputs:
        found = torch.zeros(len(samples.labels), self.most, 5)
        found[..., 0] = self.classes
        for row, labels in enumerate(samples.labels):
            largest = sorted(labels.boxes, key=lambda box: -box.area)[: self.most]
            for number, box in enumerate(largest):
                class_id = samples.class_number(row, f"boxes[{number}].class_id", box.class_id, self.classes)
                found[row, number] = torch.tensor([class_id, *box.corners])
        return {"boxes": found}

    def asked_in(self, words: str) -> dict[str, Any]:
        return boxes_in(self.around, self.classes, words)

    def null(self, inputs: Inputs) -> Inputs:
        nothing = torch.zeros_like(inputs["boxes"])
        nothing[..., 0] = self.classes
        return {"boxes": nothing}

    def titles(self, inputs: Inputs) -> list[str]:
        rows = [[int(box[0]) for box in boxes if box[0] < self.classes] for boxes in inputs["boxes"].tolist()]
        return [", ".join(named(self.around, self.names, number) for number in row) for row in rows]

    def show(self, originals: Tensor, inputs: Inputs) -> Tensor:
        height, width = originals.shape[2:]
        shown = torch.ones(len(originals), 3, height, width)
        for image, boxes in zip(shown, inputs["boxes"].cpu(), strict=True):
            for class_id, *corners in boxes[boxes[:, 0] < self.classes].tolist():
                left, top, right, bottom = edges(corners, height - 1, width - 1)
                image[:, top : bottom + 1, [left, right]] = colour(int(class_id)).view(3, 1, 1)
                image[:, [top, bottom], left : right + 1] = colour(int(class_id)).view(3, 1, 1)
        return shown

    def forward(self, inputs: Inputs) -> Conditioning:
        boxes = inputs["boxes"]  # [B, most, 5]
        octaves = 2.0 ** torch.arange(self.frequencies, device=boxes.device) * math.pi
        angles = (boxes[..., 1:, None] * octaves).flatten(2)  # [B, most, 4 · frequencies]
        about = torch.cat([self.table(boxes[..., 0].long()), angles.sin(), angles.cos()], dim=-1)
        return Conditioning(context=self.place(about))


class _ClassMap(Condition):
    """A map of classes as learned channels, averaged over the pixels of each latent: the paper's spatial rescaler."""

    array = ""  # its name

    def __init__(self, cfg: Any, around: ConditionContext) -> None:
        super().__init__()
        self.around = around
        self.classes, self.channels, self.downscale = cfg.classes, cfg.channels, around.downscale
        self.table = nn.Embedding(cfg.classes + 1, cfg.channels)  # the last one: unlabelled

    def null(self, inputs: Inputs) -> Inputs:
        return {self.array: torch.full_like(inputs[self.array], UNLABELLED)}

    def forward(self, inputs: Inputs) -> Conditioning:
        channels = self.table(inputs[self.array].long().clamp_max(self.classes)).permute(0, 3, 1, 2)
        return Conditioning(channels=F.avg_pool2d(channels, self.downscale))


class Segments(_ClassMap):
    """The class of each pixel."""

    names = array = "segments"

    def prepare(self, samples: Samples, frozen: Frozen) -> Inputs:
        nothing = np.full(samples.images.shape[2:], UNLABELLED, np.uint8)
        maps = np.stack([nothing if found.segments is None else found.segments for found in samples.labels])
        for row, highest in enumerate(np.where(maps == UNLABELLED, 0, maps).max(axis=(1, 2))):
            samples.class_number(row, "a pixel of seg.png", int(highest), self.classes)
        return {self.array: torch.from_numpy(maps)}

    def show(self, originals: Tensor, inputs: Inputs) -> Tensor:
        palette = torch.stack([colour(number) for number in range(256)])
        return palette[inputs[self.array].cpu().long()].permute(0, 3, 1, 2)


class BoxMap(_ClassMap):
    """Boxes filled with their class, the smaller ones in front: each place is told what lies there."""

    names, array = "box_classes", "box_map"

    def asked_in(self, words: str) -> dict[str, Any]:
        return boxes_in(self.around, self.classes, words)

    def prepare(self, samples: Samples, frozen: Frozen) -> Inputs:
        height, width = samples.images.shape[2:]
        maps = torch.full((len(samples.labels), height, width), UNLABELLED, dtype=torch.uint8)
        for row, labels in enumerate(samples.labels):
            for number, box in sorted(enumerate(labels.boxes), key=lambda entry: -entry[1].area):
                class_id = samples.class_number(row, f"boxes[{number}].class_id", box.class_id, self.classes)
                left, top, right, bottom = edges(box.corners, height, width)
                maps[row, top:bottom, left:right] = class_id
        return {self.array: maps}


def boxes_in(around: ConditionContext, classes: int, words: str) -> dict[str, Any]:
    """The boxes of a prompt, as a sample's JSON has them; raises UserError."""
    return {"boxes": [box_in(around, classes, entry) for entry in words.split(";") if entry.strip()]}


def box_in(around: ConditionContext, classes: int, words: str) -> dict[str, Any]:
    name, *ends = words.strip().rsplit(maxsplit=4)
    try:
        left, top, right, bottom = map(float, ends)
    except ValueError:
        raise UserError(
            f"prompt '{words.strip()}': no box; write CLASS LEFT TOP RIGHT BOTTOM, in fractions of the image's "
            "sides, and ; between boxes"
        ) from None
    return {"box": [left, top, right, bottom], "class_id": number_of(around, "box_classes", classes, name)}


def edges(corners: Sequence[float], height: int, width: int) -> list[int]:
    """Left, top, right and bottom of a box in pixels."""
    return [round(end * side) for end, side in zip(corners, (width, height, width, height), strict=True)]


def colour(class_id: int) -> Tensor:
    """RGB [3] in [-1, 1] that stands for a class in an image."""
    return torch.cos(2 * math.pi * (0.618 * class_id + torch.tensor([0.0, 1 / 3, 2 / 3])))


KINDS: Mapping[str, Callable[[Any, ConditionContext], Condition]] = {
    "caption": Caption,
    "class_token": ClassToken,
    "class_vector": ClassVector,
    "framing": Framing,
    "boxes": Boxes,
    "box_map": BoxMap,
    "segments": Segments,
}
