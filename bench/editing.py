"""What editing costs: an image and its edit against two images drawn plainly, and a weighted word against none.

The networks have the sizes of `experiment=demo` and random weights. Both sides are ours: the ratio is the share of
plain sampling's speed that attention control leaves, 1 / 1.15 at least, and a weighted word, 1 / 1.5 at least.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from _compare import Comparison, main, rate
from _networks import THREADS
from _pipelines import models
from diffusers import StableDiffusionPipeline

from conf.schema import ConditionsConfig, Edit, SamplingConfig
from models.editing.editing import edit_images

BAR, WORD_BAR = 1 / 1.15, 1 / 1.5
STEPS, GUIDANCE_SCALE = 20, 3.0
NOUNS = ["planet", "monster", "hill", "moon"]
PROMPTS = [f"a red {noun} on a navy background" for noun in NOUNS]
EDITED = [f"a blue {noun} on a navy background" for noun in NOUNS]
KINDS = {
    "replace": [Edit(prompt=prompt, edit=edit) for prompt, edit in zip(PROMPTS, EDITED, strict=True)],
    "refine": [Edit(prompt=prompt, edit=f"{prompt} with stars") for prompt in PROMPTS],
    "masked word": [Edit(prompt=prompt, weights={"red": 0.0}) for prompt in PROMPTS],
    "weighted word": [Edit(prompt=prompt, weights={"red": 2.0}) for prompt in PROMPTS],
    "blend": [
        Edit(prompt=prompt, edit=edit, blend=[noun]) for prompt, edit, noun in zip(PROMPTS, EDITED, NOUNS, strict=True)
    ],
}


WEIGHTED = ("weighted word",)  # costs a prediction more
WEIGHTS = {"prompt with a weight": "2", "in all steps": "2@1"}


def comparisons(folder: Path) -> Iterator[Comparison]:
    """One for each kind of edit, and for a word with a weight, in images per second."""
    model, _ = models(folder, ConditionsConfig(), 4, StableDiffusionPipeline)
    sampling, count = SamplingConfig(steps=STEPS, guidance_scale=GUIDANCE_SCALE), 2 * len(PROMPTS)

    plain = partial(model, [*PROMPTS, *EDITED], [0] * count, sampling)
    for name, edits in KINDS.items():
        edited = partial(edit_images, model, edits, [0] * len(edits), sampling)
        ours, peer = rate(count, edited), rate(count, plain)
        yield Comparison(
            name=name, ours=ours, peer=peer, unit="images/s", bar=WORD_BAR if name in WEIGHTED else BAR, pairs=9
        )
    sampling, count = replace(sampling, prompt_syntax=True), len(PROMPTS)
    plain = partial(model, PROMPTS, [0] * count, sampling)
    for name, weight in WEIGHTS.items():
        prompts = [prompt.replace("red", f"(red:{weight})") for prompt in PROMPTS]
        ours, peer = rate(count, partial(model, prompts, [0] * count, sampling)), rate(count, plain)
        yield Comparison(name=name, ours=ours, peer=peer, unit="images/s", bar=WORD_BAR, pairs=9)


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as name:
        main(comparisons(Path(name)))
