"""Processes, devices, threads and the split of the global batch."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conf import process
from conf.errors import UserError
from conf.schema import BackendName, BatchConfig, Device, RuntimeConfig, TrainingRuntimeConfig, UNetRuntimeConfig
from train.engine import runtime as module_under_test
from train.engine.runtime import (
    CALM,
    CHOSEN_BY,
    WINDOW_S,
    Threads,
    choose_threads,
    cpu_seconds,
    pick_device,
    set_numerics,
    start,
)

RESTARTED = """
import os, sys
import numpy as np
from conf.schema import RuntimeConfig
from train.engine.runtime import start, stop
runtime = start(RuntimeConfig(timeout_s=60))
total = runtime.sum({"rank": runtime.rank + 1})
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and runtime.rank == 1:
    os._exit(9)
runtime.barrier()
if runtime.is_main:
    checks = {
        "sum": total["rank"] == 3,
        "mean": runtime.mean({"a": runtime.rank, "b": 4.0}) == {"a": 0.5, "b": 4.0},
    }
else:
    checks = {}
    runtime.mean({"a": runtime.rank, "b": 4.0})
checks["any"] = runtime.any(runtime.rank == 1) and not runtime.any(False)
own = {2 * i + runtime.rank: np.full((2, 3 + i), 10 * i + runtime.rank, np.uint8) for i in range(1 + runtime.rank)}
images = runtime.on_main(own)
expected = {0: ((2, 3), 0), 1: ((2, 3), 1), 3: ((2, 4), 11)} if runtime.is_main else {}
checks["images"] = {n: (image.shape, image.max()) for n, image in images.items()} == expected
checks["gather"] = runtime.gather_objects({"rank": runtime.rank}) == [{"rank": 0}, {"rank": 1}]
failed = [name for name, held in checks.items() if not held]
stop()
if runtime.is_main:
    print("failed:", failed)
"""


@pytest.mark.parametrize(
    ("size", "micro", "world", "expected"),
    [(64, 0, 1, (64, 1)), (64, 0, 4, (16, 1)), (64, 8, 1, (8, 8)), (64, 8, 4, (8, 2)), (6, 1, 2, (1, 3))],
)
def test_micro_batches_make_up_the_global_batch(size: int, micro: int, world: int, expected: tuple[int, int]) -> None:
    found = BatchConfig(global_batch_size=size, micro_batch_size=micro).split(world)
    assert found == expected
    assert found[0] * found[1] * world == size


@pytest.mark.parametrize(
    ("size", "micro", "world", "named", "uneven"),
    [(10, 0, 4, "8 or 12", (3, 1)), (10, 4, 1, "8 or 12", (4, 3)), (4, 4, 2, "8", (2, 1))],
)
def test_indivisible_batch_is_refused_with_the_nearest(
    size: int, micro: int, world: int, named: str, uneven: tuple[int, int]
) -> None:
    with pytest.raises(UserError, match=rf"batch.global_batch_size={size}: .*; set {named}, or batch.uneven=true"):
        BatchConfig(global_batch_size=size, micro_batch_size=micro).split(world)
    assert BatchConfig(global_batch_size=size, micro_batch_size=micro, uneven=True).split(world) == uneven


@pytest.mark.parametrize(
    ("size", "micro", "world", "named"), [(3, 0, 4, "4"), (13, 1, 4, "12 or 16"), (3, 2, 4, "8"), (5, 1, 3, "3 or 6")]
)
def test_a_batch_too_small_for_all_passes_is_refused(size: int, micro: int, world: int, named: str) -> None:
    for uneven in (False, True):
        with pytest.raises(UserError, match=rf"batch.global_batch_size={size}: .*; set {named}$"):
            BatchConfig(global_batch_size=size, micro_batch_size=micro, uneven=uneven).split(world)


@pytest.mark.parametrize(("size", "micro", "world"), [(64, 0, 4), (64, 8, 4), (48, 8, 2), (6, 1, 2), (64, 64, 1)])
def test_what_divides_is_cut_as_ever_where_uneven_is_allowed(size: int, micro: int, world: int) -> None:
    even, uneven = (BatchConfig(global_batch_size=size, micro_batch_size=micro, uneven=one) for one in (False, True))
    assert even.split(world) == uneven.split(world)


def test_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(RuntimeConfig(device=Device.auto)).type == "cpu"
    with pytest.raises(UserError, match=r"runtime\.device=cuda"):
        pick_device(RuntimeConfig(device=Device.cuda))


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device(RuntimeConfig()) == torch.device("cuda", 1)
    assert pick_device(RuntimeConfig(device=Device.cpu)) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="one process per GPU"):
        pick_device(RuntimeConfig())


def test_one_process_is_a_world_of_its_own() -> None:
    runtime = start(RuntimeConfig(device=Device.cpu))
    assert (runtime.rank, runtime.world, runtime.is_main) == (0, 1, True)
    assert runtime.mean({"a": 3, "b": torch.tensor(0.5)}) == {"a": 3.0, "b": 0.5}
    assert runtime.mean({}) == {}
    assert runtime.any(True) and not runtime.any(False)
    assert runtime.gather_objects("x") == ["x"]


def launch(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[3]
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in drop}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=200)


def test_processes_find_each_other_again_after_a_restart(tmp_path: Path) -> None:
    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--local-addr=127.0.0.1"]
    done = launch(*torchrun, "--max-restarts=1", str(script))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "failed: []" in done.stdout


def test_srun_without_torchrun_is_refused() -> None:
    code = "from conf.schema import RuntimeConfig as C; from train.engine.runtime import start; start(C())"
    done = launch("-c", code, SLURM_STEP_NUM_TASKS="2")
    assert "UserError: several processes were started by srun" in done.stderr


class Machine:
    """CPU times of a machine whose other processes use `others` cores, beside this one's busy threads."""

    def __init__(self) -> None:
        self.now = self.busy = self.own = self.others = 0.0

    def pass_time(self, threads: Threads, windows: int = 1, others: float | None = None) -> int:
        """So many windows, an adjustment after each; returns the number of threads then."""
        self.others = self.others if others is None else others
        for _ in range(windows):
            self.now += WINDOW_S
            self.own += WINDOW_S * threads.count
            self.busy += WINDOW_S * (threads.count + self.others)
            threads.adjust()
        assert torch.get_num_threads() == threads.count
        return threads.count

    def threads(self, most: int, cores: int | None = None) -> Threads:
        torch.set_num_threads(most)
        return Threads(most, cores or most, lambda: (self.busy, self.own), lambda: self.now)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    before = torch.get_num_threads()
    for name in CHOSEN_BY:
        monkeypatch.delenv(name, raising=False)
    yield Machine()
    torch.set_num_threads(before)


def test_threads_give_way_at_once_and_come_back_when_others_have_ended(machine: Machine) -> None:
    threads = machine.threads(2)
    assert machine.pass_time(threads, 3, others=0.0) == 2
    assert machine.pass_time(threads, others=0.67) == 1  # three threads share two cores
    assert machine.pass_time(threads, 5, others=1.0) == 1
    assert machine.pass_time(threads, CALM - 1, others=0.0) == 1
    assert machine.pass_time(threads) == 2


def test_a_pause_of_others_is_no_end(machine: Machine) -> None:
    threads = machine.threads(2)
    machine.pass_time(threads, others=0.7)
    for _ in range(4):
        assert machine.pass_time(threads, CALM - 1, others=0.0) == 1
        assert machine.pass_time(threads, others=1.0) == 1


@pytest.mark.parametrize(
    ("others", "expected"), [(0.1, 8), (0.45, 8), (0.55, 7), (1.0, 7), (1.5, 6), (4.0, 4), (8.0, 1), (30.0, 1)]
)
def test_each_core_that_others_use_is_left_to_them(machine: Machine, others: float, expected: int) -> None:
    threads = machine.threads(8)
    assert machine.pass_time(threads, others=others) == expected
    assert [machine.pass_time(threads) for _ in range(10)] == [expected] * 10  # neither back nor further


def test_a_neighbour_that_uses_half_a_core_changes_nothing(machine: Machine) -> None:
    threads = machine.threads(2)
    assert [machine.pass_time(threads, others=0.4) for _ in range(10)] == [2] * 10
    machine.pass_time(threads, others=1.0)
    assert [machine.pass_time(threads, others=0.4) for _ in range(10)] == [1] * 10


def test_many_cores_of_a_small_quota_are_enough_beside_others(machine: Machine) -> None:
    threads = machine.threads(2, cores=16)
    assert machine.pass_time(threads, others=14.0) == 2
    assert machine.pass_time(threads, others=15.0) == 1


def test_nothing_is_compared_within_a_window(machine: Machine) -> None:
    threads, reads = machine.threads(2), list[None]()
    threads.read = lambda: reads.append(None) or (0.0, 0.0)  # type: ignore[func-returns-value]
    for _ in range(10):
        machine.now += WINDOW_S / 10.5
        threads.adjust()
    assert not reads


def test_lines_say_what_changed_and_get_rarer(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    threads = machine.threads(2)
    machine.pass_time(threads, 3, others=0.7)
    machine.pass_time(threads, 3, others=0.0)
    assert capsys.readouterr().out.splitlines() == [
        "cpu         other processes keep 0.7 of 2 cores busy: 1 thread instead of 2; "
        "runtime.threads=2 holds the number fixed",
        "cpu         2 threads again",
    ]
    for _ in range(1000):
        machine.pass_time(threads, 1, others=1.0)
        machine.pass_time(threads, CALM, others=0.0)
    machine.pass_time(threads, 1, others=1.0)
    lines = capsys.readouterr().out.splitlines()
    assert 5 < len(lines) < 12
    machine.pass_time(threads, 10000)
    last = [*lines, *capsys.readouterr().out.splitlines()][-1]
    assert "1 thread instead of 2" in last  # what is said last is true, however late it came


@pytest.mark.parametrize("variable", CHOSEN_BY)
def test_a_number_that_was_chosen_is_never_changed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setattr(module_under_test, "TORCHS_CHOICE", 2)
    monkeypatch.setattr(module_under_test, "usable_cpus", lambda: {0, 1})
    monkeypatch.setattr(module_under_test, "cpu_quota", lambda: math.inf)
    cpu = torch.device("cpu")
    assert choose_threads(RuntimeConfig(), cpu).most == 2
    chosen = {
        "option": choose_threads(RuntimeConfig(threads=3), cpu),
        "compiled": choose_threads(TrainingRuntimeConfig(compile=True), cpu),
        "gpu": choose_threads(RuntimeConfig(), torch.device("cuda", 0)),
    }
    monkeypatch.setenv(variable, "2")
    chosen["variable"] = choose_threads(RuntimeConfig(), cpu)
    assert torch.get_num_threads() == 3
    for name, threads in chosen.items():
        threads.clock, threads.read = (lambda: 1e9), (lambda: (1e9, 0.0))
        threads.adjust()
        assert torch.get_num_threads() == 3, name


@pytest.mark.parametrize(("quota", "expected"), [(math.inf, 4), (16.0, 4), (2.0, 2), (1.5, 2), (0.3, 1)])
def test_no_more_threads_than_a_quota_grants(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, quota: float, expected: int
) -> None:
    monkeypatch.setattr(module_under_test, "TORCHS_CHOICE", 8)
    monkeypatch.setattr(module_under_test, "usable_cpus", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(module_under_test, "cpu_quota", lambda: quota)
    threads = choose_threads(RuntimeConfig(), torch.device("cpu"))
    assert (threads.most, threads.cores, torch.get_num_threads()) == (expected, 4, expected)


def test_the_work_of_this_process_is_its_own_and_that_of_another_is_not() -> None:
    """CPU seconds as the system counts them, in whichever share a loaded machine grants."""

    def grown(work: Callable[[], object]) -> tuple[float, float]:
        before = cpu_seconds()
        work()
        return cpu_seconds()[0] - before[0], cpu_seconds()[1] - before[1]

    busy = "import time\nwhile time.process_time() < 1.0: pass"
    together, own = grown(lambda: subprocess.run([sys.executable, "-c", busy], check=True))
    assert together > 0.9 and own < 0.5
    until = time.process_time() + 1.0
    together, own = grown(lambda: any(time.process_time() > until for _ in iter(int, 1)))
    assert together > 0.9 and own > 0.9


@pytest.mark.parametrize(
    ("options", "tf32", "fixed"),
    [({}, True, False), ({"tf32": False}, False, False), ({"deterministic": True}, False, True)],
    ids=str,
)
def test_a_gpu_is_fast_or_exact_or_makes_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, bool], tf32: bool, fixed: bool
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        set_numerics(RuntimeConfig(**options), torch.device("cuda"))
        backends = torch.backends
        assert backends.cuda.matmul.allow_tf32 == backends.cudnn.allow_tf32 == tf32
        assert torch.are_deterministic_algorithms_enabled() == backends.cudnn.deterministic == fixed
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == fixed
        set_numerics(RuntimeConfig(deterministic=True), torch.device("cpu"))
        assert not torch.are_deterministic_algorithms_enabled()  # a CPU makes the same bits anyway
    finally:
        set_numerics(RuntimeConfig(), torch.device("cpu"))


def test_loaders_are_as_many_as_a_gpu_leaves_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = start(RuntimeConfig(device=Device.cpu))
    assert (runtime.loaders(None), runtime.loaders(3), runtime.loaders(0)) == (0, 3, 0)
    gpu = replace(runtime, device=torch.device("cuda", 0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(process, "cpu_quota", lambda: 1000)
    found = {}
    for cores in (8, 32, 64, 224, 1024):
        monkeypatch.setattr(process, "usable_cpus", lambda _=0, cores=cores: set(range(cores)))
        found[cores] = gpu.loaders(None)
    assert found == {8: 1, 32: 3, 64: 7, 224: 27, 1024: 32} and gpu.loaders(0) == 0


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
def test_cores_of_a_numa_node_are_shared_by_those_that_are_bound_to_it(
    monkeypatch: pytest.MonkeyPatch, nodes: int
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(process, "cpu_quota", lambda: math.inf)
    monkeypatch.setattr(process, "usable_cpus", lambda pid=0: set(range(64 if pid else 64 // nodes)))
    assert process.cores() == 8


def test_nccl_has_the_time_limit_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
from conf.schema import RuntimeConfig
from train.engine.runtime import start
import torch.distributed.distributed_c10d as c10d
start(RuntimeConfig(timeout_s=123))
print(c10d._get_default_timeout("nccl").seconds, c10d._get_default_timeout("gloo").seconds)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["123", "123"]


def test_a_machines_processes_cut_a_network_unless_others_are_asked_for() -> None:
    fsdp = BackendName.fsdp
    assert UNetRuntimeConfig(backend=fsdp).sharing(512, 8) == 8
    assert UNetRuntimeConfig(backend=fsdp).sharing(4, 8) == 4
    assert UNetRuntimeConfig(backend=fsdp, shard_processes=64).sharing(512, 8) == 64
    assert UNetRuntimeConfig(backend=fsdp, shard_processes=64).sharing(8, 8) == 8
    with pytest.raises(UserError, match=r"runtime\.shard_processes=3: 8 processes are no multiple"):
        UNetRuntimeConfig(backend=fsdp, shard_processes=3).sharing(8, 8)
