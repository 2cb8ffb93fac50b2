"""The first step of a training on latents, in micro-batches of any size."""

from collections.abc import Callable

import pytest
import torch

from train.training.unet import UNetStage

SAMPLES = 16


def first_step(stage: UNetStage, micro: int) -> float:
    """Take it on the first 16 samples; the norm of their gradient."""
    for start in range(0, SAMPLES, micro):
        stage.micro_step(stage.dataset.batch(range(start, start + micro)), start + micro == SAMPLES, 0)
    return float(stage.finish_step(SAMPLES)["train/grad_norm"])


def require_step_of_plain_torch(make: Callable[..., UNetStage], backend: str) -> None:
    """The first step under a backend, in two micro-batches, is that of plain torch in one, to a tenth of lr."""
    weights, norms = [], []
    for micro, layout in ((SAMPLES, ["runtime.backend=ddp"]), (SAMPLES // 2, ["batch.micro_batch_size=8", backend])):
        stage = make(*layout)
        norms.append(first_step(stage, micro))
        weights.append([trainable.weights() for trainable in stage.trainables.values()])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    for expected, found in zip(*weights, strict=True):
        for name, tensor in expected.items():
            torch.testing.assert_close(tensor, found[name], rtol=0, atol=1e-4)
