"""The order in which training sees the samples: pure functions of (seed, position in the stream).

Position p belongs to epoch p // samples. Each epoch is its own permutation, computed and not stored, so that a resume
needs one integer and no number of ranks, workers or micro-batches changes the stream.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from math import isqrt
from typing import Protocol

import numpy as np

ROUNDS = 6  # of the Feistel network; even, since its halves are mixed in turn
MASK = (1 << 64) - 1
MIX_BLOCK = 4096  # positions over which a mix keeps its shares exactly


def sample_at(seed: int, position: int, samples: int) -> int:
    """Return the index, in [0, samples), of the sample at a position of the endless stream: a permutation an epoch."""
    epoch, index = divmod(position, samples)
    return permuted(round_keys(f"order/{seed}/{epoch}"), index, samples)


class Order(Protocol):
    """Position in the endless stream to index, in the manifest's order, of the sample there."""

    def __call__(self, position: int) -> int: ...

    def many(self, positions: Sequence[int]) -> list[int]:
        """Indices of the samples at several positions."""

    def upcoming(self, positions: Sequence[int]) -> list[int]:
        """The shards that are read at these positions and soon after, as far as the order goes shard by shard."""


class FullOrder:
    """A shuffle of all samples, another one in each epoch."""

    def __init__(self, seed: int, samples: int) -> None:
        self.seed, self.samples = seed, samples

    def __call__(self, position: int) -> int:
        """Return the index of the sample at a position."""
        return sample_at(self.seed, position, self.samples)

    def many(self, positions: Sequence[int]) -> list[int]:
        """Indices of the samples at several positions, three times as fast as one by one."""
        epochs = {position // self.samples for position in positions}
        if len(epochs) > 1:  # each has a permutation of its own
            return [self(position) for position in positions]
        (epoch,) = epochs
        keys = round_keys(f"order/{self.seed}/{epoch}")
        return permuted_all(keys, [position - epoch * self.samples for position in positions], self.samples)

    def upcoming(self, positions: Sequence[int]) -> list[int]:
        """None: any shard may be next."""
        return []


class WindowedOrder:
    """A shuffle for data that is far away: shards in a new order each epoch, the samples of a few of them mixed.

    What is read at a time are the shards of one window; each epoch is still a permutation of all samples.

    With several lanes, each part of a batch has shards of its own: the row of an epoch's shards is cut into a stretch
    for each lane, as long as its share of the epoch's positions, and the k-th part of every batch walks through
    stretch k, a window at a time. A process that is given the same parts of each batch, as `step_positions` does it,
    reads the shards of their stretches alone, and no number of processes changes the order.

    Args:
        sizes: samples of each shard.
        window: shards mixed at a time, of each lane; 0: all of it.
        lanes: equal parts of a batch.
        batch: consecutive positions that make one; a multiple of `lanes`.
    """

    def __init__(self, seed: int, sizes: Sequence[int], window: int, lanes: int = 1, batch: int = 1) -> None:
        self.seed, self.window, self.lanes, self.batch = seed, window or len(sizes), lanes, batch
        self.sizes = np.asarray(sizes, np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes  # of each shard in the manifest's order
        self.samples = int(self.sizes.sum())
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    # A cached method cannot travel to a loader process, and its permutations are quickly made there again.
    def __getstate__(self) -> tuple[int, np.ndarray, int, int, int]:
        return self.seed, self.sizes, self.window, self.lanes, self.batch

    def __setstate__(self, state: tuple[int, np.ndarray, int, int, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __call__(self, position: int) -> int:
        """Return the index, in the manifest's order, of the sample at a position of the endless stream."""
        epoch = position // self.samples
        shards, ends = self.epoch(epoch)
        index, begin, end = self._place(position)
        first, last = self._window(ends, index, begin, end)
        low = max(begin, int(ends[first - 1]) if first else 0)
        high = min(end, int(ends[last - 1]))
        keys = round_keys(f"window/{self.seed}/{epoch}/{first}")
        index = low + permuted(keys, index - low, high - low)
        place = int(np.searchsorted(ends, index, "right"))
        return int(self.starts[shards[place]] + index - (ends[place] - self.sizes[shards[place]]))

    def many(self, positions: Sequence[int]) -> list[int]:
        """Indices of the samples at several positions."""
        return [self(position) for position in positions]

    def upcoming(self, positions: Sequence[int]) -> list[int]:
        """The shards of the windows that some positions are in, then those that their lanes go on with."""
        now, later = list[int](), list[int]()
        for lane, position in {self._lane(p): p for p in reversed(positions)}.items():
            shards, ends = self.epoch(position // self.samples)
            index, begin, end = self._place(position)
            first, last = self._window(ends, index, begin, end)
            now += shards[first:last].tolist()
            if ends[last - 1] < end:
                later += shards[slice(*self._window(ends, int(ends[last - 1]), begin, end))].tolist()
            else:
                position = self._begins(lane, position // self.samples + 1)
                shards, ends = self.epoch(position // self.samples)
                later += shards[slice(*self._window(ends, *self._place(position)))].tolist()
        return list(dict.fromkeys([*now, *later]))

    def _lane(self, position: int) -> int:
        return position % self.batch * self.lanes // self.batch

    def _begins(self, lane: int, epoch: int) -> int:
        """The first position of a lane in an epoch."""
        start, part = epoch * self.samples, self.batch // self.lanes
        offset = start % self.batch
        begin = max(offset, lane * part)
        return start - offset + (begin if begin < (lane + 1) * part else self.batch + lane * part)

    def _place(self, position: int) -> tuple[int, int, int]:
        """Place of a position in the row of its epoch's samples, before its window is mixed, and its lane's stretch."""
        start = position // self.samples * self.samples
        lane = self._lane(position)
        begin = self._until(lane, start + self.samples) - self._until(lane, start)
        end = self._until(lane + 1, start + self.samples) - self._until(lane + 1, start)
        walked = [self._until(lane + 1, p) - self._until(lane, p) for p in (start, position)]
        return begin + walked[1] - walked[0], begin, end

    def _until(self, lane: int, position: int) -> int:
        """Positions below this one that belong to lanes below this one."""
        share = lane * self.batch // self.lanes
        return position // self.batch * share + min(position % self.batch, share)

    def _window(self, ends: np.ndarray, index: int, begin: int, end: int) -> tuple[int, int]:
        """The first shard, in the epoch's order, of the window around a place in a stretch, and the one behind it."""
        lane, place = (int(np.searchsorted(ends, i, "right")) for i in (begin, index))
        first = lane + (place - lane) // self.window * self.window
        return first, min(first + self.window, int(np.searchsorted(ends, end - 1, "right")) + 1)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of this epoch, and where each ends in it."""
        (key, *_) = round_keys(f"shards/{self.seed}/{epoch}")
        shards = np.argsort(_mixed(np.arange(len(self.sizes), dtype=np.uint64) ^ np.uint64(key)), kind="stable")
        return shards, np.cumsum(self.sizes[shards])


class Mix:
    """Several streams as one, each with its share of every block of positions.

    Args:
        weights: of the streams; only their ratios count.
    """

    def __init__(self, seed: int, weights: Sequence[float]) -> None:
        self.seed = seed
        shares = np.asarray(weights, float) / sum(weights) * MIX_BLOCK
        self.counts = np.floor(shares).astype(int)
        rest = MIX_BLOCK - int(self.counts.sum())
        # Largest remainders: the counts add up to the block, so that no share drifts over an endless stream.
        self.counts[np.argsort(self.counts - shares, kind="stable")[:rest]] += 1
        self.streams = np.repeat(np.arange(len(weights)), self.counts)
        self.first = np.cumsum(self.counts) - self.counts

    def __call__(self, position: int) -> tuple[int, int]:
        """Return the stream that a position belongs to, and the position in that stream."""
        block, index = divmod(position, MIX_BLOCK)
        place = permuted(round_keys(f"mix/{self.seed}/{block}"), index, MIX_BLOCK)
        stream = int(self.streams[place])
        return stream, block * int(self.counts[stream]) + place - int(self.first[stream])


def rng(seed: int, position: int, purpose: str) -> np.random.Generator:
    """Return the random stream of one sample for one purpose ("crop", "noise" …), independent of all others."""
    return np.random.Generator(np.random.Philox(key=_stream_key(seed, purpose), counter=[0, 0, 0, position]))


def choice(seed: int, position: int, purpose: str, weights: Sequence[float]) -> int:
    """Number of one of several, drawn for a sample by their weights."""
    if len(weights) == 1:
        return 0
    ends = list(accumulate(weights))
    return min(bisect_right(ends, rng(seed, position, purpose).random() * ends[-1]), len(ends) - 1)


def step_positions(step_start: int, global_batch: int, rank: int, world: int, micro: int) -> list[list[int]]:
    """Return the positions of one rank in the step that begins at `step_start` samples seen, one list per micro-batch.

    Each rank has the same number of micro-batches, the least with which none is larger than `micro`; their sizes differ
    by one at most. `ValueError` when one would be empty.
    """
    passes = -(-global_batch // (world * micro)) if micro > 0 else 0
    parts = world * passes
    if not 0 < parts <= global_batch:
        raise ValueError(f"{world} ranks with micro-batches of {micro} cannot share a global batch of {global_batch}")
    # Parts end to end: put together by rank, a batch is in the order of the stream at any number of ranks. Each ends at
    # the whole number below its share, so that the larger ones lie evenly among the others.
    ends = [step_start + part * global_batch // parts for part in range(rank * passes, (rank + 1) * passes + 1)]
    return [list(range(*span)) for span in pairwise(ends)]


def micro_batch_weights(global_batch: int, rank: int, world: int, micro: int) -> list[float]:
    """What the mean over each of a rank's micro-batches counts in the mean over a step: its size / the mean size.

    All exactly 1 where `step_positions` makes them of one size.
    """
    parts = step_positions(0, global_batch, rank, world, micro)
    return [len(part) * len(parts) * world / global_batch for part in parts]


def _mix(x: int) -> int:
    """Finaliser of SplitMix64 (Steele et al. 2014): spreads each input bit over the word."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def _mixed(x: np.ndarray) -> np.ndarray:
    """`_mix` of each element of a uint64 array; its products wrap by themselves."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(keys: tuple[int, ...], index: int, samples: int) -> int:
    """Image of `index` under a permutation of [0, samples).

    A Feistel network with modular addition on (left, right) in Z_a x Z_b, a·b >= samples, restricted to [0, samples)
    by cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    a = isqrt(samples - 1) + 1
    b = -(-samples // a)
    while True:
        right, left = divmod(index, a)
        for step in range(0, ROUNDS, 2):
            left = (left + _mix(right ^ keys[step])) % a
            right = (right + _mix(left ^ keys[step + 1])) % b
        index = right * a + left
        if index < samples:
            return index


def permuted_all(keys: tuple[int, ...], indices: Sequence[int], samples: int) -> list[int]:
    """`permuted` of several indices at once.

    Written twice, as numpy takes longer for one index than plain integers do, and less for a micro-batch. Sums of words
    would wrap here, so that each is brought below the modulus before it is added.
    """
    a = np.uint64(isqrt(samples - 1) + 1)
    b = np.uint64(-(-samples // int(a)))
    index = np.array(indices, np.uint64)
    images, walking = index.copy(), np.arange(len(index))
    while len(walking):
        right, left = np.divmod(index, a)
        for step in range(0, ROUNDS, 2):
            left = (left + _mixed(right ^ np.uint64(keys[step])) % a) % a
            right = (right + _mixed(left ^ np.uint64(keys[step + 1])) % b) % b
        images[walking] = index = right * a + left
        outside = index >= samples
        walking, index = walking[outside], index[outside]
    return images.tolist()


@lru_cache(maxsize=64)
def round_keys(name: str) -> tuple[int, ...]:
    digest = hashlib.blake2b(name.encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))


@lru_cache(maxsize=64)
def _stream_key(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{purpose}/{seed}".encode(), digest_size=16).digest(), "little")
