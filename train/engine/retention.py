"""Which checkpoints a run keeps."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path

from conf.errors import UserError
from conf.schema import LoopConfig
from train.engine.metric_log import X_AXIS, read_metrics


def kept(samples: Collection[int], cfg: LoopConfig, scores: Mapping[int, float]) -> set[int]:
    """Of complete checkpoints, by their samples seen: the newest, the first after every multiple, the best.

    Args:
        scores: value of `cfg.keep_best` at the evaluations so far, by their samples seen.

    """
    ordered = sorted(samples)
    keep = set(ordered[-cfg.keep_checkpoints :])
    if cfg.keep_every > 0:
        first = {seen // cfg.keep_every: seen for seen in reversed(ordered)}
        keep |= {seen for multiple, seen in first.items() if multiple > 0}
    sign = -1 if cfg.best_is_highest else 1
    rated = [(sign * scores[seen], seen) for seen in ordered if math.isfinite(scores.get(seen, math.nan))]
    return keep | ({min(rated)[1]} if rated else set())


def scores_of(metrics: Path, cfg: LoopConfig) -> dict[int, float]:
    """What `metrics.jsonl` says of `keep_best`; raises UserError when the evaluations give no such metric."""
    if cfg.keep_best is None:
        return {}
    rows = [row for row in read_metrics(metrics) if any(name.startswith("eval/") for name in row)]
    found = sorted({name for row in rows for name in row if name.startswith("eval/")})
    if found and cfg.keep_best not in found:
        raise UserError(f"loop.keep_best={cfg.keep_best}: the evaluations give {', '.join(found)}; choose one of these")
    return {row[X_AXIS]: row[cfg.keep_best] for row in rows if row.get(cfg.keep_best) is not None}
