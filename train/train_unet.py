"""Train the U-Net on cached latents: `python train/train_unet.py run_dir=...`."""

from conf.entry import entry
from conf.schema import UNetRun


@entry("train_unet", UNetRun)
def main(cfg: UNetRun) -> None:
    """Heavy imports wait until the configuration is known to be sound."""
    from train.engine.loop import run
    from train.engine.runtime import start, stop
    from train.stages.unet import UNetStage

    runtime = start(cfg.runtime)
    run(UNetStage(cfg, runtime), cfg, runtime)
    stop()


if __name__ == "__main__":
    main()
