"""Checkpoints that all processes write, against rank 0 alone (as it was) and torch's own distributed ones.

Eight processes on this machine share a network of 100 M parameters under FSDP and under ZeRO 1: they have one disk and
two cores, so that writing in parallel gains no bandwidth here; what it saves is what one process does for all: bytes
and memory of rank 0, and the time in which the training stands still. Then four processes save and resume a network of
2 B: without AdamW's moments, which would take 15 GiB more than the 15 of its weights and average.
"""

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _compare import Comparison, main

from conf.process import python

WORKER = Path(__file__).with_name("_checkpoint.py")
PROCESSES, ELEMENTS = 8, 100_000_000
LARGE_PROCESSES, LARGE = 4, 2_000_000_000
PAIRS = 3


def measured(processes: int, backend: str, elements: int, *ways: str) -> dict[str, Any]:
    """Figures of one launch, by way."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "facts.json"
        command = [*python(processes), str(WORKER), str(out), backend, str(elements), *ways]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def against(name: str, launches: list[dict[str, Any]], figure: str, peer: str, unit: str, bar: float) -> Comparison:
    """A figure of ours and of a peer, of launches in which they came one after the other."""

    def in_turn(way: str) -> Iterator[float]:
        yield launches[0][way][figure]  # the warming up
        yield from (launch[way][figure] for launch in launches)

    ours, theirs = in_turn("ours"), in_turn(peer)
    return Comparison(
        name=f"{name}_{figure}_{peer}",
        ours=lambda: next(ours),
        peer=lambda: next(theirs),
        unit=unit,
        bar=bar,
        lower_is_better=True,
        pairs=len(launches),
    )


def single(name: str, ours: float, peer: float, unit: str, bar: float) -> Comparison:
    """A figure that does not vary, and what it is to be at most."""
    return Comparison(
        name=name, ours=lambda: ours, peer=lambda: peer, unit=unit, bar=bar, lower_is_better=True, pairs=1
    )


def comparisons() -> Iterator[Comparison]:
    """Both backends, then the large network."""
    for backend, ways in {
        "fsdp": ("ours", "resume", "alone", "torch"),
        "deepspeed": ("ours", "resume", "alone"),
    }.items():
        launches = [measured(PROCESSES, backend, ELEMENTS, *ways) for _ in range(PAIRS)]
        yield against(backend, launches, "stall_s", "alone", "s", 0.5)
        yield against(backend, launches, "whole_s", "alone", "s", 1.0)
        yield against(backend, launches, "bytes", "alone", "bytes", 1.2 / PROCESSES)
        yield against(backend, launches, "memory", "alone", "bytes", 0.5)
        if backend == "fsdp":
            yield against(backend, launches, "whole_s", "torch", "s", 1.0)
    facts = measured(LARGE_PROCESSES, "fsdp", LARGE, "without_moments")
    large, own = facts["without_moments"], facts["own"]
    print(json.dumps({"large": facts}))
    # A process holds its quarter of weights and average; an exchange of a round comes on top, and Python with torch.
    yield single("large_resident", large["resident"], 2 * own, "bytes", 1.3)
    yield single("large_memory_of_a_write", large["memory"], own, "bytes", 0.25)


if __name__ == "__main__":
    main(comparisons())
