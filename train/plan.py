"""What a training of the U-Net will cost: `python train/plan.py accelerator=a100 gpus=256`."""

from conf.entry import entry
from conf.schema import PlanRun


@entry("plan", PlanRun)
def main(cfg: PlanRun) -> None:
    """Heavy imports wait until the configuration is known to be sound."""
    from train.stages.cost import estimate
    from train.stages.cost_report import report

    report(cfg, estimate(cfg))


if __name__ == "__main__":
    main()
