"""What an edit costs: an image and its edit by attention control, against two images drawn plainly.

The networks have the sizes of `experiment=demo` and random weights. Both sides are ours: the ratio is the share of
plain sampling's speed that attention control leaves, 1 / 1.15 at least.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from _compare import Comparison, main, rate
from _networks import THREADS
from _pipelines import models
from diffusers import StableDiffusionPipeline

from conf.schema import ConditionsConfig, Edit, SamplingConfig
from models.editing.editing import edit_images

BAR = 1 / 1.15
STEPS, GUIDANCE_SCALE = 20, 3.0
NOUNS = ["planet", "monster", "hill", "moon"]
PROMPTS = [f"a red {noun} on a navy background" for noun in NOUNS]
EDITED = [f"a blue {noun} on a navy background" for noun in NOUNS]
KINDS = {
    "replace": [Edit(prompt=prompt, edit=edit) for prompt, edit in zip(PROMPTS, EDITED, strict=True)],
    "refine": [Edit(prompt=prompt, edit=f"{prompt} with stars") for prompt in PROMPTS],
    "weights": [Edit(prompt=prompt, weights={"red": 2.0}) for prompt in PROMPTS],
    "blend": [
        Edit(prompt=prompt, edit=edit, blend=[noun]) for prompt, edit, noun in zip(PROMPTS, EDITED, NOUNS, strict=True)
    ],
}


def comparisons(folder: Path) -> Iterator[Comparison]:
    """One for each kind of edit, in images per second."""
    model, _ = models(folder, ConditionsConfig(), 4, StableDiffusionPipeline)
    sampling, count = SamplingConfig(steps=STEPS, guidance_scale=GUIDANCE_SCALE), 2 * len(PROMPTS)

    plain = partial(model, [*PROMPTS, *EDITED], [0] * count, sampling)
    for name, edits in KINDS.items():
        edited = partial(edit_images, model, edits, [0] * len(edits), sampling)
        ours, peer = rate(count, edited), rate(count, plain)
        yield Comparison(name=name, ours=ours, peer=peer, unit="images/s", bar=BAR, pairs=9)


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as name:
        main(comparisons(Path(name)))
