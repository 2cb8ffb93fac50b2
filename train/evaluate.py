"""Metrics of a trained U-Net or autoencoder on held-out data: `python train/evaluate.py run_dir=...`."""

from conf.entry import entry
from conf.schema import EvaluateRun, EvaluationSubject


@entry("evaluate", EvaluateRun)
def main(cfg: EvaluateRun) -> float:
    """Returns the FID where its weights are given, else the distance of the offline features.

    Heavy imports wait until the configuration is known to be sound.
    """
    from train.engine.runtime import start, stop
    from train.evaluation.evaluate import run
    from train.evaluation.watch import watch

    metrics = (watch if cfg.watch else run)(cfg, start(cfg.runtime))
    stop()
    reconstructed = "r" if cfg.subject is EvaluationSubject.autoencoder else ""
    return metrics[f"eval/{reconstructed}{'fd_efficientnet' if cfg.inception is None else 'fid'}"]


if __name__ == "__main__":
    main()
