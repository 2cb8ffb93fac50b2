"""Which side of a data set a sample goes to: training, or held out."""

from collections.abc import Callable
from dataclasses import dataclass, field

from data.captions import caption_rank, side_of
from data.records import Record
from data.shards import ShardInfo, ShardWriter

PENDING_BYTES = 2**28  # of samples kept in memory while the split of a small set is not settled


@dataclass(slots=True)
class Split:
    """Sends each sample to training or to the held-out side, by its caption (or `Sample.split_by`) alone.

    In a set so small that one side would stay empty, the caption nearest to the border moves there, if there are two
    captions. Until both sides have a sample (or at most 256 MiB wait) nothing is written, since this is not known.
    """

    train: ShardWriter
    heldout: ShardWriter
    fraction: float
    finished: Callable[[str, ShardInfo, int, float], None]  # told of each shard: side, shard, samples before, fraction
    pending: list[tuple[int, Record]] | None = field(default_factory=list)  # with their numbers; None: settled
    pending_bytes: int = 0

    def __post_init__(self) -> None:
        if self.fraction == 0:
            self.pending = None

    def go_on(self, fraction: float) -> None:
        """Continue a split that is settled."""
        self.fraction, self.pending = fraction, None

    def add(self, number: int, record: Record) -> None:
        """Write a sample of the source, now or when the split is settled."""
        if self.pending is None:
            self._write(number, record)
            return
        self.pending.append((number, record))
        self.pending_bytes += sum(map(len, record.files.values()))
        first, last = caption_rank(self.pending[0][1].caption), caption_rank(record.caption)
        if (first < self.fraction) != (last < self.fraction) or self.pending_bytes > PENDING_BYTES:
            self._flush()

    def settle(self) -> None:
        """Write what still waits: call it after the last sample."""
        if self.pending is None:
            return
        ranks = sorted({caption_rank(record.caption) for _, record in self.pending})
        if len(ranks) < 2:
            self.fraction = 0.0
        elif ranks[0] >= self.fraction:  # no caption is held out: take the lowest
            self.fraction = ranks[1]
        else:  # all are: leave the highest for training
            self.fraction = ranks[-1]
        self._flush()

    def _flush(self) -> None:
        waiting, self.pending = self.pending or [], None
        for number, record in waiting:
            self._write(number, record)

    def _write(self, number: int, record: Record) -> None:
        side = side_of(record.caption, self.fraction)
        writer = self.heldout if side == "heldout" else self.train
        before = len(writer.finished)
        writer.add(record.key, record.files)
        if len(writer.finished) > before:
            self.finished(side, writer.finished[-1], number + 1, self.fraction)
