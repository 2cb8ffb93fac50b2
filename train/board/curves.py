"""Rows of metrics.jsonl as charts: what `page/report.js` draws."""

import math
from collections.abc import Sequence
from operator import itemgetter
from posixpath import commonpath
from typing import Any

from train.board.panels import EVALUATIONS, SECTIONS, TRAININGS, Panel, bounds
from train.board.run_folder import RunFolder, StageFolder
from train.engine.metric_log import X_AXIS

POINTS = 600  # of a curve, at most; longer ones become means
TITLES = {
    "autoencoder": "autoencoder",
    "clip": "CLIP",
    "latents": "latents",
    "unet": "U-Net",
    "student": "student",
    "evaluation": "evaluation",
    "autoencoder_evaluation": "autoencoder evaluation",
}

Point = tuple[int, float | None]


def title_of(run: RunFolder, name: str) -> str:
    """What a stage is called on the page."""
    student = name in run.stages and run.stages[name].is_student
    return TITLES["student" if student else name]


def sections(run: RunFolder) -> dict[str, list[dict[str, Any]]]:
    """Section → its charts; only those that have something to show."""
    sections = {
        title: [chart for panel in panels for chart in charts(run, panel)] for title, panels in SECTIONS.items()
    }
    return {title: found for title, found in sections.items() if found}


def charts(run: RunFolder, panel: Panel) -> list[dict[str, Any]]:
    """A chart for each training, with what its evaluations logged."""
    groups: dict[str, list[StageFolder]] = {}
    for name in panel.stages:
        if name in run.stages:
            groups.setdefault(EVALUATIONS.get(name, name), []).append(run.stages[name])
    several = panel.stages == TRAININGS or len(groups) > 1
    found = []
    for owner, stages in groups.items():
        lines = [line for metric in panel.metrics for line in lines_of(panel, metric, stages)]
        if lines:
            title = f"{panel.title} · {title_of(run, owner)}" if several else panel.title
            facts = {"panel": panel.title, "title": title, "unit": panel.unit, "logarithmic": panel.logarithmic}
            found.append(facts | {"lines": lines})
    return found


def lines_of(panel: Panel, metric: str, stages: Sequence[StageFolder]) -> list[dict[str, Any]]:
    """The curve of a metric in each stage that has it, with the band around it."""
    curves = {stage.name: (stage.rows, curve(stage.rows, metric)) for stage in stages}
    known = {name: found for name, found in curves.items() if any(value is not None for _, value in found[1])}
    lines = []
    for name, (rows, points) in known.items():
        where = f" · {TITLES[name]}" if len(known) > 1 else ""
        line: dict[str, Any] = {"name": short_name(metric, panel) + where, "points": thinned(points)}
        if metric in panel.bounded:
            line["band"] = band(rows, metric)
        lines.append(line)
    return lines


def moves(chart: dict[str, Any]) -> bool:
    """Whether it shows more than one moment."""
    return any(len(line["points"]) > 1 for line in chart["lines"])


def curve(rows: Sequence[dict[str, Any]], metric: str) -> list[Point]:
    """(samples seen, value) of each row that has the metric; None where it was not finite."""
    return sorted(((row[X_AXIS], rounded(row[metric])) for row in rows if metric in row), key=itemgetter(0))


def band(rows: Sequence[dict[str, Any]], metric: str) -> list[tuple[int, float, float]]:
    """(samples seen, low, high) where both ends are known."""
    low, high = bounds(metric)
    return sorted((row[X_AXIS], row[low], row[high]) for row in rows if None not in (row.get(low), row.get(high)))


def rounded(value: float | None) -> float | None:
    """A number as exact as a chart can show."""
    return None if value is None else float(f"{value:.6g}")


def thinned(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """At most so many points, each the mean of its neighbours; values that are not finite stay gaps."""
    size = math.ceil(len(points) / most)
    if size <= 1:
        return list(points)
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    return [(bucket[-1][0], mean([value for _, value in bucket])) for bucket in buckets]


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the finite values; None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def short_name(metric: str, panel: Panel) -> str:
    """What tells a metric from the others of its panel: its name without the folders that all of them share."""
    shared = commonpath([name.rpartition("/")[0] for name in panel.metrics]).split("/")
    return "/".join(metric.split("/")[len(shared) :])
