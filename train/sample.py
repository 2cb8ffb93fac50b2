"""Prompts to PNGs and a grid: `python train/sample.py run_dir=...`."""

from conf.entry import entry
from conf.schema import SampleRun


@entry("sample", SampleRun)
def main(cfg: SampleRun) -> None:
    """Heavy imports wait until the configuration is known to be sound."""
    from train.engine.runtime import start, stop
    from train.sampling.run import sample

    sample(cfg, start(cfg.runtime))
    stop()


if __name__ == "__main__":
    main()
