"""One process of test_zero_equality.py: trains a small network in every layout and leaves what came out.

Usage: python zero_worker.py OUT [OTHER], alone or under torchrun. OTHER: what a run of other processes left.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # works where the project is not installed, too

from conf.ending import leave
from conf.schema import BatchConfig, EmaConfig, OptimConfig, Precision, RuntimeConfig
from train.engine.runtime import Runtime, start, stop
from train.engine.trainable import Trainable

LAYOUTS: dict[str, int | None] = {"ddp": None, "zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3}
BATCH, STEPS, SAVED_AT, SHORT = 8, 50, 40, 8
OPTIM = {"lr": 5e-3, "weight_decay": 0.1, "grad_clip": 0.4, "warmup_samples": 80}
HALF_LIFE, EMA_WARMUP = 60.0, 0.5


class Network(nn.Module):
    """Odd sizes, so that no shard ends with a parameter; a single number and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(3, 9, 3, padding=1)
        self.norm = nn.GroupNorm(3, 9)
        self.gain = nn.Parameter(torch.tensor([1.3]))
        self.last = nn.Conv2d(9, 3, 3, padding=1)
        self.register_buffer("shift", torch.full((3, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.silu(self.norm(self.first(x)))) * self.gain + self.shift


def data(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the global batch of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(BATCH, 3, 6, 6, generator=generator)
    return x, x.flip(1) * 0.5 + 0.1 * torch.randn(x.shape, generator=generator)


def trainable(runtime: Runtime, layout: str, micro: int = 0, seed: int = 0, **optim: Any) -> Trainable:
    return Trainable(
        runtime,
        Network(seed),
        OptimConfig(**OPTIM | optim),
        BatchConfig(global_batch_size=BATCH, micro_batch_size=micro),
        total_samples=BATCH * STEPS,
        zero_stage=LAYOUTS[layout],
        ema=EmaConfig(half_life_samples=HALF_LIFE, warmup_ratio=EMA_WARMUP),
        name="network",
    )


def step(t: Trainable, runtime: Runtime, index: int, micro: int = 0, spoil: float = 1.0) -> tuple[float, float]:
    """One optimiser step; global loss and gradient norm. Micro-batches are interleaved over the processes."""
    x, y = data(index)
    micro = micro or BATCH // runtime.world
    passes = BATCH // runtime.world // micro
    total = 0.0
    for k in range(passes):
        mine = slice((k * runtime.world + runtime.rank) * micro, (k * runtime.world + runtime.rank + 1) * micro)
        loss = (t(x[mine]) - y[mine]).square().mean() * spoil
        t.backward(loss, last=k == passes - 1)
        total += runtime.mean({"loss": loss})["loss"] / passes
    return total, t.step((index + 1) * BATCH)


class Report:
    """What the main process leaves for the tests."""

    def __init__(self, runtime: Runtime, folder: Path) -> None:
        self.runtime, self.folder = runtime, folder
        self.numbers: dict[str, Any] = {}

    def weights(self, name: str, t: Trainable, ema: bool = False) -> None:
        tensors = t.weights(ema)
        if self.runtime.is_main:
            save_file(tensors, self.folder / f"{name}.safetensors")

    def close(self) -> None:
        if self.runtime.is_main:
            (self.folder / "numbers.json").write_text(json.dumps(self.numbers))


def curve(report: Report, runtime: Runtime, layout: str) -> None:
    """The whole run with a checkpoint in it, and its end once more from the checkpoint."""
    t = trainable(runtime, layout)
    history = []
    for index in range(STEPS):
        history.append(step(t, runtime, index))
        if index + 1 == SAVED_AT:
            t.save(report.folder / layout)
            runtime.barrier()
    report.numbers[f"{layout}/curve"] = history
    report.weights(f"{layout}-end", t)
    report.weights(f"{layout}-end-ema", t, ema=True)
    continued(report, runtime, report.folder / layout, layout, f"{layout}-resumed")


def continued(report: Report, runtime: Runtime, folder: Path, layout: str, name: str) -> None:
    t = trainable(runtime, layout, seed=1)
    t.load(folder)
    for index in range(SAVED_AT, STEPS):
        step(t, runtime, index)
    report.weights(f"{name}-end", t)
    report.weights(f"{name}-end-ema", t, ema=True)


def short_runs(report: Report, runtime: Runtime, layout: str) -> None:
    """Accumulation, no clipping, and a step with a gradient that is not finite."""
    micro = BATCH // runtime.world // 2
    t = trainable(runtime, layout, micro)
    report.numbers[f"{layout}/accumulated"] = [step(t, runtime, index, micro) for index in range(SHORT)]
    t = trainable(runtime, layout, grad_clip=0.0)
    report.numbers[f"{layout}/unclipped"] = [step(t, runtime, index) for index in range(SHORT)]
    report.weights(f"{layout}-unclipped", t)
    t = trainable(runtime, layout)
    for index in range(SHORT):
        if index == SHORT // 2:
            step(t, runtime, index, spoil=float("nan"))
        step(t, runtime, index)
    report.numbers[f"{layout}/skipped"] = t.skipped_steps
    report.weights(f"{layout}-spoiled", t)


def low_precision(report: Report, runtime: Runtime, layout: str) -> None:
    t = trainable(runtime, layout)
    history = []
    if runtime.precision is Precision.fp16:
        t.backend.scale.value = 2.0**26  # overflows until it was halved often enough
        while t.skipped_steps == len(history) < 30:
            history.append(step(t, runtime, 0))
        report.numbers[f"{layout}/fp16/skipped"] = t.skipped_steps
        history = history[-1:]
    history += [step(t, runtime, index) for index in range(len(history), SHORT)]
    report.numbers[f"{layout}/{runtime.precision.value}"] = history
    t.save(report.folder / f"{layout}-{runtime.precision.value}")
    runtime.barrier()
    other = trainable(runtime, layout, seed=1)
    other.load(report.folder / f"{layout}-{runtime.precision.value}")
    same = step(t, runtime, SHORT) == step(other, runtime, SHORT)
    report.numbers[f"{layout}/{runtime.precision.value}/resumed"] = (
        same and t.backend.scale.state() == other.backend.scale.state()
    )


def main(out: Path, other: Path | None) -> None:
    runtime = start(RuntimeConfig(threads=1, timeout_s=60))
    report = Report(runtime, out)
    for layout in LAYOUTS:
        curve(report, runtime, layout)
        short_runs(report, runtime, layout)
    for old, new in (("zero1", "zero3"), ("zero3", "zero2"), ("ddp", "zero1"), ("zero2", "ddp")):
        continued(report, runtime, out / old, new, f"{old}-to-{new}")
    from train.engine import zero  # DeepSpeed is to be imported by the engine, after `start` told it the device

    zero.SMALL_NETWORK = 0  # stage 3 leaves small tensors whole
    continued(report, runtime, out / "zero2", "zero3", "zero2-to-persistent")
    if other is not None:
        for layout in LAYOUTS:
            continued(report, runtime, other / layout, layout, f"other-{layout}")
    for precision in (Precision.bf16, Precision.fp16):
        runtime = start(RuntimeConfig(threads=1, precision=precision))
        for layout in LAYOUTS:
            low_precision(report, runtime, layout)
    report.close()
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    leave(0)
