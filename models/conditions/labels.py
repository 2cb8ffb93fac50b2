"""Conditions that say what an image shows, in words, classes, boxes and maps; and how it was cut.

Each kind is a pair: the arrays first, then what embeds them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conf.errors import UserError
from models.conditions.base import Condition, FrozenNetworks, Inputs, Samples
from models.conditions.embedder import WAVES, ConditionContext, Conditioning, Embedder, tokens_width, waves
from models.unet import VectorEmbedding

UNLABELLED = 255  # in a map of segments


# -------------------- text --------------------------------------------------------------------------------------------


class Caption(Condition):
    """The caption; it prepares nothing, as text states come from the cache or, of prompts, from the pipeline."""


class CaptionTokens(Embedder):
    """Text states as tokens."""

    null_text: Tensor | None

    def __init__(self, cfg: Any, context: ConditionContext) -> None:
        super().__init__(cfg, context)
        self.register_buffer("null_text", context.null_text, persistent=False)
        self.tokens = 0 if context.null_text is None else len(context.null_text)

    def null(self, inputs: Inputs) -> Inputs:
        if self.null_text is None or "text" not in inputs:  # a pipeline brings states of its own
            return {}
        return {"text": self.null_text.expand_as(inputs["text"])}

    def forward(self, inputs: Inputs) -> Conditioning:
        return Conditioning(context=inputs["text"])


# -------------------- class of the image ------------------------------------------------------------------------------


class ClassId(Condition):
    """The class of an image as a number; the number of classes stands for none."""

    group = "classes"

    def facts(self) -> dict[str, Any]:
        return {"classes": self.cfg.classes}  # another number would mean another null

    def prepare(self, samples: Samples, frozen: FrozenNetworks) -> Inputs:
        ids = [
            samples.class_number(row, "class_id", found.class_id, self.cfg.classes)
            for row, found in enumerate(samples.labels)
        ]
        return {"class": torch.tensor(ids)}

    def labels_of_prompt(self, prompt: str) -> dict[str, Any]:
        return {"class_id": self.class_of(prompt.strip())}

    def titles(self, inputs: Inputs) -> list[str]:
        ids = inputs["class"].tolist()
        return ["" if number == self.cfg.classes else self.class_name(number) for number in ids]


class _ClassTable(Embedder):
    def __init__(self, cfg: Any, context: ConditionContext, width: int) -> None:
        super().__init__(cfg, context)
        self.table = nn.Embedding(cfg.classes + 1, width)  # the last one: no class

    def null(self, inputs: Inputs) -> Inputs:
        return {"class": torch.full_like(inputs["class"], self.cfg.classes)}


class ClassToken(_ClassTable):
    """The class as a token, as the LDM paper's ImageNet network has it."""

    tokens = 1

    def __init__(self, cfg: Any, context: ConditionContext) -> None:
        super().__init__(cfg, context, tokens_width("class_token", context))

    def forward(self, inputs: Inputs) -> Conditioning:
        return Conditioning(context=self.table(inputs["class"])[:, None])


class ClassVector(_ClassTable):
    """The class beside the time, as ADM has it (Dhariwal & Nichol 2021)."""

    def __init__(self, cfg: Any, context: ConditionContext) -> None:
        super().__init__(cfg, context, context.embedding)

    def forward(self, inputs: Inputs) -> Conditioning:
        return Conditioning(vector=self.table(inputs["class"]))


# -------------------- how the image was cut ---------------------------------------------------------------------------


class Framing(Condition):
    """Original size and corner of the cut (Podell et al. 2023, section 2.2)."""

    def prepare(self, samples: Samples, frozen: FrozenNetworks) -> Inputs:
        return {"framing": samples.framings}


class FramingVector(Embedder):
    """Four numbers as waves, and these as a vector beside the time."""

    def __init__(self, cfg: Any, context: ConditionContext) -> None:
        super().__init__(cfg, context)
        self.embedding = VectorEmbedding(4 * WAVES, context.embedding)

    def null(self, inputs: Inputs) -> Inputs:
        return {"framing": torch.zeros_like(inputs["framing"])}

    def forward(self, inputs: Inputs) -> Conditioning:
        numbers = inputs["framing"]  # [B, 4]
        return Conditioning(vector=self.embedding(waves(numbers.flatten()).unflatten(0, numbers.shape).flatten(1)))


# -------------------- boxes -------------------------------------------------------------------------------------------


class _BoxCondition(Condition):
    group = "box_classes"

    def labels_of_prompt(self, prompt: str) -> dict[str, Any]:
        return {"boxes": [self._box(words) for words in prompt.split(";") if words.strip()]}

    def _box(self, words: str) -> dict[str, Any]:
        name, *ends = words.strip().rsplit(maxsplit=4)  # from the right: a name may have spaces
        try:
            left, top, right, bottom = map(float, ends)
        except ValueError:
            raise UserError(
                f"prompt '{words.strip()}': no box; write CLASS LEFT TOP RIGHT BOTTOM, in fractions of the image's "
                "sides, and ; between boxes"
            ) from None
        return {"box": [left, top, right, bottom], "class_id": self.class_of(name)}


class Boxes(_BoxCondition):
    """The largest boxes of an image, [most, 5]: class and corners; the number of classes stands for no box."""

    def facts(self) -> dict[str, Any]:
        return {"classes": self.cfg.classes, "most": self.cfg.most}

    def prepare(self, samples: Samples, frozen: FrozenNetworks) -> Inputs:
        most, classes = self.cfg.most, self.cfg.classes
        found = torch.zeros(len(samples.labels), most, 5)
        found[..., 0] = classes
        for row, labels in enumerate(samples.labels):
            largest = sorted(labels.boxes, key=lambda box: -box.area)[:most]
            for number, box in enumerate(largest):
                class_id = samples.class_number(row, f"boxes[{number}].class_id", box.class_id, classes)
                found[row, number] = torch.tensor([class_id, *box.corners])
        return {"boxes": found}

    def titles(self, inputs: Inputs) -> list[str]:
        rows = [[int(box[0]) for box in boxes if box[0] < self.cfg.classes] for boxes in inputs["boxes"].tolist()]
        return [", ".join(map(self.class_name, row)) for row in rows]

    def show(self, originals: Tensor, inputs: Inputs) -> Tensor:
        height, width = originals.shape[2:]
        shown = torch.ones(len(originals), 3, height, width)
        for image, boxes in zip(shown, inputs["boxes"].cpu(), strict=True):
            for class_id, *corners in boxes[boxes[:, 0] < self.cfg.classes].tolist():
                left, top, right, bottom = edges(corners, height - 1, width - 1)
                image[:, top : bottom + 1, [left, right]] = colour(int(class_id)).view(3, 1, 1)
                image[:, [top, bottom], left : right + 1] = colour(int(class_id)).view(3, 1, 1)
        return shown


class BoxTokens(Embedder):
    """A token for each box, of its class and its corners (as Li et al. 2023, GLIGEN, eq. 5, ground theirs)."""

    frequencies = 8  # of the sines and cosines of each corner

    def __init__(self, cfg: Any, context: ConditionContext) -> None:
        super().__init__(cfg, context)
        width, self.tokens = tokens_width("boxes", context), cfg.most
        self.table = nn.Embedding(cfg.classes + 1, width)  # the last one: no box
        self.place = VectorEmbedding(width + 8 * self.frequencies, width)

    def null(self, inputs: Inputs) -> Inputs:
        nothing = torch.zeros_like(inputs["boxes"])
        nothing[..., 0] = self.cfg.classes
        return {"boxes": nothing}

    def forward(self, inputs: Inputs) -> Conditioning:
        boxes = inputs["boxes"]  # [B, most, 5]
        octaves = 2.0 ** torch.arange(self.frequencies, device=boxes.device) * math.pi
        angles = (boxes[..., 1:, None] * octaves).flatten(2)  # [B, most, 4 · frequencies]
        about = torch.cat([self.table(boxes[..., 0].long()), angles.sin(), angles.cos()], dim=-1)
        return Conditioning(context=self.place(about))


# -------------------- maps of classes ---------------------------------------------------------------------------------


class BoxMap(_BoxCondition):
    """Boxes filled with their class, the smaller ones in front: each place is told what lies there."""

    def prepare(self, samples: Samples, frozen: FrozenNetworks) -> Inputs:
        height, width = samples.images.shape[2:]
        maps = torch.full((len(samples.labels), height, width), UNLABELLED, dtype=torch.uint8)
        for row, labels in enumerate(samples.labels):
            for number, box in sorted(enumerate(labels.boxes), key=lambda entry: -entry[1].area):
                class_id = samples.class_number(row, f"boxes[{number}].class_id", box.class_id, self.cfg.classes)
                left, top, right, bottom = edges(box.corners, height, width)
                maps[row, top:bottom, left:right] = class_id
        return {"box_map": maps}


class Segments(Condition):
    """The class of each pixel."""

    group = "segments"

    def prepare(self, samples: Samples, frozen: FrozenNetworks) -> Inputs:
        nothing = np.full(samples.images.shape[2:], UNLABELLED, np.uint8)
        maps = np.stack([nothing if found.segments is None else found.segments for found in samples.labels])
        for row, highest in enumerate(np.where(maps == UNLABELLED, 0, maps).max(axis=(1, 2))):
            samples.class_number(row, "a pixel of seg.png", int(highest), self.cfg.classes)
        return {"segments": torch.from_numpy(maps)}

    def show(self, originals: Tensor, inputs: Inputs) -> Tensor:
        palette = torch.stack([colour(number) for number in range(256)])
        return palette[inputs["segments"].cpu().long()].permute(0, 3, 1, 2)


class _MapChannels(Embedder):
    """A map of classes as learned channels, averaged over the pixels of each latent: the paper's spatial rescaler."""

    array = ""  # name of the map

    def __init__(self, cfg: Any, context: ConditionContext) -> None:
        super().__init__(cfg, context)
        self.channels, self.downscale = cfg.channels, context.downscale
        self.table = nn.Embedding(cfg.classes + 1, cfg.channels)  # the last one: unlabelled

    def null(self, inputs: Inputs) -> Inputs:
        return {self.array: torch.full_like(inputs[self.array], UNLABELLED)}

    def forward(self, inputs: Inputs) -> Conditioning:
        channels = self.table(inputs[self.array].long().clamp_max(self.cfg.classes)).permute(0, 3, 1, 2)
        return Conditioning(channels=F.avg_pool2d(channels, self.downscale))


class BoxMapChannels(_MapChannels):
    """Filled boxes as learned channels."""

    array = "box_map"


class SegmentChannels(_MapChannels):
    """Segments as learned channels."""

    array = "segments"


def edges(corners: Sequence[float], height: int, width: int) -> list[int]:
    """Left, top, right and bottom of a box in pixels."""
    return [round(end * side) for end, side in zip(corners, (width, height, width, height), strict=True)]


def colour(class_id: int) -> Tensor:
    """RGB [3] in [-1, 1] that stands for a class in an image; the golden ratio keeps neighbouring classes apart."""
    return torch.cos(2 * math.pi * (0.618 * class_id + torch.tensor([0.0, 1 / 3, 2 / 3])))


KINDS: Mapping[str, tuple[type[Condition], type[Embedder]]] = {
    "caption": (Caption, CaptionTokens),
    "class_token": (ClassId, ClassToken),
    "class_vector": (ClassId, ClassVector),
    "framing": (Framing, FramingVector),
    "boxes": (Boxes, BoxTokens),
    "box_map": (BoxMap, BoxMapChannels),
    "segments": (Segments, SegmentChannels),
}
