"""Train the autoencoder on image shards: `python train/train_autoencoder.py run_dir=...`."""

import math

from conf.entry import entry
from conf.schema import AutoencoderRun


@entry("train_autoencoder", AutoencoderRun)
def main(cfg: AutoencoderRun) -> float:
    """Returns minus the PSNR of held-out reconstructions, in dB.

    Heavy imports wait until the configuration is known to be sound.
    """
    from train.engine.preflight import preflight
    from train.engine.runtime import start, stop
    from train.engine.trainer import fit
    from train.training.autoencoder import AutoencoderStage

    runtime = start(cfg.runtime)
    preflight(cfg, runtime)
    outcome = fit(AutoencoderStage(cfg, runtime), cfg, runtime)
    stop()
    return -outcome.metrics["eval/psnr"] if outcome.finished else math.nan


if __name__ == "__main__":
    main()
