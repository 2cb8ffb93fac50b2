"""Means of metrics and timings over the steps between two log lines."""

import math
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.files import atomic_write
from train.engine.accelerators import device_name, peak_flops
from train.engine.metric_log import say
from train.engine.runtime import Runtime

PERCENTILES = (50, 95, 100)  # of the steps' times


class Meter:
    """Adds up on the device; nothing is read back before `report` or `state`.

    A metric is a number, whose mean over the steps counts, or a tensor [2]: a sum and how much it is the sum of, for
    means over what not every micro-batch has. A number may have a weight, such as that of its micro-batch.

    Args:
        interval: what `state` of an earlier start returned; the interval goes on where it was interrupted.
    """

    def __init__(self, interval: Mapping[str, list[float]]) -> None:
        self.totals: dict[str, Tensor] = {k: torch.tensor(known(v), dtype=torch.float64) for k, v in interval.items()}
        self._begin()

    def _begin(self) -> None:
        self.samples, self.wait_s, self.step_s = 0, 0.0, list[float]()

    def add(self, metrics: Mapping[str, Tensor | float], weight: float = 1.0) -> None:
        """One more value of each metric; `weight` is that of the numbers among them."""
        for name, value in metrics.items():
            value = torch.as_tensor(value, dtype=torch.float64).detach()
            term = torch.stack([value * weight, torch.full_like(value, weight)]) if value.ndim == 0 else value
            self.totals[name] = self.totals[name].to(term.device) + term if name in self.totals else term

    def tick(self, samples: int, step_s: float, wait_s: float) -> None:
        """One step over `samples` took `step_s` seconds, `wait_s` of them waiting for data."""
        self.samples, self.wait_s = self.samples + samples, self.wait_s + wait_s
        self.step_s.append(step_s)

    def report(self, runtime: Runtime, samples_left: int, own_s: float, flops_per_sample: float) -> dict[str, float]:
        """Means over the interval and over the processes, with `perf/…`; a new interval begins. Collective.

        Args:
            own_s: seconds of this interval in which this process waited for nobody; tells the slowest process.
            flops_per_sample: of training; 0 where nobody counted them.
        """
        total_s = sum(self.step_s)
        images_per_s = self.samples / total_s
        ranks = runtime.gather_objects((own_s + self.wait_s, self.wait_s / total_s, peak_memory_gib(runtime.device)))
        own, waits, memory = (list(values) for values in zip(*ranks, strict=True))
        perf = {
            "perf/images_per_s": images_per_s,
            "perf/step_ms": 1000 * total_s / len(self.step_s),
            "perf/data_wait_share": sum(waits) / len(waits),
            "perf/memory_gib": max(memory),
            "perf/slowest_rank": float(np.argmax(own)),
            "perf/slowest_rank_lag": max(own) * len(own) / sum(own) - 1 if sum(own) > 0 else 0.0,
            "perf/eta_s": samples_left / images_per_s,
            "perf/threads": float(torch.get_num_threads()),
        }
        for percent, value in zip(PERCENTILES, np.percentile(self.step_s, PERCENTILES), strict=True):
            perf[f"perf/step_ms_p{percent}"] = 1000 * float(value)
        if flops_per_sample > 0:
            flops = images_per_s * flops_per_sample / runtime.world
            peak = peak_flops(device_name(runtime.device), runtime.precision)
            perf |= {"perf/tflops_per_device": flops / 1e12} | ({"perf/mfu": flops / peak} if peak else {})
        means = {name: value / weight for name, (value, weight) in self.state(runtime).items() if weight > 0}
        self.totals = {}
        self._begin()
        return means | perf

    def state(self, runtime: Runtime) -> dict[str, list[float]]:
        """[sum, weight] of each metric over the processes, for one of them. Collective."""
        parts = {f"{name}/{i}": total[i] for name, total in self.totals.items() for i in (0, 1)}
        sums = runtime.sum(parts)
        return {name: [sums[f"{name}/0"] / runtime.world, sums[f"{name}/1"] / runtime.world] for name in self.totals}


def known(values: Sequence[float | None]) -> list[float]:
    """Numbers as a checkpoint's JSON has them, where null stands for what was not finite."""
    return [math.nan if value is None else value for value in values]


class StepProfile:
    """Three steps of a training as torch.profiler sees them: a trace for its viewers, and a table.

    Args:
        folder: for `rank-00000.json` (chrome://tracing, ui.perfetto.dev) and `rank-00000.txt`; None: no profile.
    """

    FIRST, STEPS = 5, 3  # the first steps are compiled, and allocate what the later ones have

    def __init__(self, runtime: Runtime, folder: Path | None) -> None:
        self.runtime, self.folder, self.steps = runtime, folder, 0
        self.profiler: torch.profiler.profile | None = None
        self.began = 0.0

    def step(self) -> None:
        """Between two steps."""
        if self.folder is None:
            return
        self.steps += 1
        if self.steps == self.FIRST:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
            self.began = self._now()
        elif self.profiler is not None and self.steps == self.FIRST + self.STEPS:
            seconds = self._now() - self.began
            self.profiler.stop()
            try:
                self._write(self.profiler, self.folder, seconds)
            except OSError as error:  # no reason to end a training
                say("profile", f"not written: {error}")
            self.profiler = None

    def _now(self) -> float:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _write(self, profiler: torch.profiler.profile, folder: Path, seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{self.runtime.rank:05d}"
        profiler.export_chrome_trace(f"{path}.json")
        on_device = self.runtime.device.type == "cuda"
        order = "self_device_time_total" if on_device else "self_cpu_time_total"
        head = f"{self.STEPS} steps in {seconds:.3f} s"
        if on_device:
            spans = [(one.time_range.start, one.time_range.end) for one in profiler.events() or () if of_device(one)]
            busy = busy_seconds(spans)
            head += f", in which the GPU computed for {busy:.3f} s and was idle for {1 - busy / seconds:.0%}"
        table = profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60)
        atomic_write(path.with_suffix(".txt"), f"{head}\n{table}\n".encode())
        if self.runtime.is_main:
            say("profile", f"{head}: {path}.txt, {path}.json")


def of_device(event: Any) -> bool:
    """Whether an event of a profile is work of the device."""
    return bool(event.device_type.name != "CPU")


def busy_seconds(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds in which at least one of some spans lasts, each from one microsecond to another."""
    busy = until = 0.0
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy / 1e6


class Clock:
    """Seconds spent in a part of the work, by the clock of the device that does it."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []  # beginnings and ends in turn: seconds, or events of the GPU

    def _mark(self) -> None:
        if not self.on_gpu:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def __enter__(self) -> None:
        self._mark()

    def __exit__(self, *exception: object) -> None:
        self._mark()

    def read(self) -> float:
        """Seconds since the last call."""
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        self.marks = []
        if not self.on_gpu:
            return float(sum(end - begin for begin, end in pairs))
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000


def left_out(stage: str, batch: dict[str, Any], micro: float) -> dict[str, float]:
    """Name the samples that a micro-batch lacks; their share of one, where the stream may leave any out at all.

    `micro`: the mean size of a step's micro-batches, so that the mean share is that of the samples.
    """
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
