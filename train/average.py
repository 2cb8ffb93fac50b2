"""Another average of the U-Net's weights as an export: `python train/average.py run_dir=... sigma_rel=0.08`."""

from conf.entry import entry
from conf.schema import AverageRun


@entry("average", AverageRun)
def main(cfg: AverageRun) -> None:
    """Heavy imports wait until the configuration is known to be sound."""
    from train.exporting.average import export_average

    export_average(cfg)


if __name__ == "__main__":
    main()
