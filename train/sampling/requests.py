"""What is to be generated: prompts of the command line, of files and data sets, and their other conditions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from conf.errors import UserError
from conf.schema import ImageConfig, SampleRun, SamplingConfig
from data.captions import clean_caption
from data.image_dataset import ImageDataset, captions_of
from data.labels import LabelError, Labels, read_labels
from data.order import rng
from data.shards.manifest import REMEDY
from data.text_files import lines_of
from models.conditions import Conditions, Samples
from models.pipeline import DiffusionPipeline
from models.prompts import parse, plain
from train.engine.metric_log import say
from train.sampling.user_images import UserImage, caption_beside, read_user_image

# -------------------- prompts -----------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """The text of one or several images, and where it comes from."""

    text: str
    sample: int | None = None  # of the data set that it is the caption of
    file: str | None = None  # image that it belongs to


class Job(NamedTuple):
    """One image to be generated."""

    prompt: str
    number: int  # among all images of that prompt
    sample: int | None = None
    file: str | None = None


def read_prompts(cfg: SampleRun) -> list[Prompt]:
    """Prompts of the command line, of the file, of the images and of the data set, in that order.

    Raises:
        UserError: a source without a prompt, or a prompt with broken syntax.
    """
    written = [*cfg.prompts, *(prompts_of_file(cfg.prompts_file) if cfg.prompts_file else [])]
    beside = [Prompt(caption_beside(path), file=path) for path in cfg.inputs]
    captions = captions_of_shards(cfg.prompts_from, cfg.prompts_from_samples) if cfg.prompts_from else []
    if cfg.prompt_syntax:  # before any network is loaded
        for prompt in (*written, *(text for text, *_ in beside), cfg.negative_prompt):
            parse(prompt)
        for caption in captions:
            require_plain(caption)
    return [*map(Prompt, written), *beside, *(Prompt(caption, number) for number, caption in enumerate(captions))]


def prompts_of_file(path: str) -> list[str]:
    """Prompts of a file, one a line; empty lines are left out."""
    lines = lines_of(path, "prompts_file", "write one prompt a line")
    prompts = [line.strip() for line in lines if clean_caption(line)]
    if not prompts:
        raise UserError(f"prompts_file={path}: holds no prompt; write one a line")
    return prompts


def captions_of_shards(folder: str, samples: int) -> list[str]:
    """Captions of a folder of image shards."""
    try:
        return captions_of(folder, samples)
    except UserError as error:
        remedy = "name a folder of image shards, such as RUN/shards/heldout"
        raise UserError(f"prompts_from: {str(error).replace(REMEDY['images'], remedy)}") from None


def with_text(prompts: Sequence[Prompt], folder: str | None) -> list[Prompt]:
    """The prompts that are not empty, for a network whose only condition is text.

    Raises:
        UserError: a prompt was given that is empty, or all captions are.
    """
    found = [prompt for prompt in prompts if clean_caption(prompt.text)]
    empty = [prompt for prompt in prompts if not clean_caption(prompt.text)]
    if any(prompt.sample is None and prompt.file is None for prompt in empty):
        raise UserError("prompts: one of them is empty; write what is to be seen, such as 'a red ball'")
    if not found:
        raise UserError(f"prompts_from={folder}: its first {len(prompts)} captions are empty; take another data set")
    if empty:
        say("sample", f"{len(empty)} of {len(prompts)} prompts are empty captions, of which nothing is drawn")
    return found


def require_plain(caption: str) -> None:
    """Refuse a caption that the syntax of prompts would read as something else."""
    try:
        same = parse(caption) == plain(caption)
    except UserError:
        same = False
    if not same:
        raise UserError(
            f"prompts_from: the caption '{caption}' would be read as weights of words: set prompt_syntax=false, "
            "which takes all prompts as plain text"
        )


def say_cut(
    stage: str, model: DiffusionPipeline, prompts: Sequence[str], cfg: SamplingConfig, what: str = "prompts"
) -> None:
    """Say how many prompts, and negative ones, are longer than the network reads, and what falls off the first."""
    for texts, name in ((prompts, what), ([cfg.negative_prompt], "negative prompts")):
        cuts = model.cuts(texts, cfg.prompt_syntax)
        if cuts.count:
            say(stage, cuts.line(name))


def jobs_of(prompts: Sequence[Prompt], images_per_prompt: int) -> list[Job]:
    """All images; a prompt that comes again goes on counting, so that no two images are equal."""
    counts: Counter[str] = Counter()
    jobs = []
    for text, sample, file in prompts:
        jobs += [Job(text, counts[text] + number, sample, file) for number in range(images_per_prompt)]
        counts[text] += images_per_prompt
    return jobs


# -------------------- other conditions than text ----------------------------------------------------------------------

Item = dict[str, Any]  # as of `data.image_dataset.ImageDataset`: caption; image and labels where there are any


@dataclass(frozen=True, slots=True)
class Requests:
    """The images that `train/sample.py` is to generate: prompts, and what the network reads beside them."""

    prompts: list[Prompt]
    data: ImageDataset | None  # whose captions are prompts; None where the network reads captions alone
    images: dict[str, UserImage] = field(default_factory=dict)  # the user's own, by file
    named: dict[str, Item] = field(default_factory=dict)  # labels that prompts name, by prompt

    @classmethod
    def of(cls, cfg: SampleRun, model: DiffusionPipeline, prompts: list[Prompt]) -> Self:
        """The requests of a command; raises UserError for prompts that lack a condition that the network needs."""
        conditions = model.conditions
        if not (conditions.need_labels or conditions.need_images):
            if cfg.inputs:
                raise UserError(f"inputs={cfg.inputs[0]}: this network is told only text; set prompts instead")
            return cls(with_text(prompts, cfg.prompts_from) if conditions.takes_text else prompts, None)
        side = model.denoiser.unet.cfg.sample_size * model.autoencoder.cfg.downscale
        data = None
        if cfg.prompts_from:
            images = ImageConfig(resolution=max(cfg.size, default=side))
            data = ImageDataset(cfg.prompts_from, images, cfg.seed, labels=conditions.need_labels)
        written = {prompt.text for prompt in prompts if prompt.sample is None and prompt.file is None}
        named = {text: labels_in(conditions, text, side) for text in written}
        requests = cls(prompts, data, {path: read_user_image(path) for path in cfg.inputs}, named)
        for prompt in prompts:
            if data is None or prompt.sample is None:
                require_conditions(conditions, requests.item(Job(prompt.text, 0, file=prompt.file)), prompt.file)
        return requests

    def origin(self, job: Job) -> dict[str, Any]:
        """Facts on what an image is made of beside its prompt, in plain values."""
        if job.file is not None:
            return {"input": self.images[job.file].digest}
        return {} if self.data is None else {"sample": job.sample, "data": self.data.digest}

    def batches(self, jobs: Sequence[Job], indices: Sequence[int], most: int) -> list[list[int]]:
        """Batches of these jobs, in their order; images of users are of one kind and size within a batch."""
        groups = [list(group) for _, group in groupby(indices, lambda index: self._kind(jobs[index]))]
        return [group[start : start + most] for group in groups for start in range(0, len(group), most)]

    def _kind(self, job: Job) -> tuple[Any, ...]:
        if job.file is None:
            return ()
        item = self.images[job.file].item
        return "mask" in item, item["image"].shape

    def item(self, job: Job) -> Item:
        """All that is known of an image before it is generated."""
        if job.file is not None:
            return {"caption": job.prompt, **self.images[job.file].item}
        if self.data is None or job.sample is None:
            return {"caption": job.prompt, **self.named.get(job.prompt, {})}
        return self.data.at(job.sample)


def labels_in(conditions: Conditions, words: str, side: int) -> Item:
    """The labels that a prompt names, for a network that reads labels and no text; nothing for another one.

    Raises:
        UserError: a class that the network does not know, or a box that is none.
    """
    fields = conditions.labels_of_prompt(words)
    try:
        return {"labels": read_labels(fields, None, (side, side))} if fields else {}
    except LabelError as error:
        raise UserError(f"prompt '{words}': {error}") from None


def require_prompts_alone(conditions: Conditions, who: str) -> None:
    """Refuse a network that needs more than a prompt, for a command that has nothing else.

    Raises:
        UserError: naming the condition.
    """
    for name, part in conditions.kinds.items():
        if part.needs_image or part.group:
            raise UserError(f"this network was trained with conditions.{name}: {who} knows prompts alone")


def samples_of(items: Sequence[Item], numbers: Sequence[int], seed: int, side: int) -> Samples:
    """Samples of the images with these numbers, which decide what is random about their masks and degradations.

    Args:
        items: alike: all images of one size, all of files or none.
        side: in pixels of an image where an item has none.
    """
    images = torch.stack([item["image"] if "image" in item else torch.zeros(3, side, side) for item in items])
    height, width = images.shape[2:]
    return Samples(
        images=images,
        labels=[item.get("labels", Labels()) for item in items],
        framings=torch.tensor([[height, width, 0, 0]], dtype=torch.float32).expand(len(items), -1),
        generators=[rng(seed, number, "conditions of a picture") for number in numbers],
        masks=torch.stack([item["mask"] for item in items]) if "mask" in items[0] else None,
        already_small="already_small" in items[0],
        keys=[item.get("key", "") for item in items],
    )


def require_conditions(conditions: Conditions, item: Item, file: str | None) -> None:
    """Refuse an item that lacks a condition that the network needs; `file`: where it comes from.

    Raises:
        UserError: naming the option that brings it.
    """
    remedy = "set prompts_from=FOLDER of image shards or inputs=[FILE]"
    for name, part in conditions.kinds.items():
        if part.needs_image and "image" not in item:
            raise UserError(f"this network was trained with conditions.{name}, which is made of an image: {remedy}")
        if file is not None and part.needs_mask and "mask" not in item:
            mask = Path(file).with_suffix(".mask.png")
            raise UserError(f"inputs={file}: this network paints where a mask is white: put {mask} beside it")
        if part.group and "labels" not in item:
            raise UserError(f"this network was trained with conditions.{name}, which is made of labels: {remedy}")
