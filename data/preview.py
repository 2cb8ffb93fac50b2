"""Look at a data set before training on it: a contact sheet and its statistics, as a page and as images.

python data/preview.py run_dir=runs/demo
python data/preview.py run_dir=runs/demo data=runs/demo/latents/train
"""

from conf.entry import entry
from conf.schema import PreviewRun


@entry("preview", PreviewRun)
def main(cfg: PreviewRun) -> None:
    """Heavy imports wait until the configuration is known to be sound."""
    from train.board.preview import write_preview
    from train.engine.runtime import start, stop

    write_preview(cfg, start(cfg.runtime))
    stop()


if __name__ == "__main__":
    main()
