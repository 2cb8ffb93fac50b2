"""The first step of a training on latents, in micro-batches of any size."""

from train.training.unet import UNetStage

SAMPLES = 16


def first_step(stage: UNetStage, micro: int) -> float:
    """Take it on the first 16 samples; the norm of their gradient."""
    for start in range(0, SAMPLES, micro):
        stage.micro_step(stage.dataset.batch(range(start, start + micro)), start + micro == SAMPLES, 0)
    return float(stage.finish_step(SAMPLES)["train/grad_norm"])
