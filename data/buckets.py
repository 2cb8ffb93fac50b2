"""Aspect-ratio buckets: images keep their shape, nearly, and yet every batch has one shape.

The images of a bucket lie in latent shards of their own, `NUMBER-WIDTHxHEIGHT.tar` (pixels), so that a manifest says
which there are and how many samples each has.
"""

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from data.order import Order, permuted, round_keys

Shape = tuple[int, int]  # width and height in pixels


def bucket_shapes(resolution: int, max_aspect: float, step: int) -> list[Shape]:
    """Shapes of about `resolution`² pixels, never more, with sides that are multiples of `step`.

    Args:
        max_aspect: longer side over shorter side, at most; 1 leaves the square alone.
    """
    shapes = {(resolution, resolution)}
    for longer in range(resolution + step, math.floor(resolution * max_aspect) + 1, step):
        shorter = resolution**2 // longer // step * step
        if shorter > 0 and longer <= max_aspect * shorter:
            shapes |= {(longer, shorter), (shorter, longer)}
    return sorted(shapes)


def nearest_shape(width: int, height: int, shapes: Sequence[Shape]) -> Shape:
    """The shape that an image loses least to, by the ratio of the aspects."""
    return min(shapes, key=lambda shape: abs(math.log(width / height * shape[1] / shape[0])))


def suffix_of(shape: Shape) -> str:
    """End of the name of a bucket's shard, behind its number."""
    return f"-{shape[0]}x{shape[1]}"


def bucket_of(shard_name: str) -> str:
    """The bucket that a shard belongs to, "" for a shard of a cache without buckets."""
    found = re.fullmatch(r"\d+(-\d+x\d+)\.tar", shard_name)
    return found[1] if found else ""


class BucketOrder:
    """Several groups of samples as one stream of runs, each run of one group: batches that have one shape.

    Each group is an endless stream of its own. In epoch e, which has no fixed number of runs, group b has its runs
    from ⌊e·n_b / run⌋ to ⌊(e + 1)·n_b / run⌋: none is ever more than a run ahead of its share, no sample is left out or
    comes twice before the group begins anew. The runs of an epoch are shuffled.

    Args:
        sizes: samples of each group.
        run: consecutive positions that are of one group.
    """

    def __init__(self, seed: int, sizes: Sequence[int], run: int) -> None:
        self.seed, self.run = seed, run
        self.sizes = np.asarray(sizes, np.int64)
        self.samples = int(self.sizes.sum())

    def __call__(self, position: int) -> tuple[int, int]:
        """Return the group that a position belongs to, and the position in the stream of that group."""
        number, offset = divmod(position, self.run)
        epoch = number * self.run // self.samples  # the earliest possible
        while int(self._before(epoch + 1).sum()) <= number:
            epoch += 1
        first, last = self._before(epoch), self._before(epoch + 1)
        runs = int((last - first).sum())
        place = permuted(round_keys(f"buckets/{self.seed}/{epoch}"), number - int(first.sum()), runs)
        ends = np.cumsum(last - first)
        group = int(np.searchsorted(ends, place, "right"))
        own = int(last[group]) - (int(ends[group]) - place)
        return group, own * self.run + offset

    def _before(self, epoch: int) -> np.ndarray:
        """Runs of each group before an epoch."""
        return epoch * self.sizes // self.run


class BucketedOrder:
    """The order of a data set whose shards belong to buckets: position in the stream to index in the manifest.

    Args:
        sizes: samples of each shard.
        buckets: that each shard belongs to.
        order_of: makes the order of one bucket from the sizes of its shards.
        run: consecutive positions that are of one bucket.
    """

    def __init__(
        self,
        seed: int,
        sizes: Sequence[int],
        buckets: Sequence[str],
        order_of: Callable[[list[int]], Order],
        run: int,
    ) -> None:
        every, names = np.asarray(sizes, np.int64), np.asarray(buckets)
        starts = np.cumsum(every) - every
        self.members = [np.flatnonzero(names == name) for name in sorted(set(buckets))]
        self.sizes = [every[shards] for shards in self.members]
        self.ends = [np.cumsum(own) for own in self.sizes]
        self.starts = [starts[shards] for shards in self.members]
        self.orders = [order_of(own.tolist()) for own in self.sizes]
        self.runs = BucketOrder(seed, [int(own.sum()) for own in self.sizes], run)

    def __call__(self, position: int) -> int:
        """Return the index, in the manifest's order, of the sample at a position of the endless stream."""
        bucket, own = self.runs(position)
        index = self.orders[bucket](own)
        shard = int(np.searchsorted(self.ends[bucket], index, "right"))
        return int(self.starts[bucket][shard] + index - (self.ends[bucket][shard] - self.sizes[bucket][shard]))

    def many(self, positions: Sequence[int]) -> list[int]:
        """Indices of the samples at several positions."""
        return [self(position) for position in positions]

    def upcoming(self, positions: Sequence[int]) -> list[int]:
        """The shards that are read at these positions, which are of one bucket, and soon after."""
        bucket, _ = self.runs(positions[0])
        return self.members[bucket][self.orders[bucket].upcoming([self.runs(p)[1] for p in positions])].tolist()
