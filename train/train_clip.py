"""Train CLIP on image-text shards: `python train/train_clip.py run_dir=...`."""

import math

from conf.entry import entry
from conf.schema import ClipRun


@entry("train_clip", ClipRun)
def main(cfg: ClipRun) -> float:
    """Returns the share of held-out pairs that are not found, over both directions.

    Heavy imports wait until the configuration is known to be sound.
    """
    from train.engine.preflight import preflight
    from train.engine.runtime import start, stop
    from train.engine.trainer import fit
    from train.training.clip import ClipStage

    runtime = start(cfg.runtime)
    preflight(cfg, runtime)
    outcome = fit(ClipStage(cfg, runtime), cfg, runtime)
    stop()
    if not outcome.finished:
        return math.nan
    return 1 - (outcome.metrics["eval/retrieval_image_to_text"] + outcome.metrics["eval/retrieval_text_to_image"]) / 2


if __name__ == "__main__":
    main()
