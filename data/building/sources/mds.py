"""MDS, the format of mosaicml-streaming: a folder of shards, and the index.json that lists them with their columns.

A shard is the number n of its samples, n + 1 offsets, the description of its columns once more, and the samples. A
sample is the sizes of those of its columns that have none of their own in the index, and then the bytes of all columns.
Numbers, offsets and sizes are uint32, the lower bytes first. Pickles are never loaded.
"""

import struct
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from conf.errors import UserError
from conf.plain_json import loads
from conf.schema import BuildRun
from data.building.sources import Ref, Rejected, Sample
from data.building.sources.files import Listing, image_limit
from data.building.sources.tables import Columns, check_columns, sample_in
from data.labels import Vocabulary
from data.shards.remote import is_remote
from data.shards.tar_index import map_file

INDEX = "index.json"
OPEN = 8  # shards that a process holds open
IMAGES = ("jpeg", "png", "pil", "bytes")  # encodings
TEXTS = ("str", "json", "bytes")
NUMBERS = (
    "int",
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    "float16",
    "float32",
    "float64",
)
DECODERS: dict[str, Callable[[bytes], Any]] = {
    "str": bytes.decode,
    "json": loads,
    "str_int": int,
    "str_float": float,
    "str_decimal": float,
}
MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "I;16": 2}  # of pil, with the bytes of a pixel


class Column(NamedTuple):
    """A column of a shard."""

    name: str
    encoding: str
    size: int | None  # bytes; None: each sample says how many


class MdsShard(NamedTuple):
    """A shard as the index lists it."""

    name: str  # path relative to the data set's folder
    samples: int
    columns: tuple[Column, ...]


class MdsSource:
    """`cfg.path`: the folder of a data set. A sample's key is its number there; a place is a shard and a row of it."""

    def __init__(self, cfg: BuildRun) -> None:
        self.columns, self.samples = Columns(cfg.image_column, cfg.caption_column), cfg.samples
        self.folder, self.limit = Path(cfg.path or "").expanduser(), image_limit(cfg.max_pixels)
        if is_remote(cfg.path or ""):
            raise UserError(f"path={cfg.path}: source=mds reads from a disk: copy the folder there first")
        self.shards = _listed(self.folder)
        for columns in dict.fromkeys(shard.columns for shard in self.shards):
            _check_encodings(self.folder / INDEX, columns, self.columns)
        if not sum(shard.samples for shard in self.shards):
            raise UserError(f"path={cfg.path}: no samples in it")
        files = Listing()
        for name in (INDEX, *(shard.name for shard in self.shards)):
            files.add([name], [self.folder / name])
        self.listing, self.written = files.digests()
        self._readers: dict[int, MdsReader] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}

    def expected(self) -> int:
        """Samples of all shards, or as many as are asked for."""
        return min(sum(shard.samples for shard in self.shards), self.samples or sys.maxsize)

    def refs(self, scratch: Path) -> Iterator[Ref]:
        """Shard by shard; where one breaks off, or is missing, its other samples are one ref."""
        *starts, _ = accumulate((shard.samples for shard in self.shards), initial=0)
        for number, (shard, start) in enumerate(zip(self.shards, starts, strict=True)):
            try:
                reader = MdsReader(self.folder, shard)
                rows, problem = len(reader), reader.problem
            except UserError as error:
                rows, problem = 0, str(error)
            for row in range(rows + bool(problem)):
                if self.samples and start + row >= self.samples:
                    return
                key, lost = f"{start + row:09d}", problem if row == rows else None
                yield Ref(key, f"{shard.name} sample {row + 1}", (number, row), lost)

    def sample(self, place: tuple[int, int]) -> Sample:
        """Contents and caption of a sample; raises UserError."""
        number, row = place
        if number not in self._readers:
            if len(self._readers) == OPEN:
                self._readers.pop(next(iter(self._readers)))
            self._readers[number] = MdsReader(self.folder, self.shards[number])
        values = {}
        for column, content in self._readers[number][row]:
            decode = _decoder(column, self.columns)
            if column.name == self.columns.image and len(content) > self.limit:
                raise Rejected(f"more than {self.limit} bytes")
            try:
                values[column.name] = decode(bytes(content)) if decode else None
            except (ValueError, OverflowError) as error:
                raise Rejected(f"the column {column.name} is no sound {column.encoding} ({error})") from error
        return sample_in(values, self.columns, self.limit)

    def vocabulary(self) -> Vocabulary:
        """Vocabulary of the samples' labels."""
        return Vocabulary()

    def identity(self) -> dict[str, Any]:
        """The options that the samples depend on, and the files: their names and sizes."""
        return {"path": self.listing, "samples": self.samples, "columns": list(self.columns)}

    def times(self) -> str:
        """When its files were written."""
        return self.written

    def describe(self) -> dict[str, Any]:
        """Provenance."""
        return {"name": str(self.folder.resolve()), "shards": len(self.shards)}


class MdsReader:
    """The samples of a shard, through a memory map; raises UserError for a shard that is none.

    `len(reader)` is how many of them are whole; where that is not all, `problem` says so.
    """

    def __init__(self, folder: Path, shard: MdsShard) -> None:
        self.content, self.columns = map_file(folder / shard.name), shard.columns
        there = self.content[: 4 * min(shard.samples + 2, len(self.content) // 4)]
        words = np.frombuffer(there, "<u4").astype(np.int64) if there else np.zeros(1)
        if words[0] != shard.samples:
            raise UserError(
                f"shard {shard.name} has not the {shard.samples} samples that {INDEX} says: copy both again"
            )
        self.offsets = words[1:]
        whole = (self.offsets[:-1] <= self.offsets[1:]) & (self.offsets[1:] <= len(self.content))
        self._rows = int(np.argmin(np.append(whole, False)))
        used = f"; its first {self._rows} samples are used" if self._rows else ""
        self.problem = f"truncated{used}" if self._rows < shard.samples else None

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> Iterator[tuple[Column, memoryview]]:
        """Every column of a sample with its bytes; raises Rejected."""
        sample = self.content[self.offsets[row] : self.offsets[row + 1]]
        varying = sum(column.size is None for column in self.columns)
        said = iter(struct.unpack_from(f"<{min(varying, len(sample) // 4)}I", sample))
        sizes = [next(said, 0) if column.size is None else column.size for column in self.columns]
        if 4 * varying + sum(sizes) != len(sample):
            raise Rejected("its columns have other sizes than the sample")
        bounds = pairwise(accumulate(sizes, initial=4 * varying))
        return ((column, sample[begin:end]) for column, (begin, end) in zip(self.columns, bounds, strict=True))


def _listed(folder: Path) -> list[MdsShard]:
    """The shards of a data set; raises UserError where it is none, or is compressed."""
    index = folder / INDEX
    if not index.is_file():
        below = sorted(path.parent.name for path in folder.glob(f"*/{INDEX}"))
        hint = f"; its subfolders {', '.join(below[:3])}{' …' * (len(below) > 3)} have one" if below else ""
        raise UserError(f"path={folder}: no {INDEX} in it{hint}")
    try:
        listed = loads(index.read_bytes())["shards"]
        for entry in listed:
            name = Path(entry["raw_data"]["basename"])
            if entry["format"] != "mds":
                raise UserError(
                    f"path={folder}: its shards have the format {entry['format']}; write them with MDSWriter"
                )
            if name.is_absolute() or ".." in name.parts:
                raise UserError(f"path={folder}: the shard {name} lies in another folder")
            if entry["compression"] and not (folder / name).exists():
                packed = entry["zip_data"]["basename"]
                raise UserError(
                    f"path={folder}: its shards are compressed ({entry['compression']}): unpack each beside itself, as "
                    f"zstd -d {packed} -o {name}, or write them with MDSWriter(compression=None)"
                )
        return [_shard(entry) for entry in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"path={index}: no index of MDS shards ({type(error).__name__}: {error})") from error


def _shard(entry: Any) -> MdsShard:
    names, encodings, sizes = (entry[f"column_{facts}"] for facts in ("names", "encodings", "sizes"))
    columns = [Column(str(name), str(code), size) for name, code, size in zip(names, encodings, sizes, strict=True)]
    if any(size is not None and (type(size) is not int or size < 0) for size in [*sizes, entry["samples"]]):
        raise ValueError("a size is none")
    return MdsShard(entry["raw_data"]["basename"], int(entry["samples"]), tuple(columns))


def _check_encodings(index: Path, found: tuple[Column, ...], columns: Columns) -> None:
    check_columns(index, [column.name for column in found], columns)
    encodings = {column.name: column.encoding for column in found}
    for option, name, allowed in (("image", columns.image, IMAGES), ("caption", columns.caption, TEXTS)):
        if encodings[name] not in allowed:
            raise UserError(
                f"{option}_column={name}: {index} has it as {encodings[name]}; must be {', '.join(allowed[:-1])} or "
                f"{allowed[-1]}"
            )


def _decoder(column: Column, columns: Columns) -> Callable[[bytes], Any] | None:
    """What makes a value of a column's bytes; None for a column that is left out."""
    if column.name in columns and column.encoding in ("jpeg", "png", "bytes"):
        return bytes
    if column.name == columns.image:
        return _tiff
    if column.encoding in NUMBERS:
        kind = np.dtype("int64" if column.encoding == "int" else column.encoding).newbyteorder("<")
        return lambda content: np.frombuffer(content, kind).item()
    return DECODERS.get(column.encoding)


def _tiff(pixels: bytes) -> bytes:
    """Pixels as pil has them, after width, height, the length of the mode's name and that name, as an image file."""
    width, height, length = np.frombuffer(pixels, "<u4", 3).tolist()
    mode = pixels[12 : 12 + length].decode()
    if mode not in MODES:
        raise ValueError(f"pixels of mode {mode[:9]}; write them as png")
    if len(pixels) != 12 + length + width * height * MODES[mode] or not width * height:
        raise ValueError(f"other than {width} x {height} pixels")
    buffer = BytesIO()
    Image.frombytes(mode, (width, height), pixels[12 + length :]).save(buffer, "TIFF")
    return buffer.getvalue()
