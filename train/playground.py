"""A page on which one draws images and edits them by their words: `python train/playground.py run_dir=runs/demo`."""

from conf.entry import entry
from conf.schema import PlaygroundRun


@entry("playground", PlaygroundRun)
def main(cfg: PlaygroundRun) -> None:
    """Heavy imports wait until the configuration is known to be sound."""
    from train.board.playground.server import serve
    from train.engine.runtime import start

    serve(cfg, start(cfg.runtime))


if __name__ == "__main__":
    main()
