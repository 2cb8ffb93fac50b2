"""How far windows and lanes are from a full permutation: where neighbours of the data set meet again in the stream.

The unit is samples between two that are neighbours in the manifest; a full permutation puts a third of the epoch
between them on average. The bar is what a perfect shuffle inside each window would give, less a tenth.
"""

from collections.abc import Callable, Iterator

import numpy as np
from _compare import Comparison, main

from conf.schema import StreamConfig
from data.image_dataset import order_of

SHARDS, SHARD = 256, 400  # shards, and samples of each
SAMPLES = SHARDS * SHARD
BATCH = 256


def distance(window: int, lanes: int = 0) -> Callable[[], float]:
    """Mean distance in the stream of samples that are neighbours in the manifest."""

    def measure() -> float:
        order = order_of(0, [SHARD] * SHARDS, StreamConfig(window=window, lanes=lanes), BATCH)
        places = np.empty(SAMPLES, np.int64)
        places[order.many(range(SAMPLES))] = np.arange(SAMPLES)
        return float(np.abs(np.diff(places)).mean())

    return measure


def comparisons() -> Iterator[Comparison]:
    """Each window, of each lane, against all shards at once."""
    for window, lanes in ((4, 1), (16, 1), (64, 1), (2, 8), (8, 8), (1, 64)):
        yield Comparison(
            name=f"window_{window}_of_{SHARDS}_shards" + (f"_in_{lanes}_lanes" if lanes > 1 else ""),
            ours=distance(window, lanes),
            peer=distance(0),
            unit="samples",
            bar=0.9 * window * lanes / SHARDS,
            pairs=1,
        )


if __name__ == "__main__":
    main(comparisons())
