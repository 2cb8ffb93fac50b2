"""Members of a sweep of `train/evaluate.py`: what was swept, what was measured, and which of them no other beats."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.plain_json import read_object
from conf.schema import Sampler
from conf.sweep import RECORD, records

SECONDS = "seconds_per_image"
AGREEMENT = "eval/prompt_following"  # the mean of what the probe reads
AGREEMENTS = ("eval/clip_score", "eval/clip_score_own", AGREEMENT)  # with the prompts; the best known first
BOUNDS = ("_low", "_high", "_floor")  # what stands beside a distance
PROTOCOL = ("samples", "reference", "reference_samples", "extractors", "resolution")  # what distances must share
NO_SAMPLING = ("experiment", "run_dir", "output_dir", "runtime", "wandb")  # options that change no image
FIRST = ("sampler", "steps", "guidance_scale")  # in tables and plots
WORDS = {"null": None, "none": None, "true": True, "false": False}
SAMPLERS = [sampler.value for sampler in Sampler]


@dataclass(kw_only=True, slots=True)
class Result:
    """One evaluation of a sweep."""

    name: str
    sweep: str  # the start of the sweep that ran it last
    options: dict[str, Any]  # of its command line
    protocol: dict[str, Any]
    metrics: dict[str, float]
    error: str | None  # why it counts for nothing

    def option(self, name: str) -> Any:
        """An option of the command line, or what the protocol says that it was; lists as they are written."""
        value = self.options.get(name, self.protocol.get(name))
        return str(value) if isinstance(value, list) else value


@dataclass(kw_only=True, slots=True)
class Sweep:
    """The members whose numbers can be compared, in the order of what was swept."""

    results: list[Result]
    varied: list[str]  # options that differ between them
    left_out: dict[str, str]  # other members, and why

    @property
    def distance(self) -> str | None:
        """The FID, or the Fréchet distance that most members have."""
        names = {name: None for m in self.results for name in m.metrics if name.startswith(("eval/fid", "eval/fd_"))}
        return self.most_common(sorted((n for n in names if not n.endswith(BOUNDS)), key=lambda n: n != "eval/fid"))

    @property
    def agreement(self) -> str | None:
        """The CLIP score, or what else says whether an image shows its prompt."""
        return self.most_common(AGREEMENTS)

    @property
    def trade_offs(self) -> list[str]:
        """Metrics that a smaller distance is paid with: following the prompts, and time."""
        wanted = [metric for metric in (self.agreement, SECONDS) if metric is not None]
        return [metric for metric in wanted if self.distance is not None and self.having(self.distance, metric)]

    def most_common(self, names: Sequence[str]) -> str | None:
        """The metric that most members have, the first of several; None where there is none."""
        counts = {name: sum(name in result.metrics for result in self.results) for name in names}
        return max(counts, key=counts.__getitem__) if any(counts.values()) else None

    def having(self, *metrics: str) -> list[Result]:
        return [result for result in self.results if all(metric in result.metrics for metric in metrics)]

    @property
    def of_samplers(self) -> bool:
        """Whether samplers and steps were swept."""
        return {"sampler", "steps"} <= set(self.varied)

    @property
    def chosen(self) -> str:
        """Which member stands for a sampler and its steps, where more was swept."""
        others = [name for name in self.varied if name not in ("sampler", "steps")]
        return f", each at the {' and '.join(others)} of its smallest distance" if others else ""

    def values(self, option: str) -> list[Any]:
        """What an option was, in order."""
        return sorted({result.option(option) for result in self.results}, key=order)

    def closest(self, **options: Any) -> Result | None:
        """The member with these options that has the smallest distance."""
        assert self.distance is not None
        fitting = [m for m in self.having(self.distance) if all(m.option(k) == value for k, value in options.items())]
        return min(fitting, key=lambda result: result.metrics[self.distance or ""], default=None)

    def front(self, metric: str) -> list[Result]:
        """Members that no other beats in both the distance and a metric, in the order of that metric."""
        assert self.distance is not None
        results = self.having(self.distance, metric)
        sign = -1 if metric in AGREEMENTS else 1
        costs = [(sign * result.metrics[metric], result.metrics[self.distance]) for result in results]
        return [results[i] for i in sorted(undominated(costs), key=lambda i: results[i].metrics[metric])]


def undominated(costs: Sequence[tuple[float, float]]) -> list[int]:
    """Points that no other one equals or beats in both costs and beats in one."""
    return [i for i, (a, b) in enumerate(costs) if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in costs)]


def read_sweep(folder: Path, sweep: str) -> Sweep:
    """What stands in a sweep's folder: the members of this start, and earlier ones of the same protocol."""
    results = [read_result(path) for path in records(folder)]
    sound = [result for result in results if result.error is None]
    newest = [result for result in sound if result.sweep == sweep] or sound
    left_out = {result.name: result.error for result in results if result.error is not None}
    for result in sound:
        differing = [protocol_differences(result, other) for other in newest]
        if all(differing):
            left_out[result.name] = f"of an earlier start, with other {', '.join(differing[0])}"
    kept = [result for result in sound if result.name not in left_out]
    names = dict.fromkeys([*FIRST, *(name for result in kept for name in result.options)])
    varied = [name for name in names if len({order(result.option(name)) for result in kept}) > 1]
    kept.sort(key=lambda result: [order(result.option(name)) for name in varied])
    return Sweep(results=kept, varied=varied, left_out=left_out)


def read_result(path: Path) -> Result:
    """A member by its member.json, beside which stand its metrics and its protocol."""
    record = read_object(path) or {"error": f"{RECORD} cannot be read", "overrides": [], "sweep": ""}
    metrics = read_object(path.with_name("metrics.json"))
    pairs = (override.lstrip("+").partition("=") for override in record["overrides"])  # ~NAME has no value
    options = {name: text for name, sign, text in pairs if sign}
    return Result(
        name=record.get("name", path.parent.name),
        sweep=record["sweep"],
        options={name: parsed(text) for name, text in options.items() if name.split(".")[0] not in NO_SAMPLING},
        protocol=read_object(path.with_name("protocol.json")),
        metrics=with_derived(metrics),
        error=record["error"] or (None if metrics else "no metrics.json in its folder"),
    )


def with_derived(metrics: dict[str, Any]) -> dict[str, float]:
    """The finite metrics, with the mean of the prompt following and the seconds that an image takes."""
    finite = {name: float(v) for name, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}
    following = [value for name, value in finite.items() if name.startswith(f"{AGREEMENT}/")]
    if following:
        finite[AGREEMENT] = sum(following) / len(following)
    if finite.get("perf/pictures_per_s", 0) > 0:
        finite[SECONDS] = 1 / finite["perf/pictures_per_s"]
    return finite


def protocol_differences(result: Result, other: Result) -> list[str]:
    """Parts of the protocol that make their distances differ by themselves."""
    return [name for name in PROTOCOL if result.protocol.get(name) != other.protocol.get(name)]


def parsed(text: str) -> int | float | str | None:
    """A value of the command line, as the protocol has it."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("'\"")


def order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, samplers as the schema lists them, other words by the alphabet."""
    if isinstance(value, int | float):
        return 0, value, ""
    return 1, SAMPLERS.index(value) if value in SAMPLERS else len(SAMPLERS), str(value)
