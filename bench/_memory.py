"""Peak of the memory that a piece of work allocates, exact and the same in every run."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object]) -> Callable[[], float]:
    """A measurement: the most bytes of tensors on the CPU that `work` holds at once, beyond what was there before."""

    def measure() -> float:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            work()
        recorded = record.profiler
        assert recorded is not None and recorded.kineto_results is not None
        events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
        held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
        return float(held.cumsum(0).max())

    return measure
