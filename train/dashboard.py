"""The W&B workspace of a run: `python train/dashboard.py run_dir=runs/demo`, with `save=true` on the server, too."""

from conf.entry import entry
from conf.schema import DashboardRun


@entry("dashboard", DashboardRun)
def main(cfg: DashboardRun) -> None:
    """Heavy imports wait until the configuration is known to be sound."""
    from train.board.dashboard import write_dashboard

    write_dashboard(cfg)


if __name__ == "__main__":
    main()
