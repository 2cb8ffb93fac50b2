"""Processes end with their parent, hear of signals, know their CPUs, and keep out of each other's way."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from conf import process
from conf.process import BUSY_LOOPS, collected_signals, cpu_quota, lock, python, usable_cpus

ROOT = Path(__file__).parents[2]
PROGRAM = """
from conf.entry import entry
from conf.schema import DashboardRun

@entry("dashboard", DashboardRun)
def main(cfg):
    import torch

main()
"""
PERIOD = {"cpu/a/cpu.cfs_period_us": "100000"}
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


@pytest.mark.skipif(sys.platform != "linux", reason="others tell nothing of it")
def test_only_the_cpus_that_are_left_to_a_process_are_usable() -> None:
    allowed = usable_cpus()
    one = min(allowed)
    code = f"import os; os.sched_setaffinity(0, [{one}]); from conf.process import usable_cpus; print(usable_cpus())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{{{one}}}\n"


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n", "cpu.max": "max 1\n"}, 4.0),
        ("0::/seen/from/outside\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("9:memory:/a\n4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "50000", **PERIOD}, 0.5),
        ("4:cpu:/a\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "-1", **PERIOD}, math.inf),
        ("4:cpuset:/\n0::/\n", {}, math.inf),
        (None, {}, math.inf),
    ],
    ids=["v2", "v2, no limit", "v2, group above", "v2, container", "v1", "v1, no limit", "none", "no Linux"],
)
def test_the_cpu_time_that_control_groups_grant_is_known(
    tmp_path: Path, groups: str | None, files: dict[str, str], quota: float
) -> None:
    written = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    if groups is not None:
        written["proc/self/cgroup"] = groups
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota


@pytest.mark.skipif(sys.platform != "linux", reason="another library of OpenMP")
@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "7"}], ids=str)
def test_threads_of_a_command_wait_briefly_unless_the_user_chose(tmp_path: Path, chosen: dict[str, str]) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    inherited = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment = inherited | {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "VERBOSE"} | chosen
    command = [sys.executable, str(program), f"run_dir={tmp_path}"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    expected = chosen.get("GOMP_SPINCOUNT", "0" if chosen else BUSY_LOOPS)
    assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr


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
