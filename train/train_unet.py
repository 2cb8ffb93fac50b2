"""Train the U-Net on cached latents: `python train/train_unet.py run_dir=...`."""

import math

from conf.entry import entry
from conf.schema import UNetRun


@entry("train_unet", UNetRun)
def main(cfg: UNetRun) -> float:
    """Returns the validation loss.

    Heavy imports wait until the configuration is known to be sound.
    """
    from train.engine.preflight import preflight
    from train.engine.runtime import start, stop
    from train.engine.trainer import fit
    from train.evaluation.in_training import small_evaluation
    from train.training.unet import UNetStage

    runtime = start(cfg.runtime)
    preflight(cfg, runtime)
    outcome = fit(UNetStage(cfg, runtime, small_evaluation(cfg, runtime)), cfg, runtime)
    stop()
    return outcome.metrics["eval/loss"] if outcome.finished else math.nan


if __name__ == "__main__":
    main()
