"""A network against a peer with the same weights: seconds and peak memory of a forward pass or a training step."""

from collections.abc import Callable, Iterator

import torch
from _compare import Comparison, rate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

THREADS = 2
PRODUCT = 2048  # rows and columns of the matrices that show what the machine can multiply
BAR = 0.85  # for seconds and for bytes, ours / the peer's


def in_seconds_and_bytes(
    name: str,
    ours: Callable[[], Tensor],
    peer: Callable[[], Tensor],
    wrap: Callable[[Callable[[], Tensor]], Callable[[], None]],
) -> Iterator[Comparison]:
    """Both comparisons of two networks; `wrap`: `forward` or `training_step`."""
    for unit, measure, pairs in (("s", seconds, 5), ("bytes", peak_bytes, 1)):
        yield Comparison(
            name=name,
            ours=measure(wrap(ours)),
            peer=measure(wrap(peer)),
            unit=unit,
            bar=BAR,
            lower_is_better=True,
            pairs=pairs,
        )


def training_step(call: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward and backward pass."""
    return lambda: call().square().mean().backward()


def forward(call: Callable[[], Tensor]) -> Callable[[], None]:
    """Without gradients, as in sampling."""

    def work() -> None:
        with torch.no_grad():
            call()

    return work


def seconds(work: Callable[[], object]) -> Callable[[], float]:
    """A measurement: how long `work` takes."""
    per_second = rate(1, work)
    return lambda: 1 / per_second()


def product_seconds(flops: float) -> Callable[[], float]:
    """A measurement: how long so many operations take as products of two large matrices in fp32."""
    left, right = torch.randn(2, PRODUCT, PRODUCT).unbind()
    measure = seconds(lambda: left @ right)
    return lambda: measure() * flops / (2 * PRODUCT**3)


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
