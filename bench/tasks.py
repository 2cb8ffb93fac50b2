"""DDIM sampling of tasks beyond text to image: ours against diffusers' pipelines on the same weights.

Networks of the demos' sizes with random weights, exported as `train/export.py` does: without a condition,
super-resolution (latents of three channels, which diffusers' pipeline wants) and inpainting with text.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _compare import Comparison, main, rate
from _networks import THREADS
from _pipelines import models
from diffusers import LDMPipeline, LDMSuperResolutionPipeline, StableDiffusionInpaintPipeline
from torch import Tensor

from conf.schema import ConditionsConfig, Sampler, SamplingConfig
from conf.schema.conditions import CaptionConfig, LowResolutionConfig, MaskedConfig
from models.conditions import Inputs
from models.pipeline import DiffusionPipeline, image_noise

BAR = 1.0
COUNT, STEPS, SIDE = 8, 20, 64  # images, steps, pixels
NAMES = [f"number {number}" for number in range(COUNT)]
PLAIN: dict[str, Any] = {  # a network without text
    "block_out_channels": [32, 96, 128],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": None,
    "head_channels": 32,
    "use_linear_projection": False,
}


@contextmanager
def beginning_with(pipeline: Any, noise: Tensor) -> Iterator[None]:
    """Our noise for a pipeline that takes none."""
    place = sys.modules[type(pipeline).__module__]
    drawn, place.randn_tensor = place.randn_tensor, lambda *_, **__: noise  # type: ignore[attr-defined]
    try:
        yield
    finally:
        place.randn_tensor = drawn  # type: ignore[attr-defined]


def compared(
    name: str, model: DiffusionPipeline, pipeline: Any, ask: Callable[[Tensor], Any], inputs: Inputs, guidance: float
) -> Comparison:
    """Of images per second, after both have drawn the same."""
    cfg = model.denoiser.unet.cfg
    shape = (cfg.out_channels, cfg.sample_size, cfg.sample_size)
    noise = torch.from_numpy(np.stack([image_noise(each, 0, 0, shape) for each in NAMES]))
    sampling = SamplingConfig(sampler=Sampler.ddim, steps=STEPS, guidance_scale=guidance)

    def mine() -> Tensor:
        return model(NAMES, [0] * COUNT, sampling, inputs=inputs)

    def theirs() -> Any:
        with beginning_with(pipeline, noise):
            return ask(noise).images

    images = torch.as_tensor(np.asarray(theirs()))
    torch.testing.assert_close((mine() + 1) / 2, images.permute(0, 3, 1, 2).float(), rtol=0, atol=2 / 255)
    return Comparison(name=name, ours=rate(COUNT, mine), peer=rate(COUNT, theirs), unit="images/s", bar=BAR, pairs=7)


def comparisons(folder: Path) -> Iterator[Comparison]:
    """One for each pipeline that diffusers has."""
    asked: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "np"}
    model, peer = models(folder / "plain", ConditionsConfig(caption=None), 4, LDMPipeline, **PLAIN)
    yield compared("unconditional", model, peer, lambda _: peer(batch_size=COUNT, **asked), {}, 1.0)

    told = ConditionsConfig(caption=None, low_resolution=LowResolutionConfig())
    model, upscaler = models(folder / "small", told, 3, LDMSuperResolutionPipeline, in_channels=6, **PLAIN)
    low = torch.rand(COUNT, 3, SIDE // 4, SIDE // 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    yield compared("super_resolution", model, upscaler, lambda _: upscaler(low, **asked), {"low": low}, 1.0)

    told = ConditionsConfig(caption=CaptionConfig(), masked=MaskedConfig())
    model, painter = models(folder / "masked", told, 4, StableDiffusionInpaintPipeline, in_channels=9)
    images, masks = torch.rand(COUNT, 3, SIDE, SIDE) * 2 - 1, torch.zeros(COUNT, SIDE, SIDE, dtype=torch.bool)
    masks[:, 16:48, 16:48] = True
    means = model.latents(images * ~masks[:, None])
    given: dict[str, Any] = {"image": (images + 1) / 2, "mask_image": masks[:, None].float()}
    given |= {"masked_image_latents": means, "height": SIDE, "width": SIDE, "guidance_scale": 3.0}
    ask = partial(paint, painter, {**given, **asked})
    yield compared("inpainting_guided", model, painter, ask, {"mask": masks, "masked": means}, 3.0)


def paint(pipeline: Any, given: dict[str, Any], noise: Tensor, prompts: Sequence[str] = NAMES) -> Any:
    """Inpainting takes its noise as an argument."""
    return pipeline(list(prompts), latents=noise, **given)


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as name:
        main(comparisons(Path(name)))
