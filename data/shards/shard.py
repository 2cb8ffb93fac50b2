"""WebDataset shards: uncompressed tars, written atomically, each with its index, and read through a memory map.

A sample is a run of members `KEY.EXTENSION` with the same key. What `ShardWriter` writes, plain webdataset and tarfile
read; `ShardReader` reads theirs too (ustar, GNU long names, pax headers).
"""

import hashlib
import mmap
import os
import tarfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

from conf.errors import UserError
from conf.files import atomic_write, publish, sha256
from data.images import EXTENSIONS
from data.shards.tar_index import (
    BLOCK,
    END_OF_ARCHIVE,
    TEXTS,
    IndexBuilder,
    ShardIndex,
    index_name,
    index_of,
    is_of,
    map_file,
    missing,
)

Buffer = bytes | bytearray | memoryview
APART = 1 << 16  # bytes between members of a sample that are read along


@dataclass(kw_only=True, slots=True)
class ShardInfo:
    """A shard as the manifest lists it."""

    name: str  # file name inside the manifest's folder
    samples: int
    bytes: int
    sha256: str = ""  # of the file, in hex; empty for a shard that was only scanned
    index: str = ""  # the same of the file of its index; empty where that is not known to be there

    def is_sound(self) -> bool:
        """Whether the fields are a name, two counts and two digests, as far as types can tell."""
        counts = type(self.samples) is type(self.bytes) is int and min(self.samples, self.bytes) >= 0
        return counts and all(isinstance(text, str) for text in (self.name, self.sha256, self.index))


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644  # no time, no owner: equal samples make equal shards
    try:
        return info.tobuf(tarfile.USTAR_FORMAT)
    except ValueError:  # a name of more than 100 bytes that no slash parts, or 8 GiB
        return info.tobuf(tarfile.GNU_FORMAT)


def without_dots(key: str) -> str:
    """A key as `ShardWriter` takes it: the first dot of a name would end it."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.replace(".", "%2E")


def described(extensions: Collection[str]) -> str:
    """Extensions of a sample, for messages, and the rule of keys where a dot may be why one is missing."""
    names = sorted(extension for extension in extensions if extension != "__key__")
    found = f"it has .{', .'.join(names[:8])}{' …' * (len(names) > 8)}"
    dotted = any("." in name and name.rpartition(".")[2] in (*EXTENSIONS, *TEXTS) for name in names)
    return found + ("; what follows the first dot of a file's name is its extension" if dotted else "")


class ShardWriter:
    """Writes samples into `00000.tar`, `00001.tar` … of a folder; a shard appears under its name only when complete.

    Its index `00000.idx` is there before it.

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
        self._written = 0  # bytes
        self._digest = hashlib.sha256()
        self._index = IndexBuilder()
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
                self._index.add(f"{key}.{extension}", self._written, size)
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
        for name in (self.shard_name, index_name(self.shard_name)):
            for leftover in self.folder.glob(f".{name}.*.tmp"):  # of a killed writer of this very shard
                leftover.unlink(missing_ok=True)
        self._temporary = self.folder / f".{self.shard_name}.{os.getpid()}.tmp"
        self._file = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by _finish_shard or abort)
        self._samples = self._written = 0
        self._digest = hashlib.sha256()
        self._index = IndexBuilder()

    def _write(self, content: Buffer) -> None:
        assert self._file is not None
        self._written += self._file.write(content)
        self._digest.update(content)

    def _finish_shard(self) -> None:
        assert self._file is not None
        try:
            self._write(END_OF_ARCHIVE)
            self._file.close()
            digest = self._digest.hexdigest()
            index = self._index.finish().dumps({"bytes": self._written, "sha256": digest})
            atomic_write(self.folder / index_name(self.shard_name), index)
            publish(self._temporary, self.folder / self.shard_name)
        except BaseException:
            self.abort()
            raise
        self._file = None
        self.finished.append(
            ShardInfo(
                name=self.shard_name,
                samples=self._samples,
                bytes=self._written,
                sha256=digest,
                index=hashlib.sha256(index).hexdigest(),
            )
        )
        self._number += 1


class ShardReader:
    """Random access to the samples of one shard; nothing is copied until a member is used.

    `reader[i]` is `{"__key__": key, extension: memoryview, …}`. A sample with a member twice, or with a link for a
    member, is a `UserError` when it is read.

    Args:
        tolerant: of a file that breaks off, read the samples before that, and say what is wrong in `index.problem`.
        index: where its members lie; None: to be found by walking its headers.

    Raises:
        UserError: no such file, or not a whole tar.
    """

    def __init__(self, path: str | Path, tolerant: bool = False, index: ShardIndex | None = None) -> None:
        self.path, self.content = Path(path), map_file(Path(path))
        self.index = index_of(self.content, self.path, tolerant) if index is None else index
        self._map = cast(mmap.mmap, self.content.obj)
        self._map.madvise(mmap.MADV_RANDOM)  # or the kernel reads megabytes around each sample
        self._asked = bytearray(len(self.index))  # samples whose pages were asked for

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        content = self.content
        if i >= len(self):
            raise IndexError(i)  # which ends a loop over all
        try:
            if not self._asked[i]:
                self._ask(i)
            record: dict[str, Any] = {"__key__": self.index.key(i)}
            for extension, offset, size in self.index.members(i):
                record[extension] = content[offset : offset + size]
            return record
        except (ValueError, IndexError):
            raise damaged(self.path) from None

    def key(self, i: int) -> str:
        """Key of sample `i`, without touching its content."""
        return self.index.key(i)

    def _ask(self, i: int) -> None:
        """Have the pages of a sample read in one request, not one by one; of members that lie apart in several."""
        key, members = self.index.key(i), list(self.index.members(i))
        for extension, offset, size in members:
            if not is_of(bytes(self.content[offset - BLOCK : offset]), key, extension, size):
                raise damaged(self.path)
        self._asked[i] = 1
        begin, end = self.index.span(i)
        together = end - begin <= 2 * sum(size for _, _, size in members) + APART
        for first, last in [(begin, end)] if together else [(at, at + size) for _, at, size in members if size]:
            first -= first % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, first, last - first)


def damaged(path: Path) -> UserError:
    """The error of an index that says otherwise than the headers of its tar."""
    index = path.with_name(index_name(path.name))
    return UserError(
        f"the index of shard {path} is damaged, or the shard is another one: delete {index} if it is there"
    )


def tars_in(folder: Path, compressed: bool = False) -> list[Path]:
    """The shards of a folder in the order of their names, or those that cannot be read as they are compressed."""
    suffixes = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst") if compressed else (".tar",)
    return sorted(path for path in folder.glob("[!.]*") if path.name.lower().endswith(suffixes))


def sha256_of(path: Path) -> str:
    """Digest of a file, in hex; a file that is not there is a `UserError`."""
    try:
        return sha256(path)
    except FileNotFoundError:
        raise missing(path) from None
