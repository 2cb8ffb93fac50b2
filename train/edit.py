"""An image before and after an edit of its prompt: `python train/edit.py run=... prompt="..." edit="..."`."""

from conf.entry import entry
from conf.schema import EditRun


@entry("edit", EditRun)
def main(cfg: EditRun) -> None:
    """Heavy imports wait until the configuration is known to be sound."""
    from train.editing.run import draw_edits
    from train.engine.runtime import start, stop

    draw_edits(cfg, start(cfg.runtime))
    stop()


if __name__ == "__main__":
    main()
