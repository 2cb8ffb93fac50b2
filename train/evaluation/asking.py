"""What pictures are asked for: a caption, and what a network is told beside it, of a sample of a data set."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import torch

from conf.errors import UserError
from conf.schema import ImageConfig, SampleRun
from data.datasets import ImageDataset
from data.labels import LabelError, Labels, read_labels
from data.order import rng
from models.conditions import Conditions, Samples
from models.pipeline import DiffusionPipeline
from train.evaluation.given import GivenPicture, read_given
from train.evaluation.prompts import Job, Prompt, with_words

Item = dict[str, Any]  # as of `data.datasets.ImageDataset`: caption; image and labels where there are any


@dataclass(frozen=True, slots=True)
class Asked:
    """What `train/sample.py` draws: prompts, and the data set of those that are captions of its samples."""

    prompts: list[Prompt]
    data: ImageDataset | None  # where the network is told more than captions
    given: dict[str, GivenPicture] = field(default_factory=dict)  # by file
    in_words: dict[str, Item] = field(default_factory=dict)  # labels that prompts name, by prompt

    @classmethod
    def of(cls, cfg: SampleRun, model: DiffusionPipeline, prompts: list[Prompt]) -> Self:
        """Refuses prompts that lack what the network must be told."""
        conditions = model.denoiser.conditions
        if not (conditions.need_labels or conditions.need_pictures):
            if cfg.inputs:
                raise UserError(f"inputs={cfg.inputs[0]}: this network is told only text; set prompts instead")
            return cls(with_words(prompts, cfg.prompts_from) if conditions.takes_text else prompts, None)
        side = model.denoiser.unet.cfg.sample_size * model.autoencoder.cfg.downscale
        data = None
        if cfg.prompts_from:
            images = ImageConfig(resolution=max(cfg.size, default=side))
            data = ImageDataset(cfg.prompts_from, images, cfg.seed, labels=conditions.need_labels)
        written = {prompt.text for prompt in prompts if prompt.sample is None and prompt.file is None}
        in_words = {text: labels_in(conditions, text, side) for text in written}
        asked = cls(prompts, data, {path: read_given(path) for path in cfg.inputs}, in_words)
        for prompt in prompts:
            if data is None or prompt.sample is None:
                require_told(conditions, asked.item(Job(prompt.text, 0, file=prompt.file)), prompt.file)
        return asked

    @property
    def digest(self) -> str | None:
        """Of the data set."""
        return None if self.data is None else self.data.digest

    def batches(self, jobs: Sequence[Job], indices: Sequence[int], most: int) -> list[list[int]]:
        """Of these jobs those that can be drawn together: in their order, with given pictures of one kind and size."""
        alike = [list(group) for _, group in groupby(indices, lambda index: self._kind(jobs[index]))]
        return [group[start : start + most] for group in alike for start in range(0, len(group), most)]

    def _kind(self, job: Job) -> tuple[Any, ...]:
        if job.file is None:
            return ()
        item = self.given[job.file].item
        return "mask" in item, item["image"].shape

    def item(self, job: Job) -> Item:
        """All that is known of a picture to be drawn."""
        if job.file is not None:
            return {"caption": job.prompt, **self.given[job.file].item}
        if self.data is None or job.sample is None:
            return {"caption": job.prompt, **self.in_words.get(job.prompt, {})}
        return self.data.at(job.sample)


def labels_in(conditions: Conditions, words: str, side: int) -> Item:
    """What a prompt names, for a network that is told labels and no text; nothing for another one.

    Raises:
        UserError: a class that the network does not know, or a box that is none.
    """
    asked = conditions.asked_in(words)
    try:
        return {"labels": read_labels(asked, None, (side, side))} if asked else {}
    except LabelError as error:
        raise UserError(f"prompt '{words}': {error}") from None


def require_prompts_alone(conditions: Conditions, who: str) -> None:
    """Refuse a network that must be told more than a prompt, for a command that has nothing else.

    Raises:
        UserError: naming the condition.
    """
    for name, part in conditions.kinds.items():
        if part.needs_picture or part.names:
            raise UserError(f"this network was trained with conditions.{name}: {who} knows prompts alone")


def samples_of(items: Sequence[Item], numbers: Sequence[int], seed: int, side: int) -> Samples:
    """Of the pictures with these numbers, which decide what is random about their masks and degradations.

    Args:
        items: alike: all pictures of one size, all of files or none.
        side: in pixels of a picture where an item has none.
    """
    images = torch.stack([item["image"] if "image" in item else torch.zeros(3, side, side) for item in items])
    height, width = images.shape[2:]
    return Samples(
        images=images,
        labels=[item.get("labels", Labels()) for item in items],
        framings=torch.tensor([[height, width, 0, 0]], dtype=torch.float32).expand(len(items), -1),
        generators=[rng(seed, number, "conditions of a picture") for number in numbers],
        masks=torch.stack([item["mask"] for item in items]) if "mask" in items[0] else None,
        as_given="as_given" in items[0],
        keys=[item.get("key", "") for item in items],
    )


def require_told(conditions: Conditions, item: Item, file: str | None) -> None:
    """Refuse an item without what the network must be told; `file`: where it comes from.

    Raises:
        UserError: naming the option that brings it.
    """
    remedy = "set prompts_from=FOLDER of image shards or inputs=[FILE]"
    for name, part in conditions.kinds.items():
        if part.needs_picture and "image" not in item:
            raise UserError(f"this network was trained with conditions.{name}, which is made of a picture: {remedy}")
        if file is not None and part.needs_mask and "mask" not in item:
            mask = Path(file).with_suffix(".mask.png")
            raise UserError(f"inputs={file}: this network paints where a mask is white: put {mask} beside it")
        if part.names and "labels" not in item:
            raise UserError(f"this network was trained with conditions.{name}, which is made of labels: {remedy}")
