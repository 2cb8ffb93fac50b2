"""Tables and cards of a page: what came out, what it cost, and under which protocol."""

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.board.curves import TITLES, title_of
from train.board.panels import EVALUATIONS, bounds
from train.board.run_folder import ORDER, RunFolder, StageFolder
from train.engine.metric_log import X_AXIS
from train.engine.progress import duration

CREDENTIALS = re.compile(
    r"(?<=://)[^/\s@]+@|(?<=\?)[^\s'\"]*(?:key|sig|token|secret|credential)[^\s'\"]*", re.IGNORECASE
)
QUALIFIED = ("_low", "_high", "_std", "_floor")  # what stands beside a metric of that name
HARDWARE = ("device", "processes", "hosts", "torch")  # as `Runtime.hardware` names them
RECORDED = {"evaluation": "evaluate"}  # stages that the pipeline calls otherwise than their folders
COLUMNS = ("stage", "state", "time", "samples", "images/s", "MFU", "memory", "device hours", *HARDWARE)
HEADLINES = (  # (title, where it is looked for, in this order: stage and metric; how it is written)
    ("FID", (("evaluation", "eval/fid"), ("unet", "eval/loop/fid"), ("student", "eval/loop/fid")), "{:.2f}"),
    (
        "Fréchet distance, EfficientNet",
        (
            ("evaluation", "eval/fd_efficientnet"),
            ("unet", "eval/loop/fd_efficientnet"),
            ("student", "eval/loop/fd_efficientnet"),
        ),
        "{:,.0f}",
    ),
    ("Right kind drawn", (("evaluation", "eval/prompt_following/kind"),), "{:.1%}"),
    ("Right background", (("evaluation", "eval/prompt_following/background"),), "{:.1%}"),
    ("Right colour", (("evaluation", "eval/prompt_following/color"),), "{:.1%}"),
    ("CLIP score", (("evaluation", "eval/clip_score"),), "{:.3f}"),
    ("Validation loss", (("unet", "eval/loss"), ("student", "eval/loss")), "{:.4g}"),
    ("Reconstructions", (("autoencoder_evaluation", "eval/psnr"), ("autoencoder", "eval/psnr")), "{:.1f} dB"),
    ("Text to image retrieval", (("clip", "eval/retrieval_text_to_image"),), "{:.1%}"),
)


@dataclass(frozen=True, slots=True)
class Card:
    """One number that people ask for first."""

    title: str
    value: str
    note: str = ""


def cards(run: RunFolder) -> list[Card]:
    """Cards of the last evaluation; where there is none, of the last one in the training."""
    found = []
    for title, places, form in HEADLINES:
        for name, metric in places:
            value = run.stages[name].latest(metric) if name in run.stages else None
            if value is not None:
                found.append(Card(title, form.format(value), _note(run.stages[name], metric, form)))
                break
    unet = run.stages.get("unet", run.stages.get("student"))
    if unet:
        found.append(Card("Samples seen", f"{unet.samples_seen:,}", state(unet)))
    hours = [hours for stage in run.stages.values() if (hours := stage.latest("perf/device_hours")) is not None]
    if hours:
        found.append(Card("Device time", _hours(sum(hours)), _devices(run)))
    return found


def _note(stage: StageFolder, metric: str, form: str) -> str:
    low, high = (stage.latest(name) for name in bounds(metric))
    if low is None or high is None:
        return ""
    return f"{form.format(low)} to {form.format(high)}"


def last_evaluations(run: RunFolder) -> dict[str, list[dict[str, str]]]:
    """All metrics of each kind of evaluation after the most samples: value, interval, deviation and floor."""
    found = {}
    for name in EVALUATIONS:
        stage = run.stages.get(name)
        if stage:
            values: dict[str, float] = {}
            for row in stage.rows:
                if row[X_AXIS] == stage.samples_seen:
                    values |= {metric: value for metric, value in row.items() if "/" in metric and value is not None}
            found[f"{TITLES[name]} after {stage.samples_seen:,} samples"] = _measured(values)
    return found


def _measured(values: Mapping[str, float]) -> list[dict[str, str]]:
    rows = []
    for metric, value in values.items():
        if not metric.endswith(QUALIFIED):
            low, high, deviation, floor = (values.get(f"{metric}{suffix}") for suffix in QUALIFIED)
            row = {"metric": metric.removeprefix("eval/"), "value": f"{value:,.4g}"}
            row["interval"] = "" if low is None or high is None else f"{low:,.4g} to {high:,.4g}"
            row["deviation"] = "" if deviation is None else f"{deviation:,.3g}"
            rows.append(row | {"floor": "" if floor is None else f"{floor:,.4g}"})
    return rows


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.0f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"


def _devices(run: RunFolder) -> str:
    kinds = {str(stage.section("hardware").get("device", "")) for stage in run.stages.values()} - {""}
    return ", ".join(sorted(kinds))


def state(stage: StageFolder) -> str:
    """Where a stage is, in words."""
    if stage.done:
        return "done"
    return f"{stage.samples_seen / stage.samples:.0%} of {stage.samples:,}" if stage.samples else "begun"


def stage_table(run: RunFolder) -> list[dict[str, str]]:
    """One row for each stage that left something: how far, how fast, what it took."""
    rows = [row for name in ("build", *ORDER, "sample") if (row := _stage_row(run, name))]
    known = [column for column in COLUMNS if any(row[column] for row in rows)]
    return [{column: row[column] for column in known} for row in rows]


def _stage_row(run: RunFolder, name: str) -> dict[str, str]:
    stage = run.stages.get(name)
    command = "distill" if stage and stage.is_student else RECORDED.get(name, name)
    record = run.records.get(command, {})
    if stage is None and not record:
        return {}
    seconds = record.get("seconds") or (_seconds(stage) if stage else 0.0)
    row = dict.fromkeys(COLUMNS, "") | {
        "stage": title_of(run, name) if name in TITLES else name,
        "state": "done" if record.get("outcome") else state(stage) if stage else "begun",
        "time": duration(seconds) if seconds else "",
    }
    if stage is None:
        return row
    speed, mfu, memory = (stage.values(f"perf/{metric}") for metric in ("images_per_s", "mfu", "memory_gib"))
    hours, hardware = stage.latest("perf/device_hours"), stage.section("hardware")
    row["samples"] = f"{stage.samples_seen:,}"
    row["images/s"] = f"{statistics.median(speed):,.0f}" if speed else ""
    row["MFU"] = f"{statistics.median(mfu):.2f}" if mfu else ""
    row["memory"] = f"{max(memory):.1f} GiB" if memory else ""
    row["device hours"] = f"{hours:,.3g}" if hours is not None else ""
    return row | {name: str(hardware.get(name, "")) for name in HARDWARE}


def _seconds(stage: StageFolder) -> float:
    """Between the first and the last row, where no pipeline kept the time."""
    return float(stage.rows[-1]["time"] - stage.rows[0]["time"]) if len(stage.rows) > 1 else 0.0


def flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, value in words) of everything in a nested dictionary."""
    found: list[tuple[str, str]] = []
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            found += flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", "none" if value is None else str(value)))
    return found


def without_credentials(text: str) -> str:
    """A configuration that can be shown: addresses without their user, password and signature."""
    return CREDENTIALS.sub("…", text)
