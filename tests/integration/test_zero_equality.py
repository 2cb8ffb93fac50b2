"""DDP, FSDP2 and every ZeRO stage, on 1, 2 and 4 processes, against a plain torch loop; and resumes between them.

Each number of processes is launched once; the tests read what the launches left. What does not depend on a number that
high is tried on 1 and 2 processes only.
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
PROCESSES = (1, 2)
pytestmark = pytest.mark.timeout(900)  # of which the first test has four launches


def load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zero_worker", WORKER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load_worker()
LAYOUTS = tuple(worker.LAYOUTS)


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
    previous: list[str] = []
    for processes in worker.CHAIN:
        out = base / str(processes)
        out.mkdir()
        command = [sys.executable] if processes == 1 else [*torchrun, f"--nproc-per-node={processes}"]
        arguments = [str(WORKER), str(out), *previous]
        done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        found[processes], previous = Run(out, done.stdout + done.stderr), [str(out)]
    assert not (base / "extensions").exists(), "something was compiled"
    return found


def reference(steps: int, grad_clip: float, batch: int = worker.BATCH) -> tuple[list[tuple[float, float]], Any, Any]:
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
        seen = (index + 1) * batch
        x, y = worker.data(index, batch)
        loss = (network(x) - y).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), grad_clip)
        for group in adamw.param_groups:
            group["lr"] = optim["lr"] * min(1.0, seen / optim["warmup_samples"])
        adamw.step()
        adamw.zero_grad()
        history.append((loss.item(), norm.item()))
        decay = 0.5 ** (batch / min(worker.HALF_LIFE, worker.EMA_WARMUP * seen))
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
@pytest.mark.parametrize("processes", [1, 2, 4])
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
@pytest.mark.parametrize("processes", worker.CHAIN)
def test_uneven_micro_batches_equal_one_batch(runs: dict[int, Run], processes: int, layout: str) -> None:
    run, (history, weights, _) = runs[processes], reference(worker.SHORT, worker.OPTIM["grad_clip"], worker.UNEVEN)
    assert relative(run.numbers[f"{layout}/uneven"], history) < 1e-5
    assert difference(run.weights(f"{layout}-uneven"), weights) < 1e-5
    sizes = {1: 2, 2: 1}.get(processes, 0)  # among those of the first process, where it is compiled
    graphs = 0 if layout.startswith("zero3") else 2 * sizes
    assert run.numbers[f"{layout}/uneven/graphs"] == graphs, "one for each of the blocks and sizes"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_resume_in_the_same_layout_is_bit_exact(runs: dict[int, Run], processes: int, layout: str) -> None:
    run = runs[processes]
    # DDP sums the gradients of its first step in another order than those of later steps; two summands do not mind.
    bound = 1e-6 if layout == "ddp" and processes > 2 else 0
    for suffix in ("end", "end-ema"):
        assert difference(run.weights(f"{layout}-resumed-{suffix}"), run.weights(f"{layout}-{suffix}")) <= bound


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if not layout.startswith("zero3")])
@pytest.mark.parametrize("processes", PROCESSES)
def test_compiled_network_equals_plain_torch(runs: dict[int, Run], plain: Any, processes: int, layout: str) -> None:
    numbers = runs[processes].numbers
    assert relative(numbers[f"{layout}/compiled"], plain[0][: worker.SHORT]) < 1e-5
    assert numbers[f"{layout}/graphs"] == 2, "one for each of the blocks"


@pytest.mark.parametrize("change", [f"{old}-to-{new}" for old, new in worker.CHANGES])
@pytest.mark.parametrize("processes", PROCESSES)
def test_resume_in_another_layout_continues_the_run(
    runs: dict[int, Run], plain: Any, processes: int, change: str
) -> None:
    assert difference(runs[processes].weights(f"{change}-end"), plain[1]) < 1e-5
    assert difference(runs[processes].weights(f"{change}-end-ema"), plain[2]) < 1e-5


def test_run_that_goes_through_all_layouts_is_that_of_plain_torch(runs: dict[int, Run], plain: Any) -> None:
    history, weights, average = plain
    assert relative(runs[4].numbers["tour"], history) < 1e-5
    assert difference(runs[4].weights("tour-end"), weights) < 1e-5
    assert difference(runs[4].weights("tour-end-ema"), average) < 1e-5


@pytest.mark.parametrize("processes", PROCESSES)
def test_resume_reaches_tensors_that_stage_3_leaves_whole(runs: dict[int, Run], plain: Any, processes: int) -> None:
    assert difference(runs[processes].weights("zero2-to-persistent-end"), plain[1]) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_processes_continue_the_run_again_and_again(runs: dict[int, Run], plain: Any, layout: str) -> None:
    history, weights, average = plain
    assert list(worker.CHAIN) == list(runs) == [4, 2, 1, 3]
    assert relative([step for run in runs.values() for step in run.numbers[f"{layout}/chain"]], history) < 1e-5
    assert difference(runs[3].weights(f"{layout}-chain-end"), weights) < 1e-5
    assert difference(runs[3].weights(f"{layout}-chain-end-ema"), average) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("processes", worker.CHAIN)
def test_muon_takes_the_same_steps_everywhere(runs: dict[int, Run], processes: int, layout: str) -> None:
    """As one process alone; that one is compared with torch's Muon in `test_optim_muon.py`."""
    run, alone = runs[processes], runs[1]
    assert relative(run.numbers[f"{layout}/muon"], alone.numbers["ddp/muon"]) < 1e-5
    assert difference(run.weights(f"{layout}-muon"), alone.weights("ddp-muon")) < 1e-5
    assert difference(alone.weights("ddp-muon"), alone.weights("ddp-spoiled")) > 1e-3, "this was AdamW"
    bound = 1e-6 if layout == "ddp" and processes > 2 else 0  # DDP's first step, as above
    assert difference(run.weights(f"{layout}-muon-resumed"), run.weights(f"{layout}-muon")) <= bound


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


def test_without_deepspeed_nothing_imports_it(runs: dict[int, Run]) -> None:
    assert not any(run.numbers["deepspeed imported"] for run in runs.values())


@pytest.mark.parametrize("processes", worker.CHAIN)
def test_console_stays_silent(runs: dict[int, Run], processes: int) -> None:
    assert runs[processes].console == ""
