"""All samples of a folder of shards by index; what is read is opened, checked and mapped when it is first needed.

A process holds the maps of a bounded number of shards and, for each shard of the manifest, where it begins: nothing
else grows with the data set.
"""

import math
import resource
import threading
import time
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.process import machines
from conf.schema import StreamConfig
from data.buckets import bucket_of
from data.shards.cache import ShardCache
from data.shards.manifest import REMEDY, Manifest, folder_of
from data.shards.remote import RemoteError, fetch_ranges, is_remote, joined
from data.shards.shard import ShardReader, described, sha256_of, without_dots
from data.shards.tar_index import BLOCK, ShardIndex, find_index, is_header, size_of

NAMED = 4  # of the extensions that a sample lacks, the usual ones
OPEN_SHARDS = 256  # memory-mapped at a time by a store: each holds two file descriptors
STORES = 4  # of a process, with OPEN_SHARDS each: data sets of a mix, and what is held out
OTHER_FILES = 512  # descriptors for everything else, such as tensors on their way from a loader
RETRY_S = 600.0  # after which a shard that could not be fetched is asked for again; a broken file stays broken


class RangeReader:
    """Random access to the samples of one remote shard, each of which is fetched alone; `reader[i]` as `ShardReader`.

    What a server sends is compared with the index, as far as headers tell.

    Args:
        first: index of its first sample in the data set.
        fetched: samples of the data set that are there already, each to be asked for once.
    """

    def __init__(self, url: str, index: ShardIndex, timeout_s: float, first: int, fetched: dict[int, bytes]) -> None:
        self.url, self.index, self.timeout_s = url, index, timeout_s
        self.first, self.fetched = first, fetched

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        begin, end = self.index.span(i)
        part = self.fetched.pop(self.first + i, None)
        if part is None:
            (part,) = fetch_ranges([(self.url, begin, end)], self.timeout_s)
        record: dict[str, Any] = {"__key__": self.index.key(i)}
        for extension, offset, size in self.index.members(i):
            if not is_header(part[offset - begin - BLOCK : offset - begin], size):
                raise RemoteError(f"{self.url}: the server sent other bytes than its index says: upload it again")
            record[extension] = memoryview(part)[offset - begin : offset - begin + size]
        return record

    def key(self, i: int) -> str:
        """Key of sample `i`, without touching its content."""
        return self.index.key(i)


class RecordStore:
    """Random access to the samples of a manifest, with a reader per shard that was used, in each process for itself.

    Args:
        required: one extension of each tuple must be there, in every sample.
    """

    of_process = ("readers", "fetched", "broken", "lock")  # made anew in each process

    def __init__(
        self, folder: str | Path, manifest: Manifest, required: Sequence[tuple[str, ...]], stream: StreamConfig
    ) -> None:
        self.folder, self.manifest, self.required = folder_of(folder), manifest, required
        self.cache = ShardCache(str(folder), stream) if is_remote(folder) else None
        self.ranges = self.cache is not None and needs_ranges(str(folder), manifest, stream)
        self.verify, self.skip = stream.verify, stream.skip_broken
        self.cache_dir, self.timeout_s = stream.cache_dir, stream.timeout_s
        self.ends = array("q", accumulate(shard.samples for shard in manifest.shards))
        self._forget()
        if not self.skip:
            self[0]  # a data set of another form is found before the training starts

    def _forget(self) -> None:
        # Neither maps nor locks can be pickled: a process that gets the store opens by itself what it reads.
        self.readers: dict[int, ShardReader | RangeReader] = {}  # the one that was opened first is closed first
        self.fetched: dict[int, bytes] = {}  # samples of remote shards that are read next
        self.broken: dict[int, tuple[UserError, float]] = {}  # shards that cannot be read, and until when they rest
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self.of_process}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, row = self.place(index)
        reader = self._open(shard)
        try:
            record = reader[row]
        except RemoteError:
            raise
        except UserError as error:
            raise UserError(f"{self.name(index)}: {error}: {REMEDY[self.manifest.kind]}") from None
        if self.skip:  # else it was checked when the shard was opened
            self._require(record.keys(), f"sample '{record['__key__']}'", shard)
        return record

    def place(self, index: int) -> tuple[int, int]:
        """Shard and row of a sample."""
        shard = bisect_right(self.ends, index)
        return shard, index - (self.ends[shard - 1] if shard else 0)

    def first(self, shard: int) -> int:
        """Index of the first sample of a shard."""
        return self.ends[shard - 1] if shard else 0

    def find(self, shard: int, key: str) -> int:
        """Index of the sample of a shard whose latents have this key."""
        reader = self._open(shard)
        row = next(i for i in range(len(reader)) if without_dots(reader.key(i)) == key)
        return self.first(shard) + row

    def key(self, index: int) -> str:
        """Key of a sample, also of one that cannot be read."""
        shard, row = self.place(index)
        return self._open(shard).key(row)

    def name(self, index: int) -> str:
        """Shard and key of a sample, for messages."""
        shard, row = self.place(index)
        try:
            return f"shard {self._name(shard)}: sample '{self.key(index)}'"
        except UserError:
            return f"shard {self._name(shard)}: sample number {row}"

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetch remote shards in the background."""
        if self.cache is not None and not self.ranges:
            self.cache.prefetch(self.manifest.shards[shard] for shard in shards)

    def load(self, indices: Sequence[int]) -> None:
        """Fetch the samples that are read next, at once, where they are fetched one by one."""
        if not self.ranges:
            return
        self.fetched.clear()  # of what was left out
        with suppress(UserError) if self.skip else nullcontext():  # then each for itself says what is wrong with it
            wanted = list[tuple[str, int, int]]()
            for shard, row in map(self.place, indices):
                reader = self._open(shard)
                assert isinstance(reader, RangeReader)
                wanted.append((reader.url, *reader.index.span(row)))
            self.fetched.update(zip(indices, fetch_ranges(wanted, self.timeout_s), strict=True))

    def _name(self, shard: int) -> str | Path:
        return joined(self.folder, self.manifest.shards[shard].name)

    def _path(self, shard: int) -> AbstractContextManager[Path]:
        if self.cache is not None:
            return self.cache.path_of(self.manifest.shards[shard])
        return nullcontext(Path(self._name(shard)))

    def _open(self, shard: int) -> ShardReader | RangeReader:
        reader = self.readers.get(shard)
        if reader is not None:  # without the lock, which decoding threads would queue at
            return reader
        with self.lock:
            return self.readers.get(shard) or self._opened(shard)

    def _opened(self, shard: int) -> ShardReader | RangeReader:
        if shard in self.broken and time.monotonic() < self.broken[shard][1]:
            raise self.broken[shard][0]
        try:
            reader = self._checked(shard)
        except UserError as error:
            self.broken[shard] = error, time.monotonic() + RETRY_S if isinstance(error, RemoteError) else math.inf
            raise
        # Maps go with the last record that is in use. Of a shard that has made room in the cache they hold the blocks.
        gone = [s for s, r in self.readers.items() if isinstance(r, ShardReader) and not r.path.exists()]
        oldest = list(self.readers)[: len(self.readers) + 1 - most_open()]
        for other in {*oldest, *(gone if self.cache is not None else ())}:
            del self.readers[other]
        self.readers[shard] = reader
        return reader

    def _checked(self, shard: int) -> ShardReader | RangeReader:
        """A new reader; every sample must have what is required."""
        info, path, remedy = self.manifest.shards[shard], self._name(shard), REMEDY[self.manifest.kind]
        reader = self._range_reader(shard) if self.ranges else self._reader(shard)
        if len(reader) != info.samples:
            raise UserError(
                f"shard {path} has {len(reader)} samples, not {info.samples} as its manifest says: {remedy}"
            )
        if not self.skip and (lacking := reader.index.lacking(self.required)) is not None:
            self._require(reader.index.extensions(lacking), f"sample '{reader.key(lacking)}'", shard)
        return reader

    def _reader(self, shard: int) -> ShardReader:
        info, remedy = self.manifest.shards[shard], REMEDY[self.manifest.kind]
        with self._path(shard) as path:
            if (size := size_of(path)) != info.bytes:
                raise UserError(f"shard {path} has {size} bytes, not {info.bytes} as its manifest says: {remedy}")
            if self.verify and info.sha256 and sha256_of(path) != info.sha256:
                raise UserError(f"shard {path} differs from the sha256 of its manifest: {remedy}")
            # None: seen with its own eyes.
            known = self.cache is not None  # which compared it when it came
            index = None if self.verify else find_index(path, info.sha256, self.cache_dir, hashed=known)
            return ShardReader(path, index=index)

    def _range_reader(self, shard: int) -> RangeReader:
        assert self.cache is not None
        index = self.cache.index_of(self.manifest.shards[shard])
        return RangeReader(str(self._name(shard)), index, self.timeout_s, self.first(shard), self.fetched)

    def _require(self, present: Collection[str], sample: str, shard: int) -> None:
        for choices in self.required:
            if not any(extension in present for extension in choices):
                lack = f"has no .{'/.'.join(choices[:NAMED])}: {described(present)}"
                raise UserError(f"shard {self._name(shard)}: {sample} {lack}: {REMEDY[self.manifest.kind]}")


def most_open() -> int:
    """Shards that a store may have open: OPEN_SHARDS, or less where the system allows this process few files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * STORES * OPEN_SHARDS + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:  # usually 1,024, of which a process may ask for more
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return (
        OPEN_SHARDS
        if soft == resource.RLIM_INFINITY
        else max(1, min(OPEN_SHARDS, (soft - OTHER_FILES) // (2 * STORES)))
    )


def read_at_a_time(manifest: Manifest, stream: StreamConfig) -> int:
    """Bytes of the shards that a machine reads at a time: of each bucket its lanes' windows, and the next ones."""
    lanes = max(1, math.ceil(stream.lanes / machines()))
    sizes: dict[str, list[int]] = {}
    for shard in manifest.shards:
        sizes.setdefault(bucket_of(shard.name), []).append(shard.bytes)
    return sum(sum(sorted(own, reverse=True)[: 2 * lanes * stream.window or None]) for own in sizes.values())


def needs_ranges(url: str, manifest: Manifest, stream: StreamConfig) -> bool:
    """Whether samples of a remote data set are fetched one by one, as the cache cannot hold what is read at a time.

    Raises:
        UserError: windows that it cannot hold, or shards without an index.
    """
    needed, limit = read_at_a_time(manifest, stream), stream.cache_gb * 1e9
    if needed <= limit:
        return False
    indexed = all(shard.index for shard in manifest.shards)
    if stream.window == 0 and indexed and not stream.verify:
        return True
    window = max(1, int(limit / read_at_a_time(manifest, replace(stream, window=1))))
    single = ", or stream.window=0 to fetch samples one by one" if indexed and not stream.verify else ""
    raise UserError(
        f"stream.cache_gb={stream.cache_gb:g}: {needed / 1e9:.3g} GB of {url} are read at a time and would be "
        f"fetched again and again: set stream.window={window} (shards){single}, or more cache_gb"
    )
