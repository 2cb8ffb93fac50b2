"""Processes end with their parent, hear of signals, and keep out of each other's way."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from conf import process
from conf.process import collected_signals, lock, python

NAP = [sys.executable, "-c", "import time; time.sleep(600)"]


def test_several_processes_are_started_by_torchrun_with_time_for_their_checkpoint() -> None:
    assert python(1) == [sys.executable]
    assert python(4)[1:4] == ["-m", "torch.distributed.run", "--standalone"]
    assert {"--nproc-per-node=4", "--shutdown-timeout=600"} < set(python(4))


ANOTHER_PROGRAM = """
import subprocess, sys, time
from conf.process import die_with_parent
nap = [sys.executable, "-c", "import time; time.sleep(600)"]
print(subprocess.Popen(nap, preexec_fn=die_with_parent()).pid, flush=True)
time.sleep(600)
"""
WORKER = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from conf.process import end_with_parent
pool = ProcessPoolExecutor(1, get_context("spawn"), end_with_parent)
print(pool.submit(os.getpid).result(), flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
@pytest.mark.parametrize("script", [ANOTHER_PROGRAM, WORKER], ids=["another program", "worker"])
def test_a_child_ends_with_a_parent_that_is_killed(script: str) -> None:
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    child.wait(60)  # raises where it lives on


def test_signals_are_collected_in_order_and_the_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with collected_signals([signal.SIGTERM, signal.SIGUSR1]) as received:
        assert not received
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert [number.name for number in received] == ["SIGUSR1", "SIGTERM"]
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_lock_is_held_as_long_as_any_has_it_open(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("a") as first:
        assert lock(first.fileno())
        with (tmp_path / "lock").open("a") as second:
            assert not lock(second.fileno())
            with subprocess.Popen(NAP, pass_fds=[first.fileno()]) as heir:
                first.close()
                assert not lock(second.fileno())
                heir.kill()
            assert lock(second.fileno())


def test_a_process_tells_how_far_it_is_now_and_then_and_at_once_when_something_else_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, clock = tmp_path / "progress", [100.0]
    monkeypatch.setattr(process.time, "monotonic", lambda: clock[0])
    tell = process.Heartbeat()
    tell("training", 1, 10)
    assert process.Told.read(path) is None  # nobody asked
    monkeypatch.setenv(process.PROGRESS_FILE, str(path))
    tell("training", 2, 10)
    clock[0] += process.TELL_EVERY_S / 2
    tell("training", 3, 10)
    assert process.Told.read(path) == process.Told("training", 2, 10, 100.0)
    tell("evaluating")
    assert process.Told.read(path) == process.Told("evaluating", 0, 0, clock[0])
    clock[0] += process.TELL_EVERY_S
    monkeypatch.setenv("RANK", "1")
    tell("evaluating", 5, 9)
    assert process.Told.read(path) == process.Told("evaluating", 0, 0, clock[0] - process.TELL_EVERY_S)
    monkeypatch.setenv("RANK", "0")
    tell("evaluating", 6, 9)
    assert process.Told.read(path) == process.Told("evaluating", 6, 9, clock[0])


def test_work_goes_on_where_nothing_can_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(process.PROGRESS_FILE, str(tmp_path / "nowhere" / "progress"))
    process.Heartbeat()("training", 1, 2)
    for content in ("", "{", "[]", '{"doing": 1}'):
        (tmp_path / "torn").write_text(content)
        assert process.Told.read(tmp_path / "torn") is None
