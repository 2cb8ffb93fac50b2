"""Which side of a data set a sample goes to: training, or held out."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from data.building.records import Record
from data.captions import Border, caption_rank
from data.shards.shard import ShardInfo, ShardWriter

PENDING_BYTES = 2**28  # of samples kept in memory while the split of a small set is not settled


@dataclass(slots=True)
class Split:
    """Sends each sample to training or to the held-out side, by its caption (or `Sample.split_by`) alone.

    In a set so small that one side would stay empty, the caption nearest to the border moves there. Where that is the
    caption of nearly all samples, as in images of one subject, each sample is sent by its caption and key. Until both
    sides have a sample (or at most 256 MiB wait) nothing is written, since this is not known.
    """

    train: ShardWriter
    heldout: ShardWriter
    fraction: float
    finished: Callable[[str, ShardInfo, int, Border], None]  # told of each shard: side, shard, samples before, border
    pending: list[tuple[int, Record]] | None = field(default_factory=list)  # with their numbers; None: settled
    pending_bytes: int = 0
    border: Border = field(init=False)

    def __post_init__(self) -> None:
        self.border = Border(self.fraction)
        if self.fraction == 0:
            self.pending = None

    def go_on(self, border: Border) -> None:
        """Continue a split that is settled."""
        self.border, self.pending = border, None

    def add(self, number: int, record: Record) -> None:
        """Write a sample of the source, now or when the split is settled."""
        if self.pending is None:
            self._write(number, record)
            return
        self.pending.append((number, record))
        self.pending_bytes += sum(map(len, record.files.values()))
        if self._side(self.pending[0][1]) != self._side(record):
            self._flush()
        elif self.pending_bytes > PENDING_BYTES:
            captions = {record.caption for _, record in self.pending}
            self.border = Border(self.fraction, by_key=2 * len(captions) < len(self.pending))
            self._flush()

    def settle(self) -> None:
        """Write what still waits: call it after the last sample."""
        if self.pending is None:
            return
        records = [record for _, record in self.pending]
        self.border = self._nearest(records, by_key=False)
        alike = max(Counter(caption_rank(record.caption) for record in records).values(), default=0)
        held_out = sum(self._side(record) == "heldout" for record in records)
        too_many = held_out > max(0.5, self.fraction) * len(records)
        if alike == len(records) or (too_many and alike > len(records) / 2):
            self.border = self._nearest(records, by_key=True)
        self._flush()

    def _nearest(self, records: list[Record], by_key: bool) -> Border:
        """The border nearest to the one that is asked for which leaves something on both sides, if there is one."""
        border = Border(self.fraction, by_key)
        ranks = sorted({border.rank(record.caption, record.key) for record in records})
        if len(ranks) < 2:
            return Border(0.0)
        if ranks[0] >= self.fraction:  # nothing is held out: take the lowest
            return Border(ranks[1], by_key)
        return Border(ranks[-1] if ranks[-1] < self.fraction else self.fraction, by_key)  # all: leave the highest

    def _side(self, record: Record) -> str:
        return self.border.side(record.caption, record.key)

    def _flush(self) -> None:
        waiting, self.pending = self.pending or [], None
        for number, record in waiting:
            self._write(number, record)

    def _write(self, number: int, record: Record) -> None:
        side = self._side(record)
        writer = self.heldout if side == "heldout" else self.train
        before = len(writer.finished)
        writer.add(record.key, record.files)
        if len(writer.finished) > before:
            self.finished(side, writer.finished[-1], number + 1, self.border)
