"""A run as others load it: `python train/export.py run_dir=...` writes a pipeline folder of diffusers."""

from conf.entry import entry
from conf.schema import ExportRun


@entry("export", ExportRun)
def main(cfg: ExportRun) -> None:
    """Heavy imports wait until the configuration is known to be sound."""
    from train.exporting.export import export_model

    export_model(cfg)


if __name__ == "__main__":
    main()
