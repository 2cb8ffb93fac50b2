"""A run folder as one page: `python train/report.py run_dir=runs/demo` writes RUN/report.html."""

from conf.entry import entry
from conf.schema import ReportRun


@entry("report", ReportRun)
def main(cfg: ReportRun) -> None:
    """Heavy imports wait until the configuration is known to be sound."""
    from train.board.report import write_report

    write_report(cfg)


if __name__ == "__main__":
    main()
