"""How far a command is: what a line says, and how many there are of them."""

import io

import pytest
from rich.console import Console

from train.engine import progress
from train.engine.progress import Progress, duration


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def run(clock: Clock, *, terminal: bool, shown: bool = True) -> str:
    """What 100 batches of 20 images, one a second, leave in a log or on a terminal."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, color_system=None, width=100)
    with Progress("sample", 2000, "images", console, shown=shown) as counter:
        for batch in range(1, 101):
            clock.now += 1
            counter.update(20 * batch)
    return out.getvalue()


def test_log_gets_a_line_now_and_then(clock: Clock) -> None:
    lines = run(clock, terminal=False).splitlines()
    assert len(lines) == 9
    assert lines[0] == "sample      220/2,000 images  20 images/s  1:29 left"


def test_terminal_shows_every_step_in_one_line(clock: Clock) -> None:
    out = run(clock, terminal=True)
    assert "0/2,000 images" in out and "1,980/2,000 images  20 images/s  0:01 left" in out
    assert "\n\n" not in out.replace("\r", "") and out.count("\x1b[2K") >= 99  # rewritten in its place


@pytest.mark.parametrize("terminal", [True, False])
def test_other_processes_are_silent(clock: Clock, terminal: bool) -> None:
    assert run(clock, terminal=terminal, shown=False) == ""


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 61, 3600 * 30 + 5)] == ["0:00", "1:01", "30:00:05"]


def test_log_repeats_no_line_while_nothing_moves(clock: Clock) -> None:
    out = io.StringIO()
    with Progress("sample", 2000, "images", Console(file=out, width=100)) as counter:
        for _ in range(100):
            clock.now += 1
            counter.update(20)
    assert len(out.getvalue().splitlines()) == 1
