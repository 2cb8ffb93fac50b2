"""Metrics of a trained U-Net on held-out prompts: `python train/evaluate.py run_dir=...`."""

from conf.entry import entry
from conf.schema import EvaluateRun


@entry("evaluate", EvaluateRun)
def main(cfg: EvaluateRun) -> float:
    """Returns the FID where its weights are given, else the distance of the offline features.

    Heavy imports wait until the configuration is known to be sound.
    """
    from train.engine.runtime import start, stop
    from train.evaluation.evaluate import run

    metrics = run(cfg, start(cfg.runtime))
    stop()
    return metrics["eval/fd_efficientnet" if cfg.inception is None else "eval/fid"]


if __name__ == "__main__":
    main()
