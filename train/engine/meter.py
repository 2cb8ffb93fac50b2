"""Means of metrics and timings over the steps between two log lines."""

import resource
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from train.engine.journal import say
from train.engine.runtime import Runtime


class Meter:
    """Adds up on the device; nothing is read back before `report` or `state`.

    `interval` is what `state` of an earlier start returned: the interval goes on where it was interrupted.
    """

    def __init__(self, interval: Mapping[str, list[float]]) -> None:
        self.sums: dict[str, Tensor] = {k: torch.tensor(v[0], dtype=torch.float64) for k, v in interval.items()}
        self.counts: dict[str, int] = {name: int(count) for name, (_, count) in interval.items()}
        self.steps, self.samples, self.step_s, self.wait_s = 0, 0, 0.0, 0.0

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """One more value of each metric."""
        for name, value in metrics.items():
            term = torch.as_tensor(value, dtype=torch.float64).detach()
            self.sums[name] = self.sums[name].to(term.device) + term if name in self.sums else term
            self.counts[name] = self.counts.get(name, 0) + 1

    def tick(self, samples: int, step_s: float, wait_s: float) -> None:
        """One step over `samples` took `step_s` seconds, `wait_s` of them waiting for data."""
        self.steps, self.samples = self.steps + 1, self.samples + samples
        self.step_s, self.wait_s = self.step_s + step_s, self.wait_s + wait_s

    def report(self, runtime: Runtime, samples_left: int) -> dict[str, float]:
        """Means over the interval and over the processes, with `perf/…`; a new interval begins. Collective."""
        images_per_s = self.samples / self.step_s
        perf = {
            "perf/images_per_s": images_per_s,
            "perf/step_ms": 1000 * self.step_s / self.steps,
            "perf/data_wait_share": self.wait_s / self.step_s,
            "perf/memory_gib": peak_memory_gib(runtime.device),
            "perf/eta_s": samples_left / images_per_s,
        }
        means: dict[str, Tensor | float] = {name: self.sums[name] / self.counts[name] for name in self.sums}
        self.sums, self.counts = {}, {}
        self.steps, self.samples, self.step_s, self.wait_s = 0, 0, 0.0, 0.0
        return runtime.mean({**means, **perf})

    def state(self, runtime: Runtime) -> dict[str, list[float]]:
        """[sum, count] of each metric, the sum averaged over the processes. Collective."""
        sums = runtime.mean(self.sums)
        return {name: [float(sums[name]), self.counts[name]] for name in sums}


def left_out(stage: str, batch: dict[str, Any], micro: int) -> dict[str, float]:
    """Name the samples that a micro-batch lacks; their share of it, where the stream may leave any out at all."""
    if "skipped" not in batch:
        return {}
    for sample in batch["skipped"]:
        say(stage, f"skipped: {sample}")
    return {"data/skipped": len(batch["skipped"]) / micro}


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: of the accelerator, or of this process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
