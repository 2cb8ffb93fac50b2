"""WebDataset shards: uncompressed tars, written atomically and read through a memory map.

A sample is a run of members `KEY.EXTENSION` with the same key. What `ShardWriter` writes, plain webdataset and tarfile
read; `ShardReader` reads theirs too (ustar, GNU long names, pax headers).
"""

import hashlib
import mmap
import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from conf.errors import UserError
from conf.files import publish, sha256
from data.images import EXTENSIONS
from data.labels import MAP
from data.shards.tar_index import BLOCK, END_OF_ARCHIVE, scan_tar, unreadable

Buffer = bytes | bytearray | memoryview
TEXTS = ("txt", "json")  # where a caption may be
TWICE = -2  # in place of the size of a member that its sample has already


@dataclass(kw_only=True, slots=True)
class ShardInfo:
    """A shard as the manifest lists it."""

    name: str  # file name inside the manifest's folder
    samples: int
    bytes: int
    sha256: str = ""  # of the file, in hex; empty for a shard that was only scanned

    def is_sound(self) -> bool:
        """Whether the fields are a name, two counts and a digest, as far as types can tell."""
        counts = type(self.samples) is type(self.bytes) is int and min(self.samples, self.bytes) >= 0
        return counts and isinstance(self.name, str) and isinstance(self.sha256, str)


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
            publish(self._temporary, self.folder / self.shard_name)
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
    are not pickled, so that a reader can travel to any worker process. A sample with a member twice, or with a link
    for a member, is a `UserError` when it is read.

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
        self.others: list[str] = []  # names of files that are of no sample
        self._keys: list[str] = []
        self._first: array[int] = array("q")  # first member of each sample, and one past the last
        # Arrays and no objects: a shard may have tens of thousands of members, and hundreds of shards are open.
        self._offsets: array[int] = array("q")  # of each member, in bytes
        self._sizes: array[int] = array("q")
        self._extension_ids: array[int] = array("I")
        self._extensions: list[str] = []
        self._broken: dict[int, str] = {}  # samples that cannot be read, and why

    def __len__(self) -> int:
        self.open()
        return len(self._keys)

    def __getitem__(self, i: int) -> dict[str, Any]:
        content = self._map if self._map is not None else self.open()
        if i in self._broken:
            raise UserError(self._broken[i])
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
                self._index(content)
                self._indexed = True
            self._map = content
        return self._map

    def release(self) -> None:
        """Give the file descriptor back; the index stays and the next access maps the file again."""
        self._map = None

    def _index(self, content: memoryview) -> None:
        """Find the samples by webdataset's rule, a key ends at the first dot of a file's name, but without its losses.

        A member that comes after those of other samples joins its own; a sample whose key was there before gets one
        of its own, `KEY~2`; and `KEY.1.jpg` and `KEY.1.txt` are the sample `KEY.1`.
        """
        members: array[int] = array("q")  # the sample of each
        try:
            self._scan(content, members)
        except UserError as error:
            if not self.tolerant:
                raise
            self.problem = str(error)
            self._drop_last(members)
        dotted = {i for i, name in enumerate(self._extensions) if _image_stem(name)}
        unsorted = any(before > after for before, after in pairwise(members))
        if unsorted or dotted.intersection(self._extension_ids) or len(set(members)) < len(self._keys):
            members = self._arrange(members)
        counts = Counter(members)
        self._first = array("q", accumulate((counts[i] for i in range(len(self._keys))), initial=0))
        for member in [number for number, size in enumerate(self._sizes) if size < 0]:
            twice = self._sizes[member] == TWICE
            problem = "is there twice" if twice else "is a link or a special file, which shards cannot have"
            self._broken[members[member]] = f"its .{self._extensions[self._extension_ids[member]]} {problem}"

    def _scan(self, content: memoryview, members: "array[int]") -> None:
        """Take in all members in their order, and the number of the sample that each belongs to."""
        ids: dict[str, int] = {}
        samples: dict[str, int] = {}  # by key, the last one that has it
        copies = Counter[str]()
        present: list[int] = []  # a bit for each extension that a sample has
        last, sample = "", -1
        for name, offset, size in scan_tar(content, self.path):
            folder, slash, base = name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if not stem or not dot:
                if stem:  # names that begin with a dot are hidden, such as macOS's ._KEY.jpg
                    self.others.append(name)
                continue
            key, extension = folder + slash + stem, extension.lower()
            extension_id = ids.setdefault(extension, len(ids))
            if extension_id == len(self._extensions):
                self._extensions.append(extension)
            if key != last:
                last, sample = key, samples.get(key, -1)
                if sample < 0 or present[sample] >> extension_id & 1:
                    copies[key] += 1
                    sample = samples[key] = len(self._keys)
                    self._keys.append(key if copies[key] == 1 else f"{key}~{copies[key]}")
                    present.append(0)
            elif present[sample] >> extension_id & 1:
                size = TWICE
            present[sample] |= 1 << extension_id
            members.append(sample)
            self._extension_ids.append(extension_id)
            self._offsets.append(offset)
            self._sizes.append(size)

    def _drop_last(self, members: "array[int]") -> None:
        """Leave out the sample that a broken file ends with: it may lack members."""
        kept = [member for member, sample in enumerate(members) if sample != members[-1]]
        self._take(kept)
        members[:] = array("q", [members[member] for member in kept])

    def _arrange(self, members: "array[int]") -> "array[int]":
        """Put the members of each sample side by side, and those of keys with dots into samples of their own."""
        names = [self._extensions[i] for i in self._extension_ids]
        present: dict[int, set[str]] = {}
        for sample, name in zip(members, names, strict=True):
            present.setdefault(sample, set()).add(name)
        stems = {sample: _stems(found) for sample, found in present.items()}
        parts: dict[tuple[int, str], list[int]] = {}
        for member, (sample, name) in enumerate(zip(members, names, strict=True)):
            parts.setdefault((sample, _stem_of(name, stems[sample])), []).append(member)
        ordered = sorted(parts.items(), key=lambda part: part[0][0])  # else as they come first
        ids = {name: number for number, name in enumerate(self._extensions)}
        for (_, stem), found in ordered:
            for member in found if stem else ():
                self._extension_ids[member] = ids.setdefault(names[member][len(stem) + 1 :], len(ids))
        self._extensions = list(ids)
        self._keys = [f"{self._keys[sample]}.{stem}" if stem else self._keys[sample] for (sample, stem), _ in ordered]
        self._take([member for _, found in ordered for member in found])
        return array("q", [number for number, (_, found) in enumerate(ordered) for _ in found])

    def _take(self, members: list[int]) -> None:
        """Keep these members, in this order."""
        for column in (self._offsets, self._sizes, self._extension_ids):
            column[:] = array(column.typecode, [column[member] for member in members])


def _image_stem(extension: str) -> str:
    """The part of an image's extension that may belong to its key: "05" of 05.png; "" of png and of our maps."""
    stem, _, suffix = extension.rpartition(".")
    return stem if suffix in EXTENSIONS and extension != MAP else ""


def _stems(extensions: set[str]) -> set[str]:
    """Stems of samples of their own: they have an image and a text."""
    # beside an image, depth.png and depth.json may be maps of that image and no sample
    texts = ("txt",) if extensions.intersection(EXTENSIONS) else TEXTS
    found = {_image_stem(extension) for extension in extensions} - {""}
    return {stem for stem in found if any(f"{stem}.{text}" in extensions for text in texts)}


def _stem_of(extension: str, stems: set[str]) -> str:
    """The longest of these stems that an extension begins with, or ""."""
    while extension := extension.rpartition(".")[0]:
        if extension in stems:
            return extension
    return ""


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


def missing(path: Path) -> UserError:
    """The error of a shard that is not there."""
    listed = (path.parent / "manifest.json").exists()
    remedy = "rebuild it, or delete manifest.json beside it" if listed else "check its path, or copy it there"
    return UserError(f"shard {path} is missing: {remedy}")


def _map(path: Path) -> memoryview:
    try:
        with open(path, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:  # a folder of that name, no permission
        raise UserError(f"shard {path} cannot be read: {error.strerror}") from None
    except ValueError:  # an empty file cannot be mapped
        raise unreadable(path) from None
