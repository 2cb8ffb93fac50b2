"""What `train/sample.py` is asked to draw: prompts of the command line, of a file, and of a data set."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from conf.errors import UserError
from conf.schema import SampleRun
from data.datasets import captions_of
from data.manifest import REMEDY
from models.prompts import parse, plain

Job = tuple[str, int]  # prompt, and the number of the picture among all that are drawn of it


def read_prompts(cfg: SampleRun) -> list[str]:
    """Prompts of the command line, of the file and of the data set, in that order.

    Raises:
        UserError: a source without a prompt, or a prompt with broken syntax.
    """
    written = [*cfg.prompts, *(prompts_of_file(cfg.prompts_file) if cfg.prompts_file else [])]
    captions = captions_with_words(cfg.prompts_from, cfg.prompts_from_samples) if cfg.prompts_from else []
    if cfg.prompt_syntax:  # before any network is loaded
        for prompt in (*written, cfg.negative_prompt):
            parse(prompt)
        for caption in captions:
            require_plain(caption)
    return written + captions


def prompts_of_file(path: str) -> list[str]:
    """One a line; empty lines are left out."""
    if not Path(path).is_file():
        raise UserError(f"prompts_file={path}: no such file")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"prompts_file={path}: is no UTF-8 text; write one prompt a line") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"prompts_file={path}: holds no prompt; write one a line")
    return prompts


def captions_with_words(folder: str, samples: int) -> list[str]:
    """Captions of a folder of image shards but for the empty ones."""
    try:
        captions = captions_of(folder, samples)
    except UserError as error:
        remedy = "name a folder of image shards, such as RUN/shards/heldout"
        raise UserError(f"prompts_from: {str(error).replace(REMEDY['images'], remedy)}") from None
    if not any(captions):
        raise UserError(f"prompts_from={folder}: its first {len(captions)} captions are empty; take another data set")
    return [caption for caption in captions if caption]


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


def jobs_of(prompts: Sequence[str], images_per_prompt: int) -> list[Job]:
    """All pictures; a prompt that comes again goes on counting, so that no picture is drawn twice."""
    drawn: Counter[str] = Counter()
    jobs = []
    for prompt in prompts:
        jobs += [(prompt, drawn[prompt] + number) for number in range(images_per_prompt)]
        drawn[prompt] += images_per_prompt
    return jobs
