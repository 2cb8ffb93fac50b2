"""Teach a student to draw in few steps: `python train/distill_unet.py teacher=runs/demo/unet/export ...`."""

import math

from conf.entry import entry
from conf.schema import DistillRun


@entry("distill_unet", DistillRun)
def main(cfg: DistillRun) -> float:
    """Returns the validation loss.

    Heavy imports wait until the configuration is known to be sound.
    """
    from train.engine.preflight import preflight
    from train.engine.runtime import start, stop
    from train.engine.trainer import fit
    from train.evaluation.in_training import small_evaluation
    from train.training.distillation.stage import DistillStage, as_training

    runtime = start(cfg.runtime)
    preflight(cfg, runtime)
    stage = DistillStage(cfg, runtime, small_evaluation(as_training(cfg), runtime))
    outcome = fit(stage, cfg, runtime)
    stop()
    return outcome.metrics["eval/loss"] if outcome.finished else math.nan


if __name__ == "__main__":
    main()
