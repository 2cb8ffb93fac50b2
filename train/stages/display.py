"""How far a chain of stages is: a live table on a terminal, else a line now and then; read from what stages tell."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from PIL import Image
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from conf.plain_json import loads
from conf.process import Told
from conf.schema import TerminalImages
from train.engine.progress import LINE_EVERY_S, duration, live_on
from train.stages.terminal_image import TerminalImage
from train.stages.time_left import MAIN, Pace, StageCost, Work, correction

QUIET_S = 60.0  # without a new row or line, after which no time left is told
LINE_EVERY = 0.02  # of the time so far, where there is no terminal: a training of days needs no 10,000 lines
NARROW = 80  # columns that a terminal has at least
TAIL_BYTES = 2**16  # of a file that is looked at again and again
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
    left_s: float | None = None  # as the stage itself reckoned when it last recorded its metrics
    quiet_s: float = 0.0  # since it last told anything
    elapsed_s: float = 0.0  # of all starts
    news: tuple[Any, ...] = ()  # what it told last
    news_at: float = 0.0  # and when that was seen, on the clock that never jumps
    work: Work = field(default_factory=Work)
    cost: StageCost | None = None  # that is expected of it
    pace: Pace = field(default_factory=Pace)
    began_at: float = 0.0  # this start
    finished: bool = False  # by an earlier start, as far as one can see
    begun: int = 0  # samples that a training has seen in earlier starts

    def __post_init__(self) -> None:
        self.pace.main = MAIN.get(self.name, "training")

    def begin(self) -> None:
        """It runs from now on."""
        self.state, self.finished, self.began_at = "running", False, time.monotonic()

    def read(self, output_dir: Path, log: str, since: float, told: Told | None = None) -> None:
        """Take in what the running stage recorded, put out and told; speed only from after `since` (Unix seconds)."""
        rows = tail(output_dir / "metrics.jsonl")
        for row in rows:
            self.seen = row.get("samples_seen", self.seen)
            self.loss = row.get("train/loss", self.loss)
            if row.get("perf/eta_s") is not None and row["time"] >= since:
                self.images_per_s = row.get("perf/images_per_s")
                self.left_s = row["perf/eta_s"]
        self.pace.hear(told)
        if work := self.pace.work:
            self.seen, self.total = max(self.seen or 0, work.done), work.total
            self.images_per_s = 1 / self.pace.sample_s if self.pace.sample_s else self.images_per_s
        news, now = (rows[-1:], log, told), time.monotonic()
        if news != self.news:
            self.news, self.news_at = news, now
        self.quiet_s = now - self.news_at

    @property
    def quiet(self) -> bool:
        """Whether it runs and has told nothing for a while."""
        return self.state == "running" and self.quiet_s > QUIET_S

    @property
    def rest_s(self) -> float | None:
        """Seconds until it is finished; None where nobody can know."""
        if self.finished or self.state in ("done", "skipped"):
            return 0.0
        if self.state != "running":
            return self.cost.seconds(self.work, self.begun) if self.cost else None
        now = time.monotonic()
        left = self.pace.left(now, self.work, self.cost, now - self.began_at, self.begun)
        return self.left_s if left is None else left

    @property
    def doing(self) -> str:
        """What the running stage is at, in words."""
        if (told := self.pace.told) is None:
            return "starting"
        return f"{told.doing} {short(told.done)}/{short(told.total)}" if told.total else told.doing

    @property
    def cells(self) -> dict[str, str]:
        """What is known, in words; units in the names."""
        rest_s = self.rest_s if self.state == "running" else None
        samples = "" if self.seen is None else short(self.seen)
        if samples and self.total:
            samples += f"/{short(self.total)}"
        return {
            "samples": samples,
            "images/s": "" if self.images_per_s is None else f"{self.images_per_s:,.0f}",
            "loss": "" if self.loss is None else f"{self.loss:.4g}",
            "left": f"quiet for {duration(self.quiet_s)}" if self.quiet else duration(rest_s) if rest_s else "",
            "elapsed": duration(self.elapsed_s) if self.elapsed_s else "",
        }


class Display:
    """Shows the rows; call `update` often, it decides what is worth a line."""

    def __init__(
        self,
        rows: Sequence[StageRow],
        console: Console | None = None,
        protocol: TerminalImages = TerminalImages.none,
    ) -> None:
        self.rows, self.protocol = rows, protocol
        self.console = console or Console(highlight=False)
        self.live = live_on(self.console)
        self.shown = {row.name: self._news(row) for row in rows}
        self.began = self.shown_at = time.monotonic()
        self.images = set[Path]()  # that were shown

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live is not None:
            self.live.update(self.table(), refresh=True)
            self.live.stop()

    def update(self) -> None:
        """Show what has changed."""
        if self.live is not None:
            self.live.update(Group(self.table(), self.status()), refresh=True)
            return
        now = time.monotonic()
        due = now - self.shown_at > max(LINE_EVERY_S, LINE_EVERY * (now - self.began))
        for row in self.rows:
            before, news = self.shown[row.name], self._news(row)
            if news[0] != before[0] or (due and news != before):
                self.shown[row.name], self.shown_at = news, time.monotonic()
                self.console.print(line(row, self.rest_s if row.state == "running" else None), soft_wrap=True)

    def show(self, name: str, image: Path | None, since: float) -> None:
        """Show the newest image of a stage, once, unless it is from before `since` (Unix seconds)."""
        if image is None or image in self.images or image.stat().st_mtime < since:
            return
        self.images.add(image)
        where = Text(str(image))
        if self.console.is_terminal:  # short, and can be clicked on
            where = Text(str(Path(*image.parts[-3:])), style=f"link {image.absolute().as_uri()}")
        self.console.print(Text(f"{name:<12}image    ") + where, soft_wrap=True)
        if self.protocol is not TerminalImages.none:
            with suppress(OSError, SyntaxError), Image.open(image) as opened:  # SyntaxError: of a broken PNG
                self.console.print(TerminalImage(self.protocol, opened), crop=False)

    @staticmethod
    def _news(row: StageRow) -> tuple[Any, ...]:
        """What of a row is worth a line; not the time that passes."""
        return row.state, row.seen, row.total, row.loss, row.pace.told and row.pace.told.doing, row.quiet

    def expect(self, costs: Mapping[str, StageCost]) -> None:
        """Say what stages cost, as a calibration found it; what they really took corrects it from now on."""
        factor = correction({row.name: row.pace for row in self.rows}, costs)
        for row in self.rows:
            row.cost = costs[row.name].times(factor) if row.name in costs else None

    @property
    def rest_s(self) -> float | None:
        """Seconds until all stages are finished; None while nobody can know."""
        left = [row.rest_s for row in self.rows]
        return None if None in left else sum(filter(None, left))

    def table(self) -> Table:
        """All stages, one a row."""
        gap = 2 if self.console.width > NARROW else 1
        table = Table("stage", "state", box=None, padding=(0, gap, 0, 0), pad_edge=False)
        for name in StageRow("").cells:
            table.add_column(name, justify="right", min_width=len("elapsed"), no_wrap=True)
        for row in self.rows:
            color = COLORS.get(row.state, "dim")
            table.add_row(row.name, Text(row.state, style=color), *row.cells.values())
        return table

    def status(self) -> Text:
        """What is being done, and how long all of it takes."""
        running = next((row for row in self.rows if row.state == "running"), None)
        doing = "" if running is None else f"{running.name}: {running.doing}\n"
        left = f", about {duration(self.rest_s)} left in all" if self.rest_s else ""
        so_far = f"{duration(sum(row.elapsed_s for row in self.rows))} so far"
        return Text.assemble("\n", doing, (so_far + left, "bold"), overflow="ellipsis", no_wrap=True)


def line(row: StageRow, rest_s: float | None = None) -> str:
    """One stage as plain text, with the time left of all stages."""
    known = [f"{name} {value}" for name, value in row.cells.items() if value]
    known += [row.doing] if row.state == "running" and row.pace.paused else []
    known += [f"in all {duration(rest_s)} left"] if rest_s else []
    return f"{row.name:<12}{row.state:<9}{'  '.join(known)}".rstrip()


def short(number: int) -> str:
    """A count in at most seven characters."""
    for size, letter in ((10**9, "G"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:,}"


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
