"""What follows a sweep of `train/evaluate.py`: its tables, its plots, and a W&B run that holds both.

RUN/sweep/evaluate/pareto/    table.md, members.csv, pareto.json, pareto.png, steps.png, wandb/
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.files import atomic_write
from conf.plain_json import dumps
from conf.schema import WandbConfig, WandbMode
from train.engine.figures import to_png
from train.engine.metric_log import METRICS, X_AXIS, WandbCopy, read_metrics, say, wandb_mode
from train.sweeps.plots import DPI, pareto_figure, steps_figure, title
from train.sweeps.results import AGREEMENT, SECONDS, Result, Sweep, read_sweep

STAGE = "pareto"


def write_pareto(folder: Path, sweep: str, cfg: WandbConfig, run_dir: str) -> None:
    """Tables and plots of all members in a sweep's folder that can be compared with those of this start."""
    found = read_sweep(folder, sweep)
    for name, reason in found.left_out.items():
        say(STAGE, f"without {name}: {reason}")
    if found.distance is None:
        say(STAGE, "no member with a Fréchet distance: there is nothing to draw")
        return
    out, text = folder / STAGE, "\n\n".join(tables(found))
    print(f"\n{text}\n", flush=True)
    atomic_write(out / "table.md", f"{text}\n".encode())
    atomic_write(out / "members.csv", as_csv(rows(found)).encode())
    atomic_write(out / "pareto.json", dumps(as_json(found), indent=1).encode())
    images = {}
    for name, figure in (("pareto", pareto_figure(found)), ("steps", steps_figure(found))):
        if figure is not None:
            images[name] = out / f"{name}.png"
            atomic_write(images[name], to_png(figure, DPI))
    log(found, folder, cfg, run_dir, images)
    say(STAGE, ", ".join(map(str, [out / "table.md", *images.values()])))


def log(sweep: Sweep, folder: Path, cfg: WandbConfig, run_dir: str, images: Mapping[str, Path]) -> None:
    """A W&B run of its own, beside the members: the table, a chart for each plot of it, the images."""
    mode = wandb_mode(cfg.mode)
    if mode is WandbMode.disabled:
        return
    seen = [row[X_AXIS] for result in sweep.results for row in read_metrics(folder / result.name / METRICS)]
    at = max(seen, default=0)
    copy = WandbCopy(folder / STAGE, cfg, mode, STAGE, {"run_dir": run_dir, "swept": sweep.varied})
    distance = sweep.distance or ""
    charts = {f"{STAGE}/{title(distance)} against {title(x)}": (x, distance) for x in sweep.trade_offs}
    copy.table(f"{STAGE}/members", rows(sweep), charts, at)
    for name, path in images.items():
        copy.image(f"samples/{name}", path, at, "")
    copy.finish(0)


def rows(sweep: Sweep) -> list[dict[str, Any]]:
    """A flat row for each member, all with the same columns."""
    metrics = sorted({name for result in sweep.results for name in result.metrics})
    return [
        {"member": m.name}
        | {name: m.option(name) for name in sweep.varied}
        | {name: m.metrics.get(name) for name in metrics}
        | {"front": ", ".join(fronts(sweep, m))}
        for m in sweep.results
    ]


def as_csv(table: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, table[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def as_json(sweep: Sweep) -> dict[str, Any]:
    """All that the plots rest on; `front` names the metrics against which no other member is better."""
    results = [
        {
            "member": result.name,
            "options": {name: result.option(name) for name in sweep.varied},
            "metrics": result.metrics,
            "front": fronts(sweep, result),
        }
        for result in sweep.results
    ]
    return {"swept": sweep.varied, "distance": sweep.distance, "members": results, "left_out": sweep.left_out}


def fronts(sweep: Sweep, result: Result) -> list[str]:
    return [metric for metric in sweep.trade_offs if result in sweep.front(metric)]


def tables(sweep: Sweep) -> Iterator[str]:
    """All members, and where samplers and steps were swept, the distance and the agreement of each pair."""
    assert sweep.distance is not None
    shown = dict.fromkeys(filter(None, (sweep.distance, sweep.agreement, AGREEMENT, SECONDS)))
    metrics = [metric for metric in shown if sweep.having(metric)]
    body = [
        [
            *(str(result.option(name)) for name in sweep.varied),
            *(with_interval(result, metric) for metric in metrics),
            *([", ".join(map(title, fronts(sweep, result)))] if sweep.trade_offs else []),
        ]
        for result in sweep.results
    ]
    front = ["on the front with"] if sweep.trade_offs else []
    yield markdown([*sweep.varied, *map(title, metrics), *front], body)
    if sweep.of_samplers:
        yield f"By steps{sweep.chosen}:"
        yield from (by_steps(sweep, metric) for metric in (sweep.distance, sweep.agreement) if metric is not None)


def by_steps(sweep: Sweep, metric: str) -> str:
    """A metric of each sampler (lines) at each number of steps (columns)."""
    steps, samplers = sweep.values("steps"), sweep.values("sampler")
    body = []
    for sampler in samplers:
        results = [sweep.closest(sampler=sampler, steps=count) for count in steps]
        body.append([sampler, *("" if result is None else with_interval(result, metric) for result in results)])
    return markdown([title(metric), *(f"{count} steps" for count in steps)], body)


def with_interval(result: Result, metric: str) -> str:
    """A metric, and its confidence interval where there is one."""
    if metric not in result.metrics:
        return ""
    bounds = [result.metrics.get(f"{metric}_{end}") for end in ("low", "high")]
    interval = "" if None in bounds else f" [{bounds[0]:.4g}, {bounds[1]:.4g}]"
    return f"{result.metrics[metric]:.4g}{interval}"


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table that reads well as it is, too."""
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *body)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
