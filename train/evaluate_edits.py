"""How well edits of a run trained on the built-in scenes do what they say: `python train/evaluate_edits.py run=...`."""

from conf.entry import entry
from conf.schema import EvaluateEditsRun


@entry("evaluate_edits", EvaluateEditsRun)
def main(cfg: EvaluateEditsRun) -> float:
    """Returns the share of edits whose attribute is right.

    Heavy imports wait until the configuration is known to be sound.
    """
    from train.editing.evaluate import evaluate_edits
    from train.engine.runtime import start, stop

    metrics = evaluate_edits(cfg, start(cfg.runtime))
    stop()
    return metrics["eval/edits/all/right"]


if __name__ == "__main__":
    main()
