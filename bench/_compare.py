"""What every bench script shares: pairs run in turn, one JSON line per comparison, exit 0 only if all hold."""

import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class Comparison:
    """Our way of doing something against a peer's; both return a figure in `unit`."""

    name: str
    ours: Callable[[], float]
    peer: Callable[[], float]
    unit: str  # "images/s", "s", "bytes" ...
    bar: float  # for the ratio ours / peer
    lower_is_better: bool = False  # the ratio must stay at or below the bar instead of at or above it
    pairs: int = 5  # measured in turn, after one of each for warming up


def rate(amount: float, work: Callable[[], object]) -> Callable[[], float]:
    """A measurement: `amount` of something per second of `work`."""

    def measure() -> float:
        started = time.perf_counter()
        work()
        return amount / (time.perf_counter() - started)

    return measure


def compare(comparison: Comparison) -> bool:
    """Run the pairs, print the JSON line, and say whether the bar holds.

    The two of a pair run one right after the other, so that a machine that others load slows both; the median of the
    paired ratios counts.
    """
    comparison.ours(), comparison.peer()
    pairs = [(comparison.ours(), comparison.peer()) for _ in range(comparison.pairs)]
    ratio = statistics.median(ours / peer for ours, peer in pairs)
    holds = ratio <= comparison.bar if comparison.lower_is_better else ratio >= comparison.bar
    line = {
        "name": comparison.name,
        "ours": statistics.median(ours for ours, _ in pairs),
        "peer": statistics.median(peer for _, peer in pairs),
        "unit": comparison.unit,
        "ratio": ratio,
        "bar": comparison.bar,
        "holds": holds,
    }
    print(
        json.dumps({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in line.items()})
    )
    return holds


def main(comparisons: Iterable[Comparison]) -> None:
    """Run all comparisons and end the script: exit code 0 only if all hold."""
    results = [compare(comparison) for comparison in comparisons]
    raise SystemExit(0 if all(results) else 1)
