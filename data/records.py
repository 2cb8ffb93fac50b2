"""Samples of a source to finished members of a shard, made by a pool of processes in an order that never varies."""

import json
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process

from conf.errors import UserError
from conf.schema import BuildRun
from data.captions import clean_caption
from data.images import ImageError, encode_image, open_image, shrink
from data.sources import Rejected, SampleSource

CHUNK = 32  # samples per task of a worker
AHEAD = 4  # tasks per worker that are made before their turn to be written


@dataclass(frozen=True, slots=True)
class Record:
    """One sample as it goes into a shard."""

    key: str
    caption: str
    files: dict[str, bytes]  # extension → contents


@dataclass(frozen=True, slots=True)
class Reject:
    """One sample that cannot be used, and why."""

    key: str
    path: str  # or what else the source calls it
    reason: str


@dataclass(frozen=True, slots=True)
class RecordMaker:
    """The work of one process: a pure function of the index."""

    cfg: BuildRun
    source: SampleSource

    def make(self, index: int) -> Record | Reject:
        """Decode, shrink and encode sample `index`."""
        key = f"{index:09d}"
        try:
            return self._record(key, index)
        except (Rejected, ImageError) as error:
            return Reject(key, self.source.name(index), str(error))

    def _record(self, key: str, index: int) -> Record:
        cfg = self.cfg
        sample = self.source.sample(index)
        caption = clean_caption(sample.caption)
        if not caption:
            raise Rejected("empty caption")
        image = sample.image
        if isinstance(image, bytes):
            image = open_image(image, cfg.max_pixels, cfg.background)
        stored = shrink(image, cfg.resolution) if cfg.resolution else image
        meta = {
            "key": key,
            "caption": caption,
            "source": cfg.source.value,
            "width": stored.width,  # these names are img2dataset's
            "height": stored.height,
            "original_width": image.width,
            "original_height": image.height,
            **sample.meta,
        }
        return Record(
            key,
            caption,
            {
                cfg.format.value: encode_image(stored, cfg.format, cfg.quality),
                "txt": caption.encode(),
                "json": json.dumps(meta).encode(),
            },
        )


def make_all(maker: RecordMaker, workers: int) -> Iterator[Record | Reject]:
    """Every sample of the source in order, whatever the number of processes (0: one per core)."""
    samples = len(maker.source)
    chunks = [range(start, min(start + CHUNK, samples)) for start in range(0, samples, CHUNK)]
    workers = min(workers or _cores(), len(chunks))
    if workers == 1:
        for index in range(samples):
            yield maker.make(index)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start, initargs=(maker,))
    try:
        pending: deque[Future[list[Record | Reject]]] = deque()
        for chunk in chunks:
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
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """End this worker when the process that builds was killed: nobody else would."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _make_chunk(indices: range) -> list[Record | Reject]:
    assert _maker is not None
    return [_maker.make(index) for index in indices]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
