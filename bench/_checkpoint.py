"""One of several processes that save and resume the state of a training, in one of several ways.

Usage, under torchrun: _checkpoint.py OUT BACKEND ELEMENTS WAY... with the names of `WAYS`. OUT: {WAY: {figure: value}}
of the slowest process, or of the fullest, and as "own" the bytes of the weights that a process holds.
"""

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # works where the project is not installed, too

from conf.ending import leave
from conf.schema import BackendName, BatchConfig, EmaConfig, LoopConfig, OptimConfig, RuntimeConfig, UNetRuntimeConfig
from models.formats.tensor_stream import TensorStream, write_stream
from train.engine.checkpoint import Checkpoints
from train.engine.contents import Contents, TensorFile, read_into, stream
from train.engine.runtime import Runtime, start, stop
from train.engine.state import State
from train.engine.trainable import MOMENTS, Trainable

WIDTH, EVERY_S = 1024, 0.01


class Network(nn.Module):
    """As many square layers as it takes."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        layers = max(1, round(elements / WIDTH**2))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)) for _ in range(layers))


def trainable(runtime: Runtime, backend: str, elements: int) -> Trainable:
    """Its state, each parameter another random number."""
    with torch.device("meta"):
        network = Network(elements)
    numbers = {name: float(number) for number, (name, _) in enumerate(network.named_parameters())}
    cfg = UNetRuntimeConfig(backend=BackendName(backend), zero_stage=1)
    return Trainable(
        runtime,
        network,
        OptimConfig(),
        BatchConfig(global_batch_size=runtime.world),
        1000,
        cfg,
        EmaConfig(half_life_samples=100),
        initial=lambda name: torch.full((WIDTH, WIDTH), numbers[name]),
    )


class Watched:
    """What happens to this process meanwhile: seconds, bytes that it writes, most memory beside what it had."""

    def __enter__(self) -> "Watched":
        self.process, self.over = psutil.Process(), threading.Event()
        self.before, self.written = self.process.memory_info().rss, self.process.io_counters().write_bytes
        self.most, self.began = self.before, time.perf_counter()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.over.wait(EVERY_S):
            self.most = max(self.most, self.process.memory_info().rss)

    @property
    def seconds(self) -> float:
        """So far."""
        return time.perf_counter() - self.began

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        self.thread.join()
        self.bytes = float(self.process.io_counters().write_bytes - self.written)
        self.memory, self.resident = float(self.most - self.before), float(self.most)


def parallel(t: Trainable, runtime: Runtime, folder: Path) -> dict[str, float]:
    """A checkpoint in the background, by all processes."""
    with Checkpoints(folder, runtime, LoopConfig()) as checkpoints, Watched() as watched:
        checkpoints.save({"network": t}, State(samples_seen=1), wait=False)
        stall_s = watched.seconds
        checkpoints.wait()
        runtime.barrier()
        whole_s = watched.seconds
    return {"stall_s": stall_s, "whole_s": whole_s, "bytes": watched.bytes, "memory": watched.memory}


def by_rank_0(t: Trainable, runtime: Runtime, folder: Path) -> dict[str, float]:
    """As before checkpoints were parallel: all make the tensors for rank 0, which keeps a copy and writes that."""
    states = [t._state_of(master) for master in t.backend.masters]
    kinds = [t.backend.masters, t._averages()["ema"], *([state[key] for state in states] for key in MOMENTS)]
    with Watched() as watched:
        copies = []
        for shards in kinds:
            made = stream(t.backend.layout, shards, {})
            if runtime.is_main:
                copies.append(TensorStream(made.specs, iter([tensor.clone() for tensor in made.tensors])))
            made.drain()
        stall_s = watched.seconds
        folder.mkdir(exist_ok=True, parents=True)
        for number, copy in enumerate(copies):
            write_stream(folder / f"{number}.safetensors", copy)
        runtime.barrier()
        whole_s = watched.seconds
    return {"stall_s": stall_s, "whole_s": whole_s, "bytes": watched.bytes, "memory": watched.memory}


def by_torch(t: Trainable, runtime: Runtime, folder: Path) -> dict[str, float]:
    """torch.distributed.checkpoint of the same tensors, where they are DTensors."""
    found: dict[str, Any] = {}
    states = [t._state_of(master) for master in t.backend.masters]
    kinds = {"weights": t.backend.masters, "ema": t._averages()["ema"]}
    for kind, shards in (kinds | {key: [state[key] for state in states] for key in MOMENTS}).items():
        for (name, parameter), shard in zip(t.module.named_parameters(), shards, strict=True):
            assert isinstance(parameter, DTensor)
            local = shard.detach().view(parameter.to_local().shape)
            found[f"{kind}.{name}"] = DTensor.from_local(local, parameter.device_mesh, parameter.placements)
    with Watched() as watched:
        save(found, checkpoint_id=folder)
        runtime.barrier()
        whole_s = watched.seconds
    return {"whole_s": whole_s, "bytes": watched.bytes, "memory": watched.memory}


def resumed(t: Trainable, runtime: Runtime, folder: Path) -> dict[str, float]:
    """Reading it again, verified; every tensor is what it was."""
    before = [float(master.double().sum()) for master in t.backend.masters]
    for master in t.backend.masters:
        master.zero_()
    with Watched() as watched:
        Checkpoints(folder, runtime, LoopConfig()).resume({"network": t}, State())
        runtime.barrier()
        whole_s = watched.seconds
    assert [float(master.double().sum()) for master in t.backend.masters] == before
    return {"whole_s": whole_s, "memory": watched.memory}


def without_moments(t: Trainable, runtime: Runtime, folder: Path) -> dict[str, float]:
    """Weights and average alone, written and read again: of a network whose moments would not fit beside them."""
    layout, kinds = t.backend.layout, {"weights": t.backend.masters, "ema": t._averages()["ema"]}
    before = [float(shard.sum(dtype=torch.float64)) for shards in kinds.values() for shard in shards]
    with Watched() as watched:
        contents = Contents({name: TensorFile(layout, shards, {}) for name, shards in kinds.items()}, {})
        contents.write(folder, runtime.is_main)
        runtime.barrier()
        write_s = watched.seconds
        for name, shards in kinds.items():
            for shard in shards:
                shard.zero_()
            read_into(folder / name, layout, shards, {})
        runtime.barrier()
        whole_s = watched.seconds
    assert before == [float(shard.sum(dtype=torch.float64)) for shards in kinds.values() for shard in shards]
    return {
        "write_s": write_s,
        "read_s": whole_s - write_s,
        "bytes": watched.bytes,
        "memory": watched.memory,
        "resident": watched.resident,
    }


WAYS: dict[str, Callable[[Trainable, Runtime, Path], dict[str, float]]] = {
    "ours": parallel,
    "resume": resumed,
    "alone": by_rank_0,
    "torch": by_torch,
    "without_moments": without_moments,
}


@torch.no_grad()
def main(out: Path, backend: str, elements: int, ways: list[str]) -> None:
    runtime = start(RuntimeConfig(threads=1, timeout_s=600))
    t = trainable(runtime, backend, elements)
    facts: dict[str, Any] = {"own": float(sum(master.nbytes for master in t.backend.masters))}
    if "without_moments" not in ways:
        t.contents()  # AdamW's moments are there from now on
    for way in ways:
        folder = out.with_suffix("") / ("ours" if way == "resume" else way)
        runtime.barrier()
        measured = runtime.gather_objects(WAYS[way](t, runtime, folder))
        facts[way] = {name: max(one[name] for one in measured) for name in measured[0]}
        if way != "ours" and runtime.is_main:
            shutil.rmtree(folder)
    if runtime.is_main:
        out.write_text(json.dumps(facts))
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(float(sys.argv[3])), sys.argv[4:])
    leave(0)
