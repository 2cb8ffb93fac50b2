"""Metrics of a trained U-Net on held-out prompts: `python train/evaluate.py run_dir=...`."""

from conf.entry import entry
from conf.schema import EvaluateRun


@entry("evaluate", EvaluateRun)
def main(cfg: EvaluateRun) -> None:
    """Heavy imports wait until the configuration is known to be sound."""
    from train.engine.runtime import start, stop
    from train.evaluation.evaluate import run

    run(cfg, start(cfg.runtime))
    stop()


if __name__ == "__main__":
    main()
