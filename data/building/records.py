"""Samples of a source to finished members of a shard, made by a pool of processes in an order that never varies."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from conf.errors import UserError
from conf.plain_json import dumps
from conf.process import cores, end_with_parent
from conf.schema import BuildRun
from data.building.filters import Dropped, check_size, check_texts, perceptual_hash
from data.building.sources import Ref, Rejected, SampleSource
from data.captions import Border, clean_caption
from data.images import encode_image, open_image, shrink
from data.labels import MAP, Use, encode_map, read_labels, shrink_map

CHUNK = 32  # samples per task of a worker
AHEAD = 4  # tasks per worker that are made before their turn to be written


@dataclass(frozen=True, slots=True)
class Record:
    """One sample as it goes into a shard."""

    key: str
    path: str  # what the source calls it
    caption: str  # or what else decides whether it is held out
    files: dict[str, bytes]  # extension → contents
    hash: int = 0  # perceptual, where near duplicates are looked for
    uses: tuple[Use, ...] = ()  # classes that its labels mention


@dataclass(frozen=True, slots=True)
class Reject:
    """One sample that cannot be used, or that a filter drops, and why."""

    key: str
    path: str  # or what else the source calls it
    reason: str
    filter: str = ""  # the option that drops it; "": it is broken


@dataclass(frozen=True, slots=True)
class Done:
    """How far the finished shards of a build reach that was killed."""

    border: Border | None = None  # between the sides, as it was settled
    until: dict[str, int] = field(default_factory=dict)  # side: number of the first sample that it may lack

    @property
    def start(self) -> int:
        """Number of the first sample that some side may lack."""
        nothing_held_out = self.border is not None and self.border.fraction == 0
        return self._of("train") if nothing_held_out else min(self._of("train"), self._of("heldout"))

    @property
    def end(self) -> int:
        """Number of the first sample that no finished shard can hold."""
        return max(self.until.values(), default=0)

    def covers(self, number: int, caption: str, key: str) -> bool:
        """Whether a sample is in a finished shard, if it is kept at all."""
        return self.border is not None and number < self._of(self.border.side(caption, key))

    def _of(self, side: str) -> int:
        return self.until.get(side, 0)


@dataclass(frozen=True, slots=True)
class RecordMaker:
    """The work of one process: a pure function of the ref and its number in the source."""

    cfg: BuildRun
    source: SampleSource
    done: Done = field(default_factory=Done)

    def make(self, number: int, ref: Ref) -> Record | Reject | None:
        """Decode, filter, shrink and encode a sample; None when it is in a finished shard."""
        if ref.problem is not None:
            return Reject(ref.key, ref.name, ref.problem)
        try:
            return self._record(number, ref)
        except Dropped as drop:
            return Reject(ref.key, ref.name, drop.reason, drop.filter_name)
        except UserError as error:  # Rejected, ImageError, or a shard that became unreadable
            return Reject(ref.key, ref.name, str(error))

    def _record(self, number: int, ref: Ref) -> Record | None:
        cfg, filters = self.cfg, self.cfg.filters
        sample = self.source.sample(ref.place)
        caption = clean_caption(sample.caption)
        if not caption:
            raise Rejected("empty caption")
        split_by = sample.split_by or caption
        if self.done.covers(number, split_by, ref.key):
            return None
        check_texts(filters, caption, sample.meta)
        image = sample.image
        if isinstance(image, bytes):
            image = open_image(image, cfg.max_pixels, cfg.background)
        check_size(filters, *image.size)
        labels = read_labels(sample.meta, sample.segments, image.size)
        stored = shrink(image, cfg.resolution) if cfg.resolution else image
        own = {
            "key": ref.key,
            "caption": caption,
            "source": cfg.source.value,
            "width": stored.width,  # these names are img2dataset's
            "height": stored.height,
        }
        meta = {**own, "original_width": image.width, "original_height": image.height, **sample.meta, **own}
        if labels.class_id is not None:
            meta["class_id"] = labels.class_id  # a table has it as text
        value = perceptual_hash(image) if filters.near_duplicates >= 0 else 0
        if filters.near_duplicates >= 0:
            meta["phash"] = f"{value:016x}"
        files = {
            cfg.format.value: encode_image(stored, cfg.format, cfg.quality),
            "txt": caption.encode(),
            "json": dumps(meta).encode(),
        }
        if labels.segments is not None:
            files[MAP] = encode_map(shrink_map(labels.segments, stored.size))
        return Record(ref.key, ref.name, split_by, files, value, tuple(labels.uses()))


def make_all(maker: RecordMaker, workers: int, scratch: Path) -> Iterator[Record | Reject | None]:
    """Every sample of the source from `maker.done.start` on, in order, by any number of processes (0: one per core)."""
    numbered = islice(enumerate(maker.source.refs(scratch)), maker.done.start, None)
    expected = maker.source.expected()
    workers = workers or cores()
    if workers == 1 or (expected is not None and expected <= CHUNK):
        for number, ref in numbered:
            yield maker.make(number, ref)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start, initargs=(maker,))
    try:
        pending: deque[Future[list[Record | Reject | None]]] = deque()
        while chunk := list(islice(numbered, CHUNK)):
            pending.append(pool.submit(_make_chunk, chunk))
            if len(pending) > AHEAD * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "workers: a process of the build died (out of memory?): set fewer workers or max_pixels"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_maker: RecordMaker | None = None  # of this worker process, sent once


def _start(maker: RecordMaker) -> None:
    global _maker
    _maker = maker
    end_with_parent()


def _make_chunk(chunk: list[tuple[int, Ref]]) -> list[Record | Reject | None]:
    assert _maker is not None
    return [_maker.make(number, ref) for number, ref in chunk]
