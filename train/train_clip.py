"""Train CLIP on image-text shards: `python train/train_clip.py run_dir=...`."""

from conf.entry import entry
from conf.schema import ClipRun


@entry("train_clip", ClipRun)
def main(cfg: ClipRun) -> None:
    """Heavy imports wait until the configuration is known to be sound."""
    from train.engine.loop import run
    from train.engine.runtime import start, stop
    from train.stages.clip import ClipStage

    runtime = start(cfg.runtime)
    run(ClipStage(cfg, runtime), cfg, runtime)
    stop()


if __name__ == "__main__":
    main()
