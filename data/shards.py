"""WebDataset shards: uncompressed tars, written atomically and read through a memory map.

A sample is a run of members `KEY.EXTENSION` with the same key. What `ShardWriter` writes, plain webdataset and tarfile
read; `ShardReader` reads theirs too (ustar, GNU long names, pax headers).
"""

import hashlib
import mmap
import os
import tarfile
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from conf.errors import UserError
from data.tar_index import BLOCK, END_OF_ARCHIVE, scan_tar, unreadable

Buffer = bytes | bytearray | memoryview


@dataclass(kw_only=True, slots=True)
class ShardInfo:
    """One line of the manifest."""

    name: str  # file name inside the manifest's folder
    samples: int
    bytes: int
    sha256: str = ""  # of the file, in hex; empty for a shard that was only scanned


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that becomes `path` on success and is removed on failure.

    The file is flushed to disk before it is renamed, so that no reader sees a part of it. `OSError` (disk full, no
    permission) passes through.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No process id: those of two machines may be the same.
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        _publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: str | Path, content: Buffer) -> None:
    """Write a whole file, or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _publish(temporary: Path, path: Path) -> None:
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)  # no time, no owner: equal samples make equal shards


class ShardWriter:
    """Writes samples into `00000.tar`, `00001.tar` … of a folder; a shard appears under its name only when complete.

    Several processes may share a folder when each has its own range of shard numbers (`first_shard`), and several
    writers when each has its own `suffix` (`00000SUFFIX.tar`). As a context manager it closes on success and drops the
    unfinished shard on an exception.
    """

    def __init__(self, folder: str | Path, shard_samples: int, first_shard: int = 0, suffix: str = "") -> None:
        self.folder = Path(folder)
        self.shard_samples = shard_samples
        self.suffix = suffix
        self.finished: list[ShardInfo] = []
        self._number = first_shard
        self._file: IO[bytes] | None = None
        self._temporary = Path()
        self._samples = 0
        self._digest = hashlib.sha256()
        self._last_key = ""
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def shard_name(self) -> str:
        """Name of the shard that the next sample goes into."""
        return f"{self._number:05d}{self.suffix}.tar"

    def add(self, key: str, files: Mapping[str, Buffer]) -> None:
        """Append one sample; `files` maps extension (may contain dots: `moments.npy`) to content."""
        if not key or "." in key.rpartition("/")[2] or key == self._last_key or not files:
            raise ValueError(f"key {key!r}: must be unique, not empty, without a dot, and have files")
        if self._file is None:
            self._open()
        try:
            for extension, content in files.items():
                size = memoryview(content).nbytes
                self._write(_header(f"{key}.{extension}", size))
                self._write(content)
                self._write(bytes(-size % BLOCK))
        except BaseException:
            self.abort()
            raise
        self._last_key = key
        self._samples += 1
        if self._samples == self.shard_samples:
            self._finish_shard()

    def close(self) -> list[ShardInfo]:
        """Finish the last shard and return all shards that this writer wrote."""
        if self._file is not None:
            self._finish_shard()
        return self.finished

    def abort(self) -> None:
        """Drop the unfinished shard; the finished ones stay."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            finally:
                self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _open(self) -> None:
        for leftover in self.folder.glob(f".{self.shard_name}.*.tmp"):  # of a killed writer of this very shard
            leftover.unlink(missing_ok=True)
        self._temporary = self.folder / f".{self.shard_name}.{os.getpid()}.tmp"
        self._file = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by _finish_shard or abort)
        self._samples = 0
        self._digest = hashlib.sha256()

    def _write(self, content: Buffer) -> None:
        assert self._file is not None
        self._file.write(content)
        self._digest.update(content)

    def _finish_shard(self) -> None:
        assert self._file is not None
        try:
            self._write(END_OF_ARCHIVE)
            size = self._file.tell()
            self._file.close()
            _publish(self._temporary, self.folder / self.shard_name)
        except BaseException:
            self.abort()
            raise
        self._file = None
        info = ShardInfo(name=self.shard_name, samples=self._samples, bytes=size, sha256=self._digest.hexdigest())
        self.finished.append(info)
        self._number += 1


class ShardReader:
    """Random access to the samples of one shard; nothing is copied until a member is used.

    `reader[i]` is `{"__key__": key, extension: memoryview, …}`. The index and the memory map are made on first use and
    are not pickled, so that a reader can travel to any worker process.

    Args:
        tolerant: of a file that breaks off, read the samples before that, and say what is wrong in `problem`.
    """

    def __init__(self, path: str | Path, tolerant: bool = False) -> None:
        self.path, self.tolerant = Path(path), tolerant
        self.problem = ""
        self._map: memoryview | None = None
        self._indexed = False
        self._clear()

    def _clear(self) -> None:
        self._keys: list[str] = []
        self._first: array[int] = array("q")  # first member of each sample, and one past the last
        self._offsets: array[int] = array("q")  # of each member, in bytes
        self._sizes: array[int] = array("q")
        self._extension_ids: array[int] = array("H")
        self._extensions: list[str] = []

    def __len__(self) -> int:
        self.open()
        return len(self._keys)

    def __getitem__(self, i: int) -> dict[str, Any]:
        content = self._map if self._map is not None else self.open()
        record: dict[str, Any] = {"__key__": self._keys[i]}
        for member in range(self._first[i], self._first[i + 1]):
            offset = self._offsets[member]
            record[self._extensions[self._extension_ids[member]]] = content[offset : offset + self._sizes[member]]
        return record

    def __reduce__(self) -> tuple[type[Self], tuple[Path, bool]]:
        return type(self), (self.path, self.tolerant)

    @property
    def is_open(self) -> bool:
        """Whether the file is mapped in this process."""
        return self._map is not None

    def key(self, i: int) -> str:
        """Key of sample `i`, without touching its content."""
        self.open()
        return self._keys[i]

    def extensions(self, i: int) -> set[str]:
        """Extensions of sample `i`, without touching its content."""
        self.open()
        return {self._extensions[e] for e in self._extension_ids[self._first[i] : self._first[i + 1]]}

    def open(self) -> memoryview:
        """Map the file and index it (once); a file that is not a whole tar is a `UserError`."""
        if self._map is None:
            content = _map(self.path)
            if not self._indexed:
                self._clear()
                try:
                    self._index(content)
                except UserError as error:
                    if not self.tolerant:
                        raise
                    self._drop_last(str(error))
                self._indexed = True
            self._map = content
        return self._map

    def release(self) -> None:
        """Give the file descriptor back; the index stays and the next access maps the file again."""
        self._map = None

    def _drop_last(self, problem: str) -> None:
        """The sample that a broken file ends with may lack members."""
        self.problem = problem
        if self._keys:
            del self._keys[-1]

    def _index(self, content: memoryview) -> None:
        ids: dict[str, int] = {}
        present: set[int] = set()
        for name, offset, size in scan_tar(content, self.path):
            folder, slash, base = name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if not stem or not dot:
                continue  # as webdataset does: not part of a sample
            key = folder + slash + stem
            if not self._keys or key != self._keys[-1]:
                self._keys.append(key)
                self._first.append(len(self._offsets))
                present.clear()
            extension_id = ids.setdefault(extension.lower(), len(ids))
            if extension_id == len(self._extensions):
                self._extensions.append(extension.lower())
            if extension_id in present:
                raise UserError(f"shard {self.path} holds '{name}' twice: rebuild it or delete it")
            present.add(extension_id)
            self._extension_ids.append(extension_id)
            self._offsets.append(offset)
            self._sizes.append(size)
        self._first.append(len(self._offsets))


def sha256_of(path: Path) -> str:
    """Digest of a file, in hex; a file that is not there is a `UserError`."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise missing(path) from None


def missing(path: Path) -> UserError:
    """The error of a shard that is not there."""
    return UserError(f"shard {path} is missing: rebuild it, or delete manifest.json beside it")


def _map(path: Path) -> memoryview:
    try:
        with open(path, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        raise missing(path) from None
    except ValueError:  # an empty file cannot be mapped
        raise unreadable(path) from None
