"""How far a chain of stages is: a live table on a terminal, else a line now and then; read from what stages write."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conf.plain_json import loads
from train.engine.progress import LINE_EVERY_S, duration, live_on

QUIET_S = 60.0  # without a new row or line, after which no time left is told
TAIL_BYTES = 2**16  # of a file that is looked at again and again
BUILT = re.compile(r"build: (\d+)/(\d+) samples")  # what data/build_shards.py tells where it has no terminal
COLORS = {"running": "bold cyan", "done": "green", "skipped": "green", "failed": "bold red", "stopped": "yellow"}


@dataclass(slots=True)
class StageRow:
    """What is known of one stage while it runs."""

    name: str
    total: int = 0  # samples; 0: not known
    state: str = "waiting"  # then running; at last done, skipped (was done before), failed or stopped
    seen: int | None = None  # samples
    images_per_s: float | None = None
    loss: float | None = None
    left_s: float | None = None  # as estimated when it last told of progress
    quiet_s: float = 0.0  # since it last told anything
    elapsed_s: float = 0.0  # of all starts
    news: tuple[Any, ...] = ()  # what it told last
    news_at: float = 0.0  # and when that was seen, on the clock that never jumps

    def read(self, output_dir: Path, log: str, since: float) -> None:
        """Take in what the running stage recorded and put out; speed only from after `since` (Unix seconds)."""
        rows = tail(output_dir / "metrics.jsonl")
        for row in rows:
            self.seen = row.get("samples_seen", self.seen)
            self.loss = row.get("train/loss", self.loss)
            if row.get("perf/eta_s") is not None and row["time"] >= since:
                self.images_per_s = row.get("perf/images_per_s")
                self.left_s = row["perf/eta_s"]
        built = BUILT.findall(log)
        if built:
            self.seen, self.total = map(int, built[-1])
        news, now = (rows[-1:], log), time.monotonic()
        if news != self.news:
            self.news, self.news_at = news, now
        self.quiet_s = now - self.news_at

    @property
    def quiet(self) -> bool:
        """Whether it runs and has told nothing for a while."""
        return self.state == "running" and self.quiet_s > QUIET_S

    @property
    def cells(self) -> dict[str, str]:
        """What is known, in words; units in the names."""
        left = duration(self.left_s) if self.state == "running" and self.left_s else ""
        samples = "" if self.seen is None else f"{self.seen:,}"
        if samples and self.total:
            samples += f"/{self.total:,}"
        return {
            "samples": samples,
            "images/s": "" if self.images_per_s is None else f"{self.images_per_s:,.0f}",
            "loss": "" if self.loss is None else f"{self.loss:.4g}",
            "left": f"quiet for {duration(self.quiet_s)}" if self.quiet else left,
            "elapsed": duration(self.elapsed_s) if self.elapsed_s else "",
        }


class Display:
    """Shows the rows; call `update` often, it decides what is worth a line."""

    def __init__(self, rows: Sequence[StageRow], console: Console | None = None) -> None:
        self.rows = rows
        self.console = console or Console(highlight=False)
        self.live = live_on(self.console)
        self.shown = {row.name: self._news(row) for row in rows}
        self.shown_at = time.monotonic()

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live is not None:
            self.update()
            self.live.stop()

    def update(self) -> None:
        """Show what has changed."""
        if self.live is not None:
            self.live.update(self.table(), refresh=True)
            return
        due = time.monotonic() - self.shown_at > LINE_EVERY_S
        for row in self.rows:
            before, news = self.shown[row.name], self._news(row)
            if news[0] != before[0] or (due and news != before):
                self.shown[row.name], self.shown_at = news, time.monotonic()
                self.console.print(line(row), soft_wrap=True)

    @staticmethod
    def _news(row: StageRow) -> tuple[Any, ...]:
        """What of a row is worth a line; not the time that passes."""
        return row.state, row.seen, row.total, row.loss, row.quiet

    def table(self) -> Table:
        """All stages, one a row."""
        table = Table("stage", "state", box=None, padding=(0, 2, 0, 0))
        for name in StageRow("").cells:
            table.add_column(name, justify="right", min_width=len("elapsed"))
        for row in self.rows:
            color = COLORS.get(row.state, "dim")
            table.add_row(row.name, Text(row.state, style=color), *row.cells.values())
        return table


def line(row: StageRow) -> str:
    """One stage as plain text."""
    known = [f"{name} {value}" for name, value in row.cells.items() if value]
    return f"{row.name:<12}{row.state:<9}{'  '.join(known)}".rstrip()


def print_summary(console: Console, paths: Mapping[str, Path], summary: Mapping[str, float]) -> None:
    """The end of a run: metrics, times, and where things are."""
    width = max(map(len, summary), default=0) + 2
    console.print("\nmetrics", style="bold")
    for name, value in summary.items():
        if not name.startswith("seconds/"):
            console.print(f"  {name:<{width}}{value:.4g}", soft_wrap=True)
    console.print("time", style="bold")
    for name, value in summary.items():
        if name.startswith("seconds/"):
            console.print(f"  {name.removeprefix('seconds/'):<{width}}{duration(value)}", soft_wrap=True)
    console.print("files", style="bold")
    for name, path in paths.items():
        console.print(Text(f"  {name:<{width}}{path}"), soft_wrap=True)  # as text: a folder may be called [bold]


def tail(path: Path) -> list[dict[str, Any]]:
    """The last rows of a metrics.jsonl; a line that is still being written is left out."""
    rows = []
    for text in tail_text(path).splitlines():
        try:
            row = loads(text)
        except ValueError:  # the first line of the tail or the last of the file: a part of one
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def tail_text(path: Path, start: int = 0) -> str:
    """The end of a file, from byte `start` on at most; nothing where there is no file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(start, size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
