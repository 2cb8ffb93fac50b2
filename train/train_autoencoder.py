"""Train the autoencoder on image shards: `python train/train_autoencoder.py run_dir=...`."""

from conf.entry import entry
from conf.schema import AutoencoderRun


@entry("train_autoencoder", AutoencoderRun)
def main(cfg: AutoencoderRun) -> None:
    """Heavy imports wait until the configuration is known to be sound."""
    from train.engine.loop import run
    from train.engine.runtime import start, stop
    from train.stages.autoencoder import AutoencoderStage

    runtime = start(cfg.runtime)
    run(AutoencoderStage(cfg, runtime), cfg, runtime)
    stop()


if __name__ == "__main__":
    main()
