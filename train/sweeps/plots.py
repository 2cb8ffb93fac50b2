"""Plots of a sweep over sampling: the distance against what it is traded for, and against the steps."""

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from train.sweeps.results import AGREEMENTS, SAMPLERS, SECONDS, Result, Sweep

DPI = 150
COLORS = (  # of samplers, in the order of the schema
    *("#7f7f7f", "#1f77b4", "#bcbd22", "#ff7f0e", "#8c564b", "#17becf"),
    *("#e377c2", "#9467bd", "#d62728", "#2ca02c", "#000000", "#0b4f6c", "#98df8a", "#8a2be2"),
)
MARKERS = "so^v><pPDXh*d8"
SIZES = (16.0, 90.0)  # of markers, in square points, at the fewest and the most steps
TITLES = {
    "eval/fid": "FID",
    "eval/clip_score": "CLIP score",
    "eval/clip_score_own": "CLIP score of the run's own CLIP",
    "eval/prompt_following": "prompt following",
    SECONDS: "seconds per image",
}
FRONT = "0.35"  # grey
LOG_RANGE = 4.0  # the axis of values that lie further apart is logarithmic


def title(metric: str) -> str:
    """A metric as people call it."""
    return TITLES.get(metric, metric.removeprefix("eval/"))


def pareto_figure(sweep: Sweep) -> Figure | None:
    """The distance against each of its rivals; None without any.

    Colour and marker tell the samplers apart (or whatever words were swept), size the steps; beside the markers stands
    the rest that was swept. A line shows the front: members that no other beats in both.
    """
    if not sweep.trade_offs:
        return None
    figure = Figure(figsize=(6.4 * len(sweep.trade_offs) + 1.6, 5.6), layout="constrained")
    looks = Looks(sweep)
    for metric, axes in zip(sweep.trade_offs, figure.subplots(1, len(sweep.trade_offs), squeeze=False)[0], strict=True):
        scatter(axes, sweep, metric, looks)
    figure.suptitle(f"{len(sweep.results)} ways of sampling")
    figure.legend(handles=looks.legend(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


class Looks:
    """How a member is drawn: its colour and marker, its size, and the words beside it."""

    def __init__(self, sweep: Sweep) -> None:
        words = [name for name in sweep.varied if any(isinstance(m.option(name), str) for m in sweep.results)]
        self.varied = sweep.varied
        self.kind = words[0] if words else None
        self.kinds = sweep.values(self.kind) if self.kind else [None]
        self.steps = sweep.values("steps") if "steps" in sweep.varied else [None]
        self.rest = [name for name in sweep.varied if name not in (self.kind, "steps")]
        self.paths = {name: apart(sweep.values(name)) for name in sweep.varied}

    def of_kind(self, kind: Any) -> dict[str, Any]:
        """A sampler always looks the same."""
        number = (SAMPLERS if kind in SAMPLERS else self.kinds).index(kind)
        return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}

    def of(self, result: Result) -> dict[str, Any]:
        return self.of_kind(result.option(self.kind) if self.kind else None)

    def size(self, steps: Any) -> float:
        """Area of a marker, in square points."""
        return SIZES[0] + (SIZES[1] - SIZES[0]) * self.steps.index(steps) / max(1, len(self.steps) - 1)

    def area(self, result: Result) -> float:
        return self.size(result.option("steps") if "steps" in self.varied else None)

    def radius(self, result: Result) -> float:
        """Radius of a marker, and a little more, in points."""
        return self.area(result) ** 0.5 / 2 + 1.5

    def text(self, result: Result) -> str:
        """What colour and size do not tell; of guidance the number alone."""
        words = (
            value if name == "guidance_scale" else f"{name}={value}"
            for name in self.rest
            for value in [self.word(name, result)]
        )
        return ", ".join(map(str, words))

    def word(self, name: str, result: Result) -> Any:
        """The value of an option; of a path what tells it from the others."""
        return self.paths.get(name, {}).get(result.option(name), result.option(name))

    def legend(self) -> list[Line2D]:
        """A line for each colour, and for each size."""
        marks = [
            Line2D([], [], linestyle="", label=str(kind), **self.of_kind(kind)) for kind in self.kinds if self.kind
        ]
        sizes = [(steps, self.size(steps) ** 0.5) for steps in self.steps if len(self.steps) > 1]
        grey: dict[str, Any] = {"linestyle": "", "marker": "o", "color": "0.6"}
        marks += [Line2D([], [], markersize=size, label=f"{steps} steps", **grey) for steps, size in sizes]
        return [*marks, Line2D([], [], color=FRONT, label="front: beaten by no other")]


def apart(values: Sequence[Any]) -> dict[Any, str]:
    """Of paths the parts in which they differ, from the first to the last; nothing of other values."""
    parts = {value: value.split("/") for value in values if isinstance(value, str) and "/" in value}
    if len(parts) < 2 or len(parts) < len(values):
        return {}
    shortest = min(map(len, parts.values()))
    ends = []
    for direction in (1, -1):
        rows = [path[::direction] for path in parts.values()]
        same = (len({row[place] for row in rows}) == 1 for place in range(shortest))
        ends.append(sum(takewhile(bool, same)))
    return {value: "/".join(path[ends[0] : len(path) - ends[1]]) or value for value, path in parts.items()}


def scatter(axes: Axes, sweep: Sweep, metric: str, looks: Looks) -> None:
    """One panel: the distance against a metric; of one sampler and steps a faint line over the guidance."""
    distance = sweep.distance
    assert distance is not None
    rising, front = metric in AGREEMENTS, sweep.front(metric)  # rising: more of it is better
    at = {m.name: (m.metrics[metric], m.metrics[distance]) for m in sweep.having(distance, metric)}
    results = [result for result in sweep.results if result.name in at]
    if rising and looks.rest == ["guidance_scale"]:
        for group in grouped(results, [name for name in sweep.varied if name != "guidance_scale"]):
            line = zip(*(at[result.name] for result in group), strict=True)
            axes.plot(*line, color=looks.of(group[0])["color"], linewidth=0.7, alpha=0.35, zorder=1)
    stairs: Any = "steps-pre" if rising else "steps-post"
    axes.plot(*zip(*(at[m.name] for m in front), strict=True), drawstyle=stairs, color=FRONT, linewidth=1, zorder=2)
    for result in results:
        if result not in front:
            look = {"s": looks.area(result), **looks.of(result)}
            axes.scatter(*at[result.name], edgecolors="white", linewidths=0.4, alpha=0.6, zorder=3, **look)
            annotate(axes, at[result.name], looks.radius(result), looks.text(result), fontsize=6, color="0.4")
    marks = []
    for number, result in enumerate(front):
        look = {"s": looks.area(result), **looks.of(result)}
        marks.append(axes.scatter(*at[result.name], edgecolors="black", linewidths=0.9, zorder=4, **look))
        away = looks.radius(result) * (1 if rising else -1)  # where a front leaves room
        annotate(axes, at[result.name], away, letter(number), drop=8, fontsize=8, weight="bold", zorder=6)
    names = [f"{letter(i)}  {', '.join(str(looks.word(n, m)) for n in sweep.varied)}" for i, m in enumerate(front)]
    axes.legend(marks, names, fontsize=7, title=f"front: {', '.join(sweep.varied)}", title_fontsize=7)
    name_axes(axes, metric, distance)
    for axis, values in zip("xy", zip(*at.values(), strict=True), strict=True):
        plain_log(axes, axis, values)


def letter(place: int) -> str:
    return chr(ord("A") + place) if place < 26 else str(place)


def annotate(axes: Axes, at: tuple[float, float], away: float, text: str, drop: float = 0, **words: Any) -> None:
    """Words `away` points to the right of a place, or to the left of it if negative, and `drop` points below."""
    side = "left" if away > 0 else "right"
    axes.annotate(text, at, (away, -drop), textcoords="offset points", ha=side, va="center", **words)


def grouped(results: Iterable[Result], names: Sequence[str]) -> list[list[Result]]:
    """Members that share these options, in their order."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(str(result.option(name)) for name in names), []).append(result)
    return list(groups.values())


def steps_figure(sweep: Sweep) -> Figure | None:
    """The distance and the agreement with the prompts against the steps, a line for each sampler; None if not swept.

    Faint bars are the confidence intervals.
    """
    if not sweep.of_samplers:
        return None
    metrics = [metric for metric in (sweep.distance, sweep.agreement) if metric is not None]
    figure = Figure(figsize=(5.6 * len(metrics) + 1.8, 5.2), layout="constrained")
    looks = Looks(sweep)
    for metric, axes in zip(metrics, figure.subplots(1, len(metrics), squeeze=False)[0], strict=True):
        for sampler in looks.kinds:
            results = [sweep.closest(sampler=sampler, steps=steps) for steps in looks.steps]
            shown = [result for result in results if result is not None and metric in result.metrics]
            x, look = [result.option("steps") for result in shown], looks.of_kind(sampler)
            axes.plot(x, [result.metrics[metric] for result in shown], markersize=5, linewidth=1.2, **look)
            bounds = [[m.metrics.get(f"{metric}_{end}", m.metrics[metric]) for m in shown] for end in ("low", "high")]
            axes.vlines(x, *bounds, color=look["color"], linewidth=3, alpha=0.3)
        name_axes(axes, "steps", metric)
        plain_log(axes, "y", [result.metrics[metric] for result in sweep.having(metric)])
        axes.set_xscale("log")
        axes.set_xticks(looks.steps, [str(steps) for steps in looks.steps])
        axes.xaxis.set_minor_formatter(NullFormatter())
    figure.suptitle(f"Samplers by steps{sweep.chosen}")
    lines = [Line2D([], [], markersize=5, label=str(kind), **looks.of_kind(kind)) for kind in looks.kinds]
    figure.legend(handles=lines, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def name_axes(axes: Axes, x: str, y: str) -> None:
    """Names, which way is better, and a faint grid."""
    named = {name: title(name) for name in (x, y)}
    for metric in {x, y} - {"steps"}:
        named[metric] += f" ({'more' if metric in AGREEMENTS else 'less'} is better)"
    axes.set(xlabel=named[x], ylabel=named[y])
    axes.grid(alpha=0.25, which="both", linewidth=0.5)


def plain_log(axes: Axes, axis: str, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers, where the values lie far apart."""
    if min(values) <= 0 or max(values) < LOG_RANGE * min(values):
        return
    getattr(axes, f"set_{axis}scale")("log")
    of = getattr(axes, f"{axis}axis")
    of.set_major_locator(LogLocator(subs=(1, 2, 5)))
    of.set_major_formatter(ScalarFormatter())
    of.set_minor_formatter(NullFormatter())
