"""DDP and every ZeRO stage, on one and two processes, against a plain torch loop; and resumes between all of them.

Each number of processes is launched once; the tests read what the launches left.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WORKER = Path(__file__).with_name("zero_worker.py")
LAYOUTS = ("ddp", "zero0", "zero1", "zero2", "zero3")
PROCESSES = (1, 2)


def load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zero_worker", WORKER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load_worker()


class Run:
    """What one launch left."""

    def __init__(self, folder: Path, console: str) -> None:
        self.folder, self.console = folder, console
        self.numbers: dict[str, Any] = json.loads((folder / "numbers.json").read_text())

    def weights(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    base = tmp_path_factory.mktemp("zero")
    (base / "bin").mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "CUDA_HOME")}
    env |= {
        "OMP_NUM_THREADS": "1",
        "PATH": str(base / "bin"),  # no compiler
        "TORCH_EXTENSIONS_DIR": str(base / "extensions"),
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    found: dict[int, Run] = {}
    for processes, command in ((2, [*torchrun, "--nproc-per-node=2"]), (1, [sys.executable])):
        out = base / str(processes)
        out.mkdir()
        arguments = [str(WORKER), str(out), *(str(run.folder) for run in found.values())]
        done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        found[processes] = Run(out, done.stdout + done.stderr)
    assert not (base / "extensions").exists(), "something was compiled"
    return found


def reference(steps: int, grad_clip: float) -> tuple[list[tuple[float, float]], Any, Any]:
    """Losses and gradient norms, weights and their average, written out in plain torch."""
    network, optim = worker.Network(), worker.OPTIM
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        foreach=False,
    )
    average = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    history = []
    for index in range(steps):
        seen = (index + 1) * worker.BATCH
        x, y = worker.data(index)
        loss = (network(x) - y).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), grad_clip)
        for group in adamw.param_groups:
            group["lr"] = optim["lr"] * min(1.0, seen / optim["warmup_samples"])
        adamw.step()
        adamw.zero_grad()
        history.append((loss.item(), norm.item()))
        decay = 0.5 ** (worker.BATCH / min(worker.HALF_LIFE, worker.EMA_WARMUP * seen))
        for name, tensor in network.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * tensor
    return history, network.state_dict(), average


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of two state dicts with the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def relative(a: list[Any], b: list[Any]) -> float:
    """Largest relative difference of two histories of (loss, gradient norm)."""
    assert len(a) == len(b)
    return max(abs(p - q) / abs(q) for left, right in zip(a, b, strict=True) for p, q in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def plain() -> tuple[list[tuple[float, float]], Any, Any]:
    return reference(worker.STEPS, worker.OPTIM["grad_clip"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("processes", PROCESSES)
def test_training_equals_plain_torch(runs: dict[int, Run], plain: Any, processes: int, layout: str) -> None:
    history, weights, average = plain
    run = runs[processes]
    assert min(norm for _, norm in history) < worker.OPTIM["grad_clip"] < max(norm for _, norm in history)
    assert relative(run.numbers[f"{layout}/curve"], history) < 1e-5
    assert difference(run.weights(f"{layout}-end"), weights) < 1e-5
    assert difference(run.weights(f"{layout}-end-ema"), average) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("processes", PROCESSES)
def test_without_clipping_equals_plain_torch(runs: dict[int, Run], processes: int, layout: str) -> None:
    history, weights, _ = reference(worker.SHORT, math.inf)
    assert relative(runs[processes].numbers[f"{layout}/unclipped"], history) < 1e-5
    assert difference(runs[processes].weights(f"{layout}-unclipped"), weights) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("processes", PROCESSES)
def test_accumulation_equals_one_batch(runs: dict[int, Run], plain: Any, processes: int, layout: str) -> None:
    assert relative(runs[processes].numbers[f"{layout}/accumulated"], plain[0][: worker.SHORT]) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("processes", PROCESSES)
def test_resume_in_the_same_layout_is_bit_exact(runs: dict[int, Run], processes: int, layout: str) -> None:
    run = runs[processes]
    for suffix in ("end", "end-ema"):
        assert difference(run.weights(f"{layout}-resumed-{suffix}"), run.weights(f"{layout}-{suffix}")) == 0


@pytest.mark.parametrize("change", ["zero1-to-zero3", "zero3-to-zero2", "ddp-to-zero1", "zero2-to-ddp"])
@pytest.mark.parametrize("processes", PROCESSES)
def test_resume_in_another_stage_continues_the_run(
    runs: dict[int, Run], plain: Any, processes: int, change: str
) -> None:
    assert difference(runs[processes].weights(f"{change}-end"), plain[1]) < 1e-5
    assert difference(runs[processes].weights(f"{change}-end-ema"), plain[2]) < 1e-5


@pytest.mark.parametrize("processes", PROCESSES)
def test_resume_reaches_tensors_that_stage_3_leaves_whole(runs: dict[int, Run], plain: Any, processes: int) -> None:
    assert difference(runs[processes].weights("zero2-to-persistent-end"), plain[1]) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_on_fewer_processes_continues_the_run(runs: dict[int, Run], plain: Any, layout: str) -> None:
    assert difference(runs[1].weights(f"other-{layout}-end"), plain[1]) < 1e-5
    assert difference(runs[1].weights(f"other-{layout}-end-ema"), plain[2]) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("processes", PROCESSES)
def test_step_with_nan_gradient_changes_nothing(runs: dict[int, Run], processes: int, layout: str) -> None:
    run = runs[processes]
    assert run.numbers[f"{layout}/skipped"] == 1
    _, weights, _ = reference(worker.SHORT, worker.OPTIM["grad_clip"])
    assert difference(run.weights(f"{layout}-spoiled"), weights) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("processes", PROCESSES)
def test_low_precision_follows_fp32(
    runs: dict[int, Run], plain: Any, processes: int, precision: str, layout: str
) -> None:
    numbers = runs[processes].numbers
    history = numbers[f"{layout}/{precision}"]
    assert relative(history, plain[0][: worker.SHORT]) < 1e-2
    assert relative(history, plain[0][: worker.SHORT]) > 1e-6, f"this was not {precision}"
    assert numbers[f"{layout}/{precision}/resumed"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("processes", PROCESSES)
def test_fp16_lowers_a_scale_that_overflows(runs: dict[int, Run], processes: int, layout: str) -> None:
    assert 3 <= runs[processes].numbers[f"{layout}/fp16/skipped"] < 20


@pytest.mark.parametrize("processes", PROCESSES)
def test_console_stays_silent(runs: dict[int, Run], processes: int) -> None:
    assert runs[processes].console == ""
