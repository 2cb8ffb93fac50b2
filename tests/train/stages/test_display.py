"""The table of a pipeline: time left is estimated from progress alone, and a stage that stands still says so."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from train.engine.progress import LINE_EVERY_S
from train.stages import display as progress
from train.stages.display import QUIET_S, Display, StageRow, line


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def wrote(folder: Path, clock: Clock, seen: int, eta_s: float) -> None:
    values: dict[str, Any] = {"samples_seen": seen, "time": clock.now, "train/loss": 0.5, "perf/eta_s": eta_s}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def test_time_left_stands_still_while_nothing_moves(clock: Clock, tmp_path: Path) -> None:
    row = StageRow("unet", 1000, "running")
    wrote(tmp_path, clock, 100, 90.0)
    row.read(tmp_path, "", since=clock.now)
    assert row.cells["left"] == "1:30"
    clock.now += QUIET_S - 1
    row.read(tmp_path, "", since=0)
    assert row.cells["left"] == "1:30"
    clock.now += 61
    row.read(tmp_path, "", since=0)
    assert row.cells["left"] == "quiet for 2:00"
    wrote(tmp_path, clock, 200, 80.0)
    row.read(tmp_path, "", since=0)
    assert row.cells["left"] == "1:20"
    row.state = "done"
    assert row.cells["left"] == ""


def test_a_stage_that_tells_of_anything_is_not_quiet(clock: Clock, tmp_path: Path) -> None:
    row, log = StageRow("evaluate", 0, "running"), ""
    for _ in range(20):
        clock.now += QUIET_S / 2
        log += "evaluation  one more\n"
        row.read(tmp_path, log, since=0)
        assert not row.quiet


def test_without_a_terminal_a_line_is_told_only_when_something_changed(clock: Clock, tmp_path: Path) -> None:
    row, out = StageRow("unet", 1000), io.StringIO()
    with Display([row], Console(file=out, width=100)) as display:
        row.state = "running"
        display.update()
        for second in range(400):
            if second % 30 == 0 and second < 90:
                wrote(tmp_path, clock, second, 90.0 - second)
            clock.now += 1
            row.elapsed_s += 1
            row.read(tmp_path, "", since=0)
            display.update()
    lines = out.getvalue().splitlines()
    assert len(lines) == 5  # its start, three times progress, and once that it is quiet
    assert [part.partition("samples ")[2][:8].strip() for part in lines[1:4]] == ["0/1,000", "30/1,000", "60/1,000"]
    assert "quiet for 1:0" in lines[4] and "left 0:30" in lines[3]


def test_progress_in_each_moment_is_told_now_and_then(clock: Clock, tmp_path: Path) -> None:
    row, out = StageRow("unet", 1000, "running"), io.StringIO()
    display = Display([row], Console(file=out, width=100))
    for second in range(100):
        clock.now += 1
        wrote(tmp_path, clock, second, 99.0 - second)
        row.read(tmp_path, "", since=0)
        display.update()
    assert len(out.getvalue().splitlines()) == pytest.approx(100 / LINE_EVERY_S, abs=2)


def test_a_line_holds_what_is_known() -> None:
    assert line(StageRow("clip", 10, "running", seen=5, left_s=3.0, elapsed_s=2.0)).split("  ")[-3:] == [
        "samples 5/10",
        "left 0:03",
        "elapsed 0:02",
    ]
