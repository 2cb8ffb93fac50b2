"""What a training of the U-Net will cost: `python train/plan.py accelerator=a100 gpus=256`."""

from conf.entry import entry
from conf.schema import PlanRun


@entry("plan", PlanRun)
def main(cfg: PlanRun) -> None:
    """Heavy imports wait until the configuration is known to be sound."""
    from train.planning.cost_report import print_cost
    from train.planning.estimate import estimate

    print_cost(cfg, estimate(cfg))


if __name__ == "__main__":
    main()
