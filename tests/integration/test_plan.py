"""The memory that a plan says against what two processes under DeepSpeed hold, at every ZeRO stage."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

WORKER = Path(__file__).parents[2] / "bench" / "_zero_memory.py"
SETTING = "8M"


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_zero_memory", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["_zero_memory"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    out = tmp_path_factory.mktemp("plan") / "bytes.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [*torchrun, "--nproc-per-node=2", str(WORKER), str(out), SETTING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found: dict[str, int] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("stage", range(4))
def test_memory_of_two_processes_is_what_was_planned(worker: ModuleType, measured: dict[str, int], stage: int) -> None:
    assert worker.SETTINGS[SETTING].predicted(stage) == pytest.approx(measured[f"{SETTING}/{stage}"], rel=0.15)
