"""One process of test_zero_equality.py: trains a small network in every layout and leaves what came out.

Usage: python zero_worker.py OUT [PREVIOUS], alone or under torchrun. PREVIOUS: what the launch before left, with other
processes, whose runs this one goes on with.
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
from conf.schema import (
    BackendName,
    BatchConfig,
    EmaConfig,
    Offload,
    OptimConfig,
    OptimizerName,
    Precision,
    RuntimeConfig,
    UNetRuntimeConfig,
)
from data.order import step_positions
from train.engine import contents
from train.engine.backend import distribute as backend
from train.engine.runtime import Runtime, start, stop
from train.engine.trainable import Trainable

FSDP, PAIR = BackendName.fsdp, 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"backend": BackendName.ddp},
    "fsdp": {"backend": FSDP},
    "fsdp-offload": {"backend": FSDP, "offload": Offload.parameters},
    "fsdp-hybrid": {"backend": FSDP, "shard_processes": PAIR},
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "zero3-hybrid": {"zero_stage": 3, "shard_processes": PAIR},
    "zero1-offload": {"zero_stage": 1, "offload": Offload.optimizer},
    "zero2-offload": {"zero_stage": 2, "offload": Offload.optimizer},
    "zero3-offload": {"zero_stage": 3, "offload": Offload.optimizer},
    "zero3-offload-all": {"zero_stage": 3, "offload": Offload.parameters},
}
CHANGES = (("zero1", "zero3"), ("zero3", "fsdp"), ("ddp", "zero1"), ("zero2", "ddp"), ("fsdp", "zero2-offload"))
CHAIN = {4: (0, 13), 2: (13, 26), 1: (26, 38), 3: (38, 50)}  # processes: the part of a run that they do in turn
BATCH, STEPS, SAVED_AT, SHORT, TOUR = 12, 50, 40, 8, 4
UNEVEN, MOST = 13, 3  # a batch that no number of processes divides, in 5 or 6 micro-batches, or 8 of four processes
OPTIM = {"lr": 5e-3, "weight_decay": 0.1, "grad_clip": 0.4, "warmup_samples": 120}
HALF_LIFE, EMA_WARMUP = 90.0, 0.5


class Network(nn.Module):
    """Odd sizes, so that no shard ends with a parameter; a list of blocks, a single number and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(3, 9, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(3, 9), nn.SiLU(), nn.Conv2d(9, 9, size, padding=size // 2)) for size in (3, 1)
        )
        self.gain = nn.Parameter(torch.tensor([1.3]))
        self.last = nn.Conv2d(9, 3, 3, padding=1)
        self.register_buffer("shift", torch.full((3, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x) * self.gain + self.shift


def data(step: int, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the global batch of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(batch, 3, 6, 6, generator=generator)
    return x, x.flip(1) * 0.5 + 0.1 * torch.randn(x.shape, generator=generator)


def trainable(
    runtime: Runtime,
    layout: str,
    micro: int = 0,
    seed: int = 0,
    compiled: bool = False,
    batch: int = BATCH,
    **optim: Any,
) -> Trainable:
    options = LAYOUTS[layout]
    if runtime.world % options.get("shard_processes", 1):
        options = options | {"shard_processes": None}
    with torch.device("meta"):
        network = Network(seed)
    network.shift = torch.full((3, 1, 1), 0.1)
    return Trainable(
        runtime,
        network,
        OptimConfig(**OPTIM | optim),
        BatchConfig(global_batch_size=batch, micro_batch_size=micro, uneven=True),
        total_samples=BATCH * STEPS,
        cfg=UNetRuntimeConfig(**options, compile=compiled),
        ema=EmaConfig(half_life_samples=HALF_LIFE, warmup_ratio=EMA_WARMUP),
        name="network",
        initial=dict(Network(seed).named_parameters()).__getitem__,
    )


def step(t: Trainable, runtime: Runtime, index: int, spoil: float = 1.0) -> tuple[float, float]:
    """One optimiser step; global loss and gradient norm."""
    batch = t.batch.global_batch_size
    x, y = data(index, batch)
    micro, passes = t.batch.split(runtime.world)
    total = 0.0
    for number, mine in enumerate(step_positions(0, batch, runtime.rank, runtime.world, micro), start=1):
        loss = (t(x[mine].to(runtime.device)) - y[mine].to(runtime.device)).square().mean() * spoil
        t.backward(loss, last=number == passes)
        total += runtime.sum({"loss": loss * len(mine)})["loss"] / batch
    return total, float(t.step((index + 1) * batch))


class Report:
    """What the main process leaves for the tests."""

    def __init__(self, runtime: Runtime, folder: Path) -> None:
        self.runtime, self.folder = runtime, folder
        self.numbers: dict[str, Any] = {}
        self.graphs = 0  # that torch.compile made

    def weights(self, name: str, t: Trainable, ema: bool = False) -> None:
        tensors = t.weights(ema)
        if self.runtime.is_main:
            save_file(tensors, self.folder / f"{name}.safetensors")

    def ends(self, name: str, t: Trainable) -> None:
        self.weights(f"{name}-end", t)
        self.weights(f"{name}-end-ema", t, ema=True)

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
    report.ends(layout, t)
    continued(report, runtime, layout, layout, f"{layout}-resumed")


def continued(report: Report, runtime: Runtime, saved: str, layout: str, name: str) -> None:
    t = trainable(runtime, layout, seed=1)
    t.load(report.folder / saved)
    for index in range(SAVED_AT, STEPS):
        step(t, runtime, index)
    report.ends(name, t)


def tour(report: Report, runtime: Runtime) -> None:
    """One run that changes its layout every few steps, through all of them."""
    history, layouts = list[tuple[float, float]](), [*LAYOUTS, "ddp"]
    for number, layout in enumerate(layouts):
        t = trainable(runtime, layout, seed=number)
        if number:
            t.load(report.folder / f"tour-{number - 1}")
        history += [step(t, runtime, index) for index in range(len(history), min(STEPS, len(history) + TOUR))]
        t.save(report.folder / f"tour-{number}")
        runtime.barrier()
    report.numbers["tour"] = history
    report.ends("tour", t)


def chain(report: Report, runtime: Runtime, previous: Path | None, layout: str) -> None:
    """Go on for a while with the run that the launch before, with other processes, left."""
    t = trainable(runtime, layout, seed=0 if previous is None else 1)
    if previous is not None:
        t.load(previous / f"{layout}-chain")
    report.numbers[f"{layout}/chain"] = [step(t, runtime, index) for index in range(*CHAIN[runtime.world])]
    t.save(report.folder / f"{layout}-chain")
    report.ends(f"{layout}-chain", t)


def short_runs(report: Report, runtime: Runtime, layout: str) -> None:
    """Accumulation, torch.compile, no clipping, and a step with a gradient that is not finite."""
    micro = BATCH // runtime.world // 2
    t = trainable(runtime, layout, micro)
    report.numbers[f"{layout}/accumulated"] = [step(t, runtime, index) for index in range(SHORT)]
    if not layout.startswith("zero3"):
        torch._dynamo.reset()
        report.graphs = 0
        t = trainable(runtime, layout, compiled=True)
        report.numbers[f"{layout}/compiled"] = [step(t, runtime, index) for index in range(SHORT)]
        report.numbers[f"{layout}/graphs"] = report.graphs
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


def uneven(report: Report, runtime: Runtime, layout: str) -> None:
    """Micro-batches of two sizes, on one and two processes compiled for both."""
    torch._dynamo.reset()
    report.graphs = 0
    compiled = runtime.world <= 2 and not layout.startswith("zero3")
    t = trainable(runtime, layout, MOST, compiled=compiled, batch=UNEVEN)
    report.numbers[f"{layout}/uneven"] = [step(t, runtime, index) for index in range(SHORT)]
    report.numbers[f"{layout}/uneven/graphs"] = report.graphs
    report.weights(f"{layout}-uneven", t)


def muon(report: Report, runtime: Runtime, layout: str) -> None:
    """Matrices whose steps need all of a parameter, a gradient that is not finite, and the end from a checkpoint."""
    t = trainable(runtime, layout, name=OptimizerName.muon)
    history = []
    for index in range(SHORT):
        history.append(step(t, runtime, index))
        if index + 1 == SHORT // 2:
            step(t, runtime, index, spoil=float("nan"))
            t.save(report.folder / f"{layout}-muon")
            runtime.barrier()
    report.numbers[f"{layout}/muon"] = history
    report.weights(f"{layout}-muon", t)
    t = trainable(runtime, layout, seed=1, name=OptimizerName.muon)
    t.load(report.folder / f"{layout}-muon")
    for index in range(SHORT // 2, SHORT):
        step(t, runtime, index)
    report.weights(f"{layout}-muon-resumed", t)


def low_precision(report: Report, runtime: Runtime, layout: str) -> None:
    t = trainable(runtime, layout)
    history = []
    if runtime.precision is Precision.fp16:
        t.backend.scale.factor.fill_(2.0**26)  # overflows until it was halved often enough
        while t.skipped_steps == len(history) < 30:
            history.append(step(t, runtime, 0))
        t.backend.scale.factor /= 2  # later gradients may be larger
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


def compile_eagerly(report: Report) -> None:
    """Trace and guard as torch.compile does, without the minutes of code generation; count the traces."""
    real = torch.compile

    def traced(graph: Any, inputs: Any) -> Any:
        report.graphs += 1
        return graph.forward

    torch.compile = lambda function, **options: real(function, **options | {"backend": traced})  # type: ignore
    backend.require_compiler = lambda: None


def main(out: Path, previous: Path | None) -> None:
    contents.ALIGNMENT, contents.ROUND = 64, 640  # bytes: all have parts of these small files, of several rounds
    runtime = start(RuntimeConfig(threads=1, timeout_s=60))
    report = Report(runtime, out)
    compile_eagerly(report)
    for layout in LAYOUTS:
        chain(report, runtime, previous, layout)
        if runtime.world != 3:
            curve(report, runtime, layout)
        if runtime.world <= 2:
            short_runs(report, runtime, layout)
        uneven(report, runtime, layout)
        muon(report, runtime, layout)
        if layout == "fsdp-hybrid":
            report.numbers["deepspeed imported"] = "deepspeed" in sys.modules
    if runtime.world == 4:
        tour(report, runtime)
    if runtime.world <= 2:
        for old, new in CHANGES:
            continued(report, runtime, old, new, f"{old}-to-{new}")
        from train.engine.backend import zero

        small, zero.SMALL_NETWORK = zero.SMALL_NETWORK, 0  # stage 3 leaves small tensors whole
        continued(report, runtime, "zero2", "zero3", "zero2-to-persistent")
        zero.SMALL_NETWORK = small
        for precision in (Precision.bf16, Precision.fp16):
            runtime = start(RuntimeConfig(threads=1, precision=precision))
            for layout in LAYOUTS:
                low_precision(report, runtime, layout)
    report.close()
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    leave(0)
