"""Where the members of a shard lie: found by walking its headers once, kept in a flat file beside it.

The file, `00000.idx` beside `00000.tar`, has safetensors' format and is memory-mapped, so that the processes of a
machine share what they read of it. It says which tar it belongs to: by the digest that a manifest gives, or, where
nobody has compared that, as of shards of others, by size and time of the file.
"""

import hashlib
import json
import mmap
import os
import re
import stat
import struct
import tarfile
import tempfile
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from safetensors.numpy import save

from conf.errors import UserError
from conf.files import atomic_write, sha256
from conf.process import lock, wait_for_lock
from data.images import EXTENSIONS
from data.labels import MAP

BLOCK = 512  # bytes: tar headers and the padding of members
END_OF_ARCHIVE = bytes(2 * BLOCK)
REGULAR_FILES = (b"0", b"\0", b"7")
WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders and pipes
NO_FILES = (b"5", b"g", b"V", b"M")  # folders, headers for all, volume labels, parts of another volume
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}
TEXTS = ("txt", "json")  # where a caption may be
TWICE = -2  # in place of the size of a member that its sample has already
SCHEMA = 1
TYPES = {"U8": "B", "U16": "H", "U32": "I", "U64": "Q"}  # safetensors' names to memoryview's
BEGINNING = b'{"__metadata__":{"index":'  # of the header of an index, behind its length
HEADER_NAME = 100  # bytes of a name that each format of tar keeps in the header itself
LARGE = 1 << 33  # bytes of a member whose size pax may keep elsewhere


def unreadable(path: Path, start: bytes = b"") -> UserError:
    """The error of a file that is not a whole tar; `start` is how it begins."""
    for magic, name in COMPRESSED.items():
        if start.startswith(magic):
            return UserError(f"shard {path} is compressed ({name}): unpack it and make a plain .tar of it")
    return UserError(f"shard {path} is not a readable tar (truncated?): rebuild it or delete it")


def scan_tar(content: memoryview, path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size in bytes) of each member; far faster than tarfile, and it finds truncation.

    The size of a link or a special file is -1. Folders are left out. Tars that were joined by `cat` are read as one.
    """
    offset, end = 0, len(content)
    long_name, long_size, ended = "", -1, False
    while True:
        header = bytes(content[offset : offset + BLOCK])
        # A block of zeros ends an archive. Reading on after it finds what `cat` has joined. A file that ends without
        # one was cut off: at its end `header` is empty, which is right only after such a block.
        if header == END_OF_ARCHIVE[: len(header)] and (ended or len(header) == BLOCK):
            if not header:
                return
            offset, ended = offset + BLOCK, True
            continue
        ended = False
        if len(header) < BLOCK or header[257:262] != b"ustar":
            raise unreadable(path, header if offset == 0 else b"")
        try:
            size = _number(header[124:136])
            checksum = _number(header[148:156])
        except tarfile.HeaderError:
            raise unreadable(path) from None
        # The checksum counts its own field as spaces. A wrong size is found by it, too: what follows is then no header.
        if sum(header) - sum(header[148:156]) + 8 * 0x20 != checksum:
            raise unreadable(path)
        kind = header[156:157]
        if long_size >= 0:  # of the pax header before this one, for what the octal field cannot hold
            size = long_size
        if kind in WITHOUT_CONTENT:  # whatever their size says
            size = 0
        start, offset = offset + BLOCK, offset + BLOCK + size + -size % BLOCK
        if size < 0 or offset > end:
            raise unreadable(path)
        if kind == b"L":
            long_name = _text(bytes(content[start : start + size]))
            continue
        if kind == b"K":  # of a link's target
            continue
        if kind == b"x":
            records = _pax(bytes(content[start : start + size]))
            long_name = records.get("path", long_name)
            long_size = int(records["size"]) if re.fullmatch("[0-9]{1,18}", records.get("size", "")) else -1
            continue
        if kind not in NO_FILES:
            yield long_name or _ustar_name(header), start, size if kind in REGULAR_FILES else -1
        long_name, long_size = "", -1


def is_header(block: bytes, size: int) -> bool:
    """Whether a block is a sound header of a member with so many bytes."""
    try:
        checksum = sum(block) - sum(block[148:156]) + 8 * 0x20
        return block[257:262] == b"ustar" and (_number(block[124:136]), _number(block[148:156])) == (size, checksum)
    except tarfile.HeaderError:
        return False


def is_of(header: bytes, key: str, extension: str, size: int) -> bool:
    """Whether a header is that of a member of a sample, as far as it tells: long and foreign names lie before it."""
    try:
        if header[257:262] != b"ustar" or (_number(header[124:136]) != size < LARGE):
            return False
    except tarfile.HeaderError:
        return False
    name = f"{key}.{extension}"
    if not name.isascii() or "\\" in name or len(name) > HEADER_NAME:  # \\: of bytes in no encoding
        return True
    return _ustar_name(header).lower() in (name.lower(), f"{key.rpartition('~')[0]}.{extension}".lower())  # or KEY~2


def _number(field: bytes) -> int:
    try:
        return int(field.rstrip(b"\0 "), 8)
    except ValueError:  # rare: base 256, for files of 8 GiB and more
        return tarfile.nti(field)  # type: ignore[attr-defined]


def _ustar_name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""  # GNU keeps other things there
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")  # names are printed, too


def _pax(content: bytes) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n" of a pax header (POSIX.1-2001)."""
    records = {}
    while content:
        digits, _, _ = content.partition(b" ")
        if not digits.isdigit() or len(digits) > 18 or int(digits) <= len(digits):
            break
        key, _, value = content[len(digits) + 1 : int(digits) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
        content = content[int(digits) :]
    return records


Column = Sequence[int] | memoryview  # of integers: arrays while an index is made, views of the file where it is read


@dataclass(slots=True)
class ShardIndex:
    """Samples of a shard, and the extensions and places of their members; nothing of it grows with use."""

    patterns: list[tuple[str, ...]]  # the extensions that samples have, each combination once
    key_ends: Column  # in bytes of `keys`, of each sample
    keys: bytes | memoryview
    offsets: Column  # bytes before each member's content; with a stride, of the first sample's alone
    sizes: Column  # bytes of each member's content
    stride: int = 0  # bytes from a sample to the next one where all lie alike; 0: they do not
    pattern: Column = ()  # number of each sample's; empty: there is one
    first: Column = ()  # number of each sample's first member; empty: all have equally many
    broken: dict[int, str] = field(default_factory=dict)  # samples that cannot be read, and why
    others: list[str] = field(default_factory=list)  # names of files that are of no sample
    problem: str = ""  # where a tar breaks off, as far as it was read

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, i: int) -> str:
        """Key of sample `i`."""
        begin = self.key_ends[i - 1] if i else 0
        return str(self.keys[begin : self.key_ends[i]], "utf-8")

    def extensions(self, i: int) -> tuple[str, ...]:
        """Extensions of sample `i`."""
        return self.patterns[self.pattern[i] if self.pattern else 0]

    def members(self, i: int) -> Iterator[tuple[str, int, int]]:
        """Extension, offset and size in bytes of each member of sample `i`; `UserError` where it cannot be read."""
        if i in self.broken:
            raise UserError(self.broken[i])
        names = self.patterns[self.pattern[i] if self.pattern else 0]
        first = self.first[i] if self.first else i * len(names)
        end = first + len(names)
        offsets = map((i * self.stride).__add__, self.offsets) if self.stride else self.offsets[first:end]
        return zip(names, offsets, self.sizes[first:end], strict=True)

    def span(self, i: int) -> tuple[int, int]:
        """Where a sample begins, with the header of its first member, and ends, in bytes."""
        places = [(offset - BLOCK, offset + size) for _, offset, size in self.members(i)]
        return min(begin for begin, _ in places), max(end for _, end in places)

    def lacking(self, required: Collection[Collection[str]]) -> int | None:
        """The first sample that lacks one of each tuple of extensions; None where all have what is required."""
        lack = {n for n, names in enumerate(self.patterns) if any(set(names).isdisjoint(some) for some in required)}
        if not lack:
            return None
        return next((i for i, number in enumerate(self.pattern) if number in lack), 0)

    def is_whole(self, tar_bytes: int) -> bool:
        """Whether the columns fit together and into a tar of so many bytes, as far as their lengths and ends tell."""
        samples, members = len(self.key_ends), len(self.sizes)
        if len(self.patterns) > 1:
            first_of_last, names = self.first[-1], self.patterns[self.pattern[-1]]
            fits = len(self.pattern) == len(self.first) == samples and first_of_last + len(names) == members
            offsets = members
        else:
            names = self.patterns[0] if self.patterns else ()
            fits = not self.pattern and not self.first and samples * len(names) == members
            offsets = len(names) if self.stride else members
        keys = self.key_ends[-1] if samples else 0
        begin = self.offsets[0] if members else BLOCK
        end = self.offsets[-1] + self.stride * (samples - 1) + self.sizes[-1] if members else BLOCK
        fits = fits and len(self.offsets) == offsets and len(self.keys) == keys
        return fits and BLOCK <= begin <= tar_bytes and end <= tar_bytes

    def begins_as(self, tar: IO[bytes]) -> bool:
        """Whether the header of the first member is where this says, with the name and the size that it says."""
        if not len(self) or 0 in self.broken:
            return True
        try:
            extension, offset, size = next(self.members(0))
            return is_of(os.pread(tar.fileno(), BLOCK, offset - BLOCK), self.key(0), extension, size)
        except (IndexError, StopIteration, ValueError):  # columns that are damaged where their ends do not show it
            return False

    def dumps(self, of: dict[str, Any]) -> bytes:
        """The content of its file; `of` says which tar it is of."""
        facts = {"schema": SCHEMA, **of, "stride": self.stride, "patterns": self.patterns, "others": self.others}
        columns = {"key_ends": self.key_ends, "offsets": self.offsets, "sizes": self.sizes}
        columns |= {"pattern": self.pattern, "first": self.first}
        arrays = {name: _narrow(column) for name, column in columns.items()}
        arrays["keys"] = np.frombuffer(self.keys, np.uint8)
        # One entry, as the library writes several in any order, and equal shards shall have equal indices.
        return save(arrays, {"index": json.dumps(facts | {"broken": list(self.broken.items())}, sort_keys=True)})

    @classmethod
    def loads(cls, content: memoryview, of: dict[str, Any]) -> Self | None:
        """An index whose columns are views of a file's content; None for that of another tar, or where it is damaged.

        No more of the columns is read than their ends.
        """
        try:
            (length,) = struct.unpack_from("<Q", content)
            header = json.loads(bytes(content[8 : 8 + length]))
            facts = json.loads(header.pop("__metadata__")["index"])
            if any(facts[name] != value for name, value in {"schema": SCHEMA, **of}.items()):
                return None
            data, columns = content[8 + length :], dict[str, Any]()
            for name, tensor in header.items():
                begin, end = tensor["data_offsets"]
                if not 0 <= begin <= end:
                    return None
                columns[name] = _view(data[begin:end], tensor["dtype"])
            index = cls(
                patterns=[tuple(names) for names in facts["patterns"]],
                stride=facts["stride"],
                broken=dict(facts["broken"]),
                others=facts["others"],
                **columns,
            )
            sound = type(index.stride) is int and index.stride >= 0 and isinstance(index.others, list)
            texts = [*index.others, *index.broken.values(), *(name for names in index.patterns for name in names)]
            sound = sound and all(isinstance(text, str) for text in texts)
            whole = len(data) == max(tensor["data_offsets"][1] for tensor in header.values())
            return index if sound and whole and index.is_whole(of["bytes"]) else None
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error, RecursionError):
            return None


def _view(content: memoryview, dtype: str) -> memoryview:
    if dtype not in TYPES:
        raise ValueError(dtype)
    view: memoryview = content.cast(TYPES[dtype])  # type: ignore[call-overload]
    return view


def _narrow(column: Column) -> np.ndarray:
    values = np.asarray(column, np.uint64)
    return values.astype(np.min_scalar_type(values.max(initial=0)))


class IndexBuilder:
    """Sorts the members of a shard into samples, as they come.

    By webdataset's rule, a key ends at the first dot of a file's name, but without its losses: a member that comes
    after those of other samples joins its own; a sample whose key was there before gets one of its own, `KEY~2`; and
    `KEY.1.jpg` and `KEY.1.txt` are the sample `KEY.1`.
    """

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.extensions: list[str] = []
        self.others: list[str] = []
        # Arrays and no objects: a shard may have tens of thousands of members.
        self.samples: array[int] = array("q")  # of each member
        self.extension_ids: array[int] = array("I")
        self.offsets: array[int] = array("q")
        self.sizes: array[int] = array("q")
        self._ids: dict[str, int] = {}
        self._latest: dict[str, int] = {}  # by key, the last sample that has it
        self._copies = Counter[str]()
        self._present: list[int] = []  # a bit for each extension that a sample has
        self._last, self._sample = "", -1

    def add(self, name: str, offset: int, size: int) -> None:
        """Take in the next member; the size of a link or a special file is -1."""
        folder, slash, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot:
            if stem:  # names that begin with a dot are hidden, such as macOS's ._KEY.jpg
                self.others.append(name)
            return
        key, extension = folder + slash + stem, extension.lower()
        extension_id = self._ids.setdefault(extension, len(self._ids))
        if extension_id == len(self.extensions):
            self.extensions.append(extension)
        if key != self._last:
            self._last, self._sample = key, self._latest.get(key, -1)
            if self._sample < 0 or self._present[self._sample] >> extension_id & 1:
                self._copies[key] += 1
                self._sample = self._latest[key] = len(self.keys)
                self.keys.append(key if self._copies[key] == 1 else f"{key}~{self._copies[key]}")
                self._present.append(0)
        elif self._present[self._sample] >> extension_id & 1:
            size = TWICE
        self._present[self._sample] |= 1 << extension_id
        self.samples.append(self._sample)
        self.extension_ids.append(extension_id)
        self.offsets.append(offset)
        self.sizes.append(size)

    def drop_last(self) -> None:
        """Leave out the sample that a broken file ends with: it may lack members."""
        if self.samples:
            kept = [member for member, sample in enumerate(self.samples) if sample != self.samples[-1]]
            self._take(kept)
            self.samples = array("q", [self.samples[member] for member in kept])

    def finish(self, problem: str = "") -> ShardIndex:
        """The index of all that was added."""
        dotted = {i for i, name in enumerate(self.extensions) if _image_stem(name)}
        unsorted = any(before > after for before, after in pairwise(self.samples))
        if unsorted or dotted.intersection(self.extension_ids) or len(set(self.samples)) < len(self.keys):
            self._arrange()
        counts = Counter(self.samples)
        ends = list(accumulate((counts[i] for i in range(len(self.keys))), initial=0))
        broken = {}
        for member in [number for number, size in enumerate(self.sizes) if size < 0]:
            twice = self.sizes[member] == TWICE
            reason = "is there twice" if twice else "is a link or a special file, which shards cannot have"
            broken[self.samples[member]] = f"its .{self.extensions[self.extension_ids[member]]} {reason}"
            self.sizes[member] = 0
        patterns: dict[tuple[str, ...], int] = {}
        pattern = []
        for begin, end in pairwise(ends):
            names = tuple(self.extensions[i] for i in self.extension_ids[begin:end])
            pattern.append(patterns.setdefault(names, len(patterns)))
        keys = [key.encode() for key in self.keys]
        index = ShardIndex(
            patterns=list(patterns),
            key_ends=list(accumulate(map(len, keys))),
            keys=b"".join(keys),
            offsets=self.offsets,
            sizes=self.sizes,
            broken=broken,
            others=self.others,
            problem=problem,
        )
        if len(patterns) > 1:
            index.pattern, index.first = pattern, ends[:-1]
        elif stride := _stride(np.asarray(self.offsets), len(keys)):
            index.offsets, index.stride = self.offsets[: ends[1]], stride
        return index

    def _arrange(self) -> None:
        """Put the members of each sample side by side, and those of keys with dots into samples of their own."""
        names = [self.extensions[i] for i in self.extension_ids]
        present: dict[int, set[str]] = {}
        for sample, name in zip(self.samples, names, strict=True):
            present.setdefault(sample, set()).add(name)
        stems = {sample: _stems(found) for sample, found in present.items()}
        parts: dict[tuple[int, str], list[int]] = {}
        for member, (sample, name) in enumerate(zip(self.samples, names, strict=True)):
            parts.setdefault((sample, _stem_of(name, stems[sample])), []).append(member)
        ordered = sorted(parts.items(), key=lambda part: part[0][0])  # else as they come first
        ids = {name: number for number, name in enumerate(self.extensions)}
        for (_, stem), found in ordered:
            for member in found if stem else ():
                self.extension_ids[member] = ids.setdefault(names[member][len(stem) + 1 :], len(ids))
        self.extensions = list(ids)
        self.keys = [f"{self.keys[sample]}.{stem}" if stem else self.keys[sample] for (sample, stem), _ in ordered]
        self._take([member for _, found in ordered for member in found])
        self.samples = array("q", [number for number, (_, found) in enumerate(ordered) for _ in found])

    def _take(self, members: list[int]) -> None:
        """Keep these members, in this order."""
        for column in (self.offsets, self.sizes, self.extension_ids):
            column[:] = array(column.typecode, [column[member] for member in members])


def _stride(offsets: np.ndarray, samples: int) -> int:
    """Bytes from each sample to the next one, where all members are equally far from those of the first; else 0."""
    if samples < 2:
        return 0
    steps = np.diff(offsets.reshape(samples, -1), axis=0)
    return int(steps[0, 0]) if (steps == steps[0, 0]).all() else 0


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


def index_of(content: memoryview, path: Path, tolerant: bool = False) -> ShardIndex:
    """Index of the content of a tar; one that is not whole is a `UserError`, or with `tolerant` read up to there."""
    builder, problem = IndexBuilder(), ""
    try:
        for member in scan_tar(content, path):
            builder.add(*member)
    except UserError as error:
        if not tolerant:
            raise
        problem = str(error)
        builder.drop_last()
    return builder.finish(problem)


def index_name(tar_name: str) -> str:
    """Name of the file of a shard's index."""
    return f"{tar_name[:-4]}.idx"


def find_index(path: Path, digest: str, cache_dir: str | None, hashed: bool = False) -> ShardIndex:
    """The index of a tar: read beside it or from a cache, else made, by one of the processes that ask at a time.

    It is kept beside the tar, or where that folder cannot be written, below `cache_dir` (None: $TMPDIR). One that is
    damaged is made anew, as far as its lengths and ends tell.

    Args:
        digest: of the tar, sha256 in hex; empty where nobody knows it.
        hashed: whether the tar is known to have its digest.

    Raises:
        UserError: the tar is missing, cannot be read, or is another one than the digest is of.
    """
    file = _IndexFile(path, digest, cache_dir, hashed)
    with _opened(path) as tar:
        index = file.load()
        if index is not None and index.begins_as(tar):
            return index
        if not lock(tar.fileno()):
            wait_for_lock(tar.fileno())
        index = file.load()
        if index is not None and index.begins_as(tar):
            return index
        if index is not None and digest and not hashed:  # either the index is wrong or the tar, and that tells which
            if sha256(path) != digest:
                raise UserError(f"shard {path} differs from the sha256 of its manifest: rebuild it or copy it anew")
            file.hashed = True
        return file.make()


def scan_indices(paths: Iterable[Path], cache_dir: str | None) -> Iterator[tuple[Path, ShardIndex | UserError]]:
    """Yield the index of each tar of others, or why there is none, having made those that were not there.

    Processes that start together share the work out: what another one is making at the moment comes last.
    """
    busy = []
    for path in paths:
        try:
            index = _index_unless_busy(path, cache_dir)
        except UserError as error:
            yield path, error
            continue
        if index is None:
            busy.append(path)
        else:
            yield path, index
    for path in busy:
        try:
            index = find_index(path, "", cache_dir)
        except UserError as error:
            yield path, error
        else:
            yield path, index


def _index_unless_busy(path: Path, cache_dir: str | None) -> ShardIndex | None:
    file = _IndexFile(path, "", cache_dir)
    if (index := file.load()) is not None:
        return index
    with _opened(path) as tar:
        if not lock(tar.fileno()):
            return None
        index = file.load()  # another process may have made it meanwhile
        return file.make() if index is None else index


@dataclass(slots=True)
class _IndexFile:
    """The file of the index of one tar, beside it or on the local disk; arguments as those of `find_index`."""

    path: Path
    digest: str
    cache_dir: str | None
    hashed: bool = False

    def places(self) -> Iterator[Path]:
        """Where it may lie."""
        name = index_name(self.path.name)
        yield self.path.with_name(name)
        with suppress(UserError):
            top = cache_top(self.cache_dir)
            yield top / "indices" / hashlib.sha256(os.fsencode(self.path.parent.resolve())).hexdigest()[:16] / name

    def load(self) -> ShardIndex | None:
        """The index that one of the places holds; None where it is to be made. A missing tar is a `UserError`."""
        named, dated = identity(self.path, self.digest), identity(self.path, "")
        for place in self.places():
            try:
                content = map_file(place)
            except UserError:
                continue
            for of in (named, dated):
                if (index := ShardIndex.loads(content, of)) is not None:
                    return index
        return None

    def make(self) -> ShardIndex:
        """Walk the headers of the tar and keep what they say."""
        # The digest of a tar that nobody has hashed would be a guess, and an index of a wrong tar would outlive it.
        of = identity(self.path, self.digest if self.hashed else "")
        index = index_of(map_file(self.path), self.path)
        content = index.dumps(of)
        for place in self.places():
            if _may_replace(place):
                try:
                    atomic_write(place, content)
                except OSError:  # no permission, no room: then the next place, or each process for itself
                    continue
                break
        return index


def _may_replace(place: Path) -> bool:
    """Whether there is nothing, or an index of ours: other programs give theirs the same name (DALI's wds2idx)."""
    try:
        with open(place, "rb") as file:
            beginning = file.read(8 + len(BEGINNING))
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return not beginning or beginning[8:] == BEGINNING


def identity(path: Path, digest: str) -> dict[str, Any]:
    """What an index says of the tar that it is of; a missing tar is a `UserError`."""
    return {"bytes": size_of(path), **({"sha256": digest} if digest else {"mtime_ns": path.stat().st_mtime_ns})}


def size_of(path: Path) -> int:
    """Bytes of a tar; a missing one is a `UserError`."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise missing(path) from None


def cache_top(cache_dir: str | None) -> Path:
    """Folder of all that is kept on the local disk: `stream.cache_dir`, or below $TMPDIR one that is the user's alone.

    Raises:
        UserError: somebody else has made the latter.
    """
    if cache_dir:
        return Path(cache_dir)
    top = Path(tempfile.gettempdir()) / f"latentline-{os.getuid()}"
    with suppress(OSError):  # it is there; or it cannot be made, which whoever writes there finds out
        top.mkdir(mode=0o700)
    with suppress(OSError):
        status = top.lstat()  # of a link itself: another user could have made it
        if status.st_uid != os.getuid():
            raise UserError(f"{top} belongs to another user: set stream.cache_dir to a folder of your own")
        if stat.S_ISDIR(status.st_mode) and status.st_mode & 0o077:
            top.chmod(0o700)
    return top


def missing(path: Path) -> UserError:
    """The error of a shard that is not there."""
    listed = (path.parent / "manifest.json").exists()
    remedy = "rebuild it, or delete manifest.json beside it" if listed else "check its path, or copy it there"
    return UserError(f"shard {path} is missing: {remedy}")


def map_file(path: Path) -> memoryview:
    """The content of a file as a memory map; `UserError` where it cannot be read."""
    with _opened(path) as file:
        try:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except ValueError:  # an empty file cannot be mapped
            raise unreadable(path) from None


def _opened(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:  # a folder of that name, no permission
        raise UserError(f"shard {path} cannot be read: {error.strerror}") from None
