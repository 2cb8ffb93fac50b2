"""Metrics of a trained U-Net or autoencoder on held-out data: `python train/evaluate.py run_dir=...`."""

from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from conf.entry import entry, to_object
from conf.schema import EvaluateRun, EvaluationSubject
from conf.sweep import wandb_group


def compare_members(folder: Path, sweep: str, composed: DictConfig) -> None:
    """After `-m`: tables and plots of the members, in `RUN/sweep/evaluate/pareto/`."""
    from train.sweeps import pareto

    wandb = to_object(composed.wandb)
    group = wandb.group or wandb_group(composed.run_dir, folder)
    pareto.write_pareto(folder, sweep, replace(wandb, group=group), composed.run_dir)


@entry("evaluate", EvaluateRun, after_sweep=compare_members)
def main(cfg: EvaluateRun) -> float:
    """Returns the FID where its weights are given, else the distance of the offline features.

    Heavy imports wait until the configuration is known to be sound.
    """
    from train.engine.runtime import start, stop
    from train.evaluation.run import evaluate_run
    from train.evaluation.watch import watch

    metrics = (watch if cfg.watch else evaluate_run)(cfg, start(cfg.runtime))
    stop()
    reconstructed = "r" if cfg.subject is EvaluationSubject.autoencoder else ""
    return metrics[f"eval/{reconstructed}{'fd_efficientnet' if cfg.inception is None else 'fid'}"]


if __name__ == "__main__":
    main()
