"""A run folder as one page: `python train/report.py run_dir=runs/demo` writes RUN/report.html.

With live=true it is served to this machine's own browser instead, and follows the run.
"""

from conf.entry import entry
from conf.schema import ReportRun


@entry("report", ReportRun)
def main(cfg: ReportRun) -> None:
    """Heavy imports wait until the configuration is known to be sound."""
    if cfg.live:
        from train.board.live import serve_report

        serve_report(cfg)
    else:
        from train.board.report import write_report

        write_report(cfg)


if __name__ == "__main__":
    main()
