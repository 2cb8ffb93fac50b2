"""DDIM sampling with guidance, prompts to images: ours against diffusers' whole pipeline on the same weights.

The networks have the sizes of `experiment=demo` and random weights, exported as `train/export.py` does.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _compare import Comparison, main, rate
from _networks import THREADS
from _pipelines import models
from diffusers import StableDiffusionPipeline
from torch import Tensor

from conf.schema import ConditionsConfig, Sampler, SamplingConfig
from models.pipeline import image_noise

PROMPTS = ["a red planet", "a green monster on a blue background", "mountains", "a robot that smiles"]
GUIDANCE_SCALE, BAR = 3.0, 1.25


def comparisons(folder: Path) -> Iterator[Comparison]:
    """At two numbers of steps, in images per second."""
    model, pipeline = models(folder, ConditionsConfig(), 4, StableDiffusionPipeline)
    cfg, seeds = model.denoiser.unet.cfg, [0] * len(PROMPTS)
    side = cfg.sample_size * model.autoencoder.cfg.downscale
    shape = (cfg.in_channels, cfg.sample_size, cfg.sample_size)
    noise = torch.from_numpy(np.stack([image_noise(prompt, 0, 0, shape) for prompt in PROMPTS]))

    def mine(steps: int) -> Tensor:
        sampling = SamplingConfig(sampler=Sampler.ddim, steps=steps, guidance_scale=GUIDANCE_SCALE)
        return model(PROMPTS, seeds, sampling)

    def theirs(steps: int) -> Tensor:
        options = {"height": side, "width": side, "guidance_scale": GUIDANCE_SCALE, "output_type": "pt"}
        return pipeline(PROMPTS, num_inference_steps=steps, latents=noise, **options).images

    for steps in (20, 50):
        torch.testing.assert_close((mine(steps) + 1) / 2, theirs(steps), rtol=0, atol=2 / 255)
        yield Comparison(
            name=f"ddim_{steps}_steps_guided",
            ours=rate(len(PROMPTS), partial(mine, steps)),
            peer=rate(len(PROMPTS), partial(theirs, steps)),
            unit="images/s",
            bar=BAR,
            pairs=9,
        )


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as name:
        main(comparisons(Path(name)))
