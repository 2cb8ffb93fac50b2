"""What `train/sample.py` is asked to draw: prompts of the command line, of a file, of pictures and of a data set."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from conf.errors import UserError
from conf.schema import SampleRun, SamplingConfig
from data.datasets import captions_of
from data.manifest import REMEDY
from data.text_files import lines_of
from models.pipeline import DiffusionPipeline
from models.prompts import parse, plain
from train.engine.journal import say
from train.evaluation.given import caption_beside


class Prompt(NamedTuple):
    """What one or several pictures are drawn of."""

    text: str
    sample: int | None = None  # of the data set that it is the caption of
    file: str | None = None  # picture that it belongs to


class Job(NamedTuple):
    """One picture."""

    prompt: str
    number: int  # among all that are drawn of that prompt
    sample: int | None = None
    file: str | None = None


def read_prompts(cfg: SampleRun) -> list[Prompt]:
    """Prompts of the command line, of the file, of the pictures and of the data set, in that order.

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
    """One a line; empty lines are left out."""
    lines = lines_of(path, "prompts_file", "write one prompt a line")
    prompts = [line.strip() for line in lines if line.strip()]
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


def with_words(prompts: Sequence[Prompt], folder: str | None) -> list[Prompt]:
    """Those of a network that is told nothing but text: without empty captions."""
    found = [prompt for prompt in prompts if prompt.text]
    if not found:
        raise UserError(f"prompts_from={folder}: its first {len(prompts)} captions are empty; take another data set")
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
    """All pictures; a prompt that comes again goes on counting, so that no picture is drawn twice."""
    drawn: Counter[str] = Counter()
    jobs = []
    for text, sample, file in prompts:
        jobs += [Job(text, drawn[text] + number, sample, file) for number in range(images_per_prompt)]
        drawn[text] += images_per_prompt
    return jobs
