"""Processes, devices and the split of the global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conf.errors import UserError
from conf.schema import BatchConfig, Device, RuntimeConfig
from train.engine.runtime import pick_device, start

RESTARTED = """
import os, sys
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
    ("size", "micro", "world", "named"), [(10, 0, 4, "8 or 12"), (10, 4, 1, "8 or 12"), (4, 4, 2, "8")]
)
def test_indivisible_batch_is_refused_with_the_nearest(size: int, micro: int, world: int, named: str) -> None:
    with pytest.raises(UserError, match=rf"batch.global_batch_size={size}: .*; set {named}$"):
        BatchConfig(global_batch_size=size, micro_batch_size=micro).split(world)


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
