"""A process that hangs is named, whether it stands still as a whole or waits somewhere in its own code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore

from conf.schema import Device, RuntimeConfig
from train.engine import watchdog as module_under_test
from train.engine.runtime import start
from train.engine.watchdog import Watchdog

RANK = """
import sys, time
from pathlib import Path
from conf.schema import Device, RuntimeConfig
from train.engine.runtime import start
from train.engine.watchdog import Watchdog

def lost_in_thought():
    while True:
        time.sleep(0.05)

runtime = start(RuntimeConfig(device=Device.cpu, timeout_s=120))
timeout_s = float(sys.argv[2]) if len(sys.argv) > 2 else None
with Watchdog(runtime, Path(sys.argv[1]), 4.0, timeout_s) as watchdog:
    watchdog.note("in a training step")
    runtime.barrier()
    (Path(sys.argv[1]).parent / f"ready-{runtime.rank}").touch()
    if runtime.rank == 1:
        watchdog.note("waiting for data")
        lost_in_thought()
    runtime.barrier()
"""


def ranks(tmp_path: Path, *timeout_s: str) -> list[subprocess.Popen[str]]:
    """Two processes, of which the second never comes to the second barrier, of two nodes."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": os.getcwd(), "SUSPECTS_FILE": str(tmp_path / "suspects")}
    shared["MASTER_PORT"] = str(20000 + os.getpid() % 20000)
    (tmp_path / "rank.py").write_text(RANK)
    return [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "rank.py"), str(tmp_path / "hang"), *timeout_s],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "SLURMD_NODENAME": f"node{rank}"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def wait_until_ready(tmp_path: Path) -> None:
    deadline = time.monotonic() + 120
    while not all((tmp_path / f"ready-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def warning_of(processes: list[subprocess.Popen[str]]) -> str:
    """The line that the first process prints."""
    stream = processes[0].stderr
    assert stream is not None
    return next(line for line in stream if line.startswith("warning: no step"))


@pytest.mark.parametrize("stopped", [False, True], ids=["in its own code", "as a whole"])
def test_the_process_that_hangs_is_named_with_stack_traces(tmp_path: Path, stopped: bool) -> None:
    processes = ranks(tmp_path)
    try:
        wait_until_ready(tmp_path)
        if stopped:
            processes[1].send_signal(signal.SIGSTOP)
        told = warning_of(processes)
        hanging = f"rank 1 (node1, pid {processes[1].pid})"
        assert f"DOES NOT ANSWER: {hanging}" in told if stopped else hanging in told
        assert "in a training step for " in told and f"rank 0 (node0, pid {processes[0].pid})" in told
        assert "barrier" in (tmp_path / "hang" / "rank-00000.txt").read_text()
        if not stopped:
            assert "waiting for data for" in told
            assert "lost_in_thought" in (tmp_path / "hang" / "rank-00001.txt").read_text()
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(("stopped", "timeout_s"), [(True, "100"), (False, "8")], ids=["as a whole", "in its own code"])
def test_a_run_that_hangs_is_ended_and_a_node_that_does_not_answer_is_named(
    tmp_path: Path, stopped: bool, timeout_s: str
) -> None:
    processes = ranks(tmp_path, timeout_s)
    try:
        wait_until_ready(tmp_path)
        if stopped:
            processes[1].send_signal(signal.SIGSTOP)
        assert processes[0].wait(60) == 1
        assert (tmp_path / "suspects").read_text() == ("node1\n" if stopped else "")
    finally:
        for process in processes:
            process.kill()
        errors = [process.communicate()[1] for process in processes]
    assert ("error: processes on node1 do not answer" if stopped else "error: a step takes longer") in errors[0]


def test_processes_that_answer_are_not_ended(tmp_path: Path) -> None:
    processes = ranks(tmp_path, "100")
    try:
        wait_until_ready(tmp_path)
        warning_of(processes)
        time.sleep(4)
        assert [process.poll() for process in processes] == [None, None] and not (tmp_path / "suspects").exists()
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_without_a_disk_for_traces_it_watches_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    errors, deadline = "", time.monotonic() + 120
    with Watchdog(start(RuntimeConfig(device=Device.cpu)), tmp_path / "file" / "hang", patience_s=0.5) as watchdog:
        for silence in (1, 2):
            watchdog.note("in a training step")
            while errors.count("warning: no step") < silence:
                assert time.monotonic() < deadline
                time.sleep(0.05)
                errors += capsys.readouterr().err


@pytest.mark.parametrize(
    ("silent", "named"), [([1], "node1\n"), ([1, 2], "node1\nnode2\n"), ([1, 2, 3], ""), ([1, 2, 3, 4, 5], "")]
)
def test_a_process_that_hears_half_of_the_nodes_no_more_names_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: list[int], named: str
) -> None:
    """It may itself be what is cut off."""
    monkeypatch.setenv("SUSPECTS_FILE", str(tmp_path / "suspects"))
    ended = list[int]()
    monkeypatch.setattr(module_under_test, "leave", ended.append)
    watchdog = Watchdog(start(RuntimeConfig(device=Device.cpu)), tmp_path, 100.0, timeout_s=1e9)
    watchdog.store = HashStore()
    watchdog._end_if_due([{"node": f"node{rank}"} for rank in range(6)], silent)
    assert ended == [1] and (tmp_path / "suspects").read_text() == named


def test_a_process_that_goes_on_is_not_suspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Watchdog(start(RuntimeConfig(device=Device.cpu)), tmp_path / "hang", patience_s=3.0) as watchdog:
        for _ in range(40):
            watchdog.note("in a training step")
            time.sleep(0.1)
    assert capsys.readouterr().err == "" and not (tmp_path / "hang").exists()
