"""The table of a pipeline: time left is estimated from progress alone, and a stage that stands still says so."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conf.process import Told
from train.engine.progress import LINE_EVERY_S
from train.stages import display as progress
from train.stages.display import QUIET_S, Display, StageRow, line
from train.stages.time_left import StageCost, Work


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


def running(clock: Clock, **options: Any) -> StageRow:
    row = StageRow("autoencoder", **options)
    row.begin()
    return row


def test_a_running_stage_is_as_far_as_it_told_last(clock: Clock, tmp_path: Path) -> None:
    row = running(clock, total=1000, work=Work(1000, 500))
    wrote(tmp_path, clock, 100, 90.0)
    for seen in (100, 120, 140):
        clock.now += 2
        row.read(tmp_path, "", since=0, told=Told("training", seen, 1000, clock.now))
    assert row.cells["samples"] == "140/1,000" and row.cells["images/s"] == "10"
    assert row.cells["left"] == "1:26" and row.cells["loss"] == "0.5"
    row.read(tmp_path, "", since=0, told=Told("evaluating", 32, 64, clock.now))
    assert row.doing == "evaluating 32/64" and row.cells["samples"] == "140/1,000"
    assert "evaluating 32/64" in line(row)
    row.state = "done"
    assert row.rest_s == 0 and row.cells["left"] == ""


def test_time_left_of_all_stages_is_the_sum_and_only_of_what_is_left(clock: Clock) -> None:
    rows = [StageRow(name, work=Work(100)) for name in ("autoencoder", "clip", "unet")]
    display = Display(rows, Console(file=io.StringIO()))
    assert display.rest_s is None
    display.expect({name: StageCost(5.0, 1.0) for name in ("autoencoder", "clip", "unet")})
    assert display.rest_s == 315
    rows[0].finished, rows[1].begun = True, 60
    assert display.rest_s == 45 + 105
    rows[1].begin()
    clock.now += 10
    rows[1].read(Path("nowhere"), "", 0, Told("training", 60, 100, clock.now))
    clock.now += 20
    rows[1].read(Path("nowhere"), "", 0, Told("training", 70, 100, clock.now))
    display.expect({name: StageCost(5.0, 1.0) for name in ("autoencoder", "clip", "unet")})
    assert display.rest_s == 2 * 30 + 2 * 105  # this machine is half as fast as expected


def test_a_stage_whose_cost_nobody_knows_leaves_the_whole_unknown(clock: Clock) -> None:
    rows = [StageRow("unet", work=Work(100)), StageRow("sample")]
    display = Display(rows, Console(file=io.StringIO()))
    display.expect({"unet": StageCost(5.0, 1.0), "sample": StageCost(5.0, 1.0)})
    assert display.rest_s is None and "left" not in display.status().plain


@pytest.mark.parametrize("state", ["running", "done", "stopped"])
def test_large_numbers_fit_into_eighty_columns(clock: Clock, state: str) -> None:
    row = running(clock, total=60_000_000, loss=1234.5678, elapsed_s=987654.0, work=Work(60_000_000))
    for second in (0, 30):
        told = Told("training", 12_345_678 + second * 1234, 60_000_000, clock.now + second)
        row.read(Path("nowhere"), "", 0, told)
    row.state = state
    for quiet_s in (0.0, 7200.0):
        row.quiet_s = quiet_s
        out = io.StringIO()
        console = Console(file=out, width=80)
        display = Display([row, StageRow("evaluate", state="skipped")], console)
        console.print(display.table(), display.status())
        lines = out.getvalue().splitlines()
        assert (
            "…" not in out.getvalue() and max(map(len, lines)) <= 80 and len(lines) == (6 if state == "running" else 5)
        )
        assert "12.38M/60M" in lines[1] and "1,234" in lines[1] and "274:20:54" in lines[1]


def test_long_runs_without_a_terminal_get_fewer_lines(clock: Clock, tmp_path: Path) -> None:
    row, out = StageRow("unet", 10**6, "running"), io.StringIO()
    display = Display([row], Console(file=out, width=100))
    for second in range(0, 86_400, 5):
        clock.now += 5
        row.read(tmp_path, "", 0, Told("training", second, 10**6, clock.now))
        display.update()
    assert len(out.getvalue().splitlines()) < 500
