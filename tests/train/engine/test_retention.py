"""Which checkpoints stay: the newest always, and what the options add."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from conf.schema import LoopConfig
from train.engine.retention import kept, scores_of


def config(**options: Any) -> LoopConfig:
    return LoopConfig(checkpoint_every=100, evaluate_every=100, **options)


def run(cfg: LoopConfig, moments: list[int], scores: dict[int, float]) -> set[int]:
    """What is on the disk after checkpoints at these moments; a score is known from the next checkpoint on."""
    left: set[int] = set()
    for moment in moments:
        left = kept(left | {moment}, cfg, {seen: score for seen, score in scores.items() if seen < moment})
        assert moment in left
    return left


def test_last_ones_stay() -> None:
    assert run(config(keep_checkpoints=2), [100, 200, 300, 400], {}) == {300, 400}


def test_first_after_every_multiple_stays_whatever_a_signal_adds() -> None:
    moments = [100, 104, 200, 296, 304, 336, 400, 504, 600, 704]  # whole steps of 8, and two stops
    assert run(config(keep_checkpoints=1, keep_every=300), moments, {}) == {304, 600, 704}


@pytest.mark.parametrize(("highest", "best"), [(False, 300), (True, 200)])
def test_best_stays_although_it_is_old(highest: bool, best: int) -> None:
    scores = {100: 5.0, 200: 7.0, 300: 1.0, 400: 3.0, 500: 1.0, 600: float("nan")}
    cfg = config(keep_checkpoints=1, keep_best="eval/fid", best_is_highest=highest)
    assert run(cfg, [100, 200, 300, 400, 500, 600, 700], scores) == {best, 700}


def test_no_score_yet_keeps_the_newest_only() -> None:
    assert run(config(keep_checkpoints=1, keep_best="eval/fid"), [100, 200], {}) == {200}


def test_scores_are_read_from_the_metrics(tmp_path: Path) -> None:
    path, cfg = tmp_path / "metrics.jsonl", config(keep_best="eval/loss")
    assert scores_of(path, cfg) == {}  # nothing was evaluated yet
    rows = [
        {"samples_seen": 100, "train/loss": 1.0},
        {"samples_seen": 100, "eval/loss": 0.5, "eval/fid": 9.0},
        {"samples_seen": 200, "eval/loss": None, "eval/fid": 8.0},
        {"samples_seen": 300, "eval/loss": 0.25, "eval/fid": 7.0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"samples_seen": 40')
    assert scores_of(path, cfg) == {100: 0.5, 300: 0.25}
    assert scores_of(path, config()) == {}
    with pytest.raises(UserError, match=r"^loop.keep_best=eval/los: the evaluations give eval/fid, eval/loss; choose"):
        scores_of(path, config(keep_best="eval/los"))


def test_evaluation_without_a_checkpoint_is_refused() -> None:
    with pytest.raises(UserError, match=r"make loop\.evaluate_every a multiple of loop\.checkpoint_every"):
        LoopConfig(evaluate_every=250, checkpoint_every=100, keep_best="eval/loss")
