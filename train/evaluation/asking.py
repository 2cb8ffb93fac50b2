"""What pictures are asked for: a caption, and what a network is told beside it, of a sample of a data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from conf.errors import UserError
from conf.schema import ImageConfig, SampleRun
from data.datasets import ImageDataset
from data.labels import Labels
from data.order import rng
from models.conditions import Conditions, Samples
from models.pipeline import DiffusionPipeline
from train.evaluation.prompts import Job, Prompt, with_words

Item = dict[str, Any]  # as of `data.datasets.ImageDataset`: caption; image and labels where there are any


@dataclass(frozen=True, slots=True)
class Asked:
    """What `train/sample.py` draws: prompts, and the data set of those that are captions of its samples."""

    prompts: list[Prompt]
    data: ImageDataset | None  # where the network is told more than captions

    @classmethod
    def of(cls, cfg: SampleRun, model: DiffusionPipeline, prompts: list[Prompt]) -> Self:
        """Refuses prompts that lack what the network must be told."""
        conditions = model.denoiser.conditions
        if not (conditions.need_labels or conditions.need_pictures):
            return cls(with_words(prompts, cfg.prompts_from) if conditions.takes_text else prompts, None)
        side = model.denoiser.unet.cfg.sample_size * model.autoencoder.cfg.downscale
        data = None
        if cfg.prompts_from:
            images = ImageConfig(resolution=max(cfg.size, default=side))
            data = ImageDataset(cfg.prompts_from, images, cfg.seed, labels=conditions.need_labels)
        asked = cls(prompts, data)
        for prompt in prompts:
            if data is None or prompt.sample is None:
                require_told(conditions, asked.item(Job(prompt.text, 0)))
        return asked

    @property
    def digest(self) -> str | None:
        """Of the data set."""
        return None if self.data is None else self.data.digest

    def item(self, job: Job) -> Item:
        """All that is known of a picture to be drawn."""
        if self.data is None or job.sample is None:
            return {"caption": job.prompt}
        return self.data.at(job.sample)


def samples_of(items: Sequence[Item], numbers: Sequence[int], seed: int, side: int) -> Samples:
    """Of the pictures with these numbers, which decide what is random about their masks and degradations.

    Args:
        side: in pixels of a picture where an item has none.
    """
    images = torch.stack([item["image"] if "image" in item else torch.zeros(3, side, side) for item in items])
    height, width = images.shape[2:]
    return Samples(
        images=images,
        labels=[item.get("labels", Labels()) for item in items],
        framings=torch.tensor([[height, width, 0, 0]], dtype=torch.float32).expand(len(items), -1),
        generators=[rng(seed, number, "conditions of a picture") for number in numbers],
    )


def require_told(conditions: Conditions, item: Item) -> None:
    """Refuse an item without what the network must be told.

    Raises:
        UserError: naming the option that brings it.
    """
    remedy = "set prompts_from=FOLDER of image shards"
    for name, part in conditions.kinds.items():
        if part.needs_picture and "image" not in item:
            raise UserError(f"this network was trained with conditions.{name}, which is made of a picture: {remedy}")
        if part.names and "labels" not in item:
            raise UserError(f"this network was trained with conditions.{name}, which is made of labels: {remedy}")
