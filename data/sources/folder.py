"""Pictures of the user's own: a folder with captions beside the images, or a CSV or parquet table of both.

What is wrong with one file never stops a build: it is a reject with a reason.
"""

import csv
import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from conf.errors import UserError
from conf.plain_json import loads
from conf.schema import BuildRun
from data.images import SUFFIXES
from data.labels import MAP, Vocabulary
from data.sources import Ref, Rejected, Sample, numbered

CAPTION_BYTES = 65536  # a longer caption file is taken for a mistake
_NO_CAPTION = 'no caption: neither a .txt nor a .json with "caption" lies beside it'


class Entry(NamedTuple):
    """One picture that was found or that a table names; paths are relative to the source's folder."""

    path: str
    caption: str | None  # from a table
    caption_path: str | None = None  # beside the picture
    problem: str | None = None  # found while listing
    meta: dict[str, Any] | None = None  # the further columns of a table
    meta_path: str | None = None  # a .json beside the picture
    map_path: str | None = None  # a .seg.png beside the picture


class FolderSource:
    """`cfg.path`: a folder, searched to its depths, or a .csv or .parquet file."""

    def __init__(self, cfg: BuildRun) -> None:
        path = Path(cfg.path or "").expanduser()
        if not path.exists():
            raise UserError(f"path={cfg.path}: no such file or folder")
        self.max_pixels = cfg.max_pixels
        self.other_files: dict[str, int] = {}
        if path.is_dir():
            self.root = path
            self.entries, self.other_files = _list_folder(path)
        else:
            self.root = path.parent
            rows = _read_table(path, cfg.image_column, cfg.caption_column)
            self.entries = [_table_entry(path, row, cfg.image_column, cfg.caption_column) for row in rows]
        self.listing = _listing_digest(self.root, self.entries)
        self.classes: dict[str, int] | None = None  # numbers by name, where folders are classes
        if cfg.class_from_folder:
            names = {_folder_name(entry.path) for entry in self.entries} - {""}
            self.classes = {name: number for number, name in enumerate(sorted(names))}
            self.entries = [entry._replace(problem=_captionless(entry)) for entry in self.entries]
        self.table = None if path.is_dir() else [cfg.image_column, cfg.caption_column]
        self.entries = self.entries[: cfg.samples or None]
        if not self.entries:
            what = f"images ({', '.join(SUFFIXES)})" if path.is_dir() else "rows"
            raise UserError(f"path={cfg.path}: no {what} in it")

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        """Path of picture `index`, relative to the source's folder."""
        return self.entries[index].path

    def expected(self) -> int:
        """All of them."""
        return len(self)

    def refs(self, scratch: Path) -> Iterator[Ref]:
        """In order."""
        return numbered(map(self.name, range(len(self))))

    def sample(self, index: int) -> Sample:
        """Contents and caption of picture `index`; raises Rejected."""
        entry = self.entries[index]
        if entry.problem:
            raise Rejected(entry.problem)
        label = self._label(entry)
        split_by = ""
        if entry.caption_path is None and entry.caption is None and label:
            caption, split_by = str(label["class"]).replace("_", " "), entry.path
        elif entry.caption_path is None:
            caption = entry.caption or ""
        else:
            try:
                caption = _parse_caption(entry.caption_path, self._read(entry.caption_path, CAPTION_BYTES))
            except Rejected as error:
                raise Rejected(f"caption file: {error}") from error
        content = self._read(entry.path, 8 * self.max_pixels + 2**20)  # 16 bits per channel, uncompressed
        beside = self._fields(entry.meta_path) if entry.meta_path else {}
        segments = self._read(entry.map_path, self.max_pixels + 2**20) if entry.map_path else None
        meta = {**beside, **(entry.meta or {}), **label, "path": entry.path}
        return Sample(content, caption, meta, segments, split_by)

    def _label(self, entry: Entry) -> dict[str, Any]:
        """The class that the picture's folder stands for, where folders are classes."""
        if self.classes is None:
            return {}
        name = _folder_name(entry.path)
        if not name:
            raise Rejected("class_from_folder: it lies in no subfolder, and so has no class")
        return {"class": name, "class_id": self.classes[name]}

    def _fields(self, path: str) -> dict[str, Any]:
        """The fields of a JSON file; none where it does not parse: the caption that was needed came from elsewhere."""
        try:
            fields = loads(self._read(path, CAPTION_BYTES))
        except (Rejected, ValueError, RecursionError):
            return {}
        return fields if isinstance(fields, dict) else {}

    def vocabulary(self) -> Vocabulary:
        """The folders, where they are classes."""
        return Vocabulary.of({"classes": self.classes or ()})

    def identity(self) -> dict[str, Any]:
        """The options that the samples depend on, and the files found: their names and sizes."""
        identity: dict[str, Any] = {"path": self.listing, "samples": len(self.entries)}
        identity |= {"columns": self.table} if self.table else {}
        return identity | ({"class_from_folder": True} if self.classes is not None else {})

    def describe(self) -> dict[str, Any]:
        """Provenance; `other_files` counts what was not taken for a picture, by suffix."""
        return {"name": str(self.root.resolve()), "other_files": self.other_files}

    def _read(self, path: str, limit: int) -> bytes:
        """Contents of a plain file (never a pipe or a device, which could block) of at most `limit` bytes."""
        try:
            status = os.stat(self.root / path)
            if not stat.S_ISREG(status.st_mode):
                raise Rejected("not a plain file")
            if status.st_size > limit:
                raise Rejected(f"more than {limit} bytes")
            return (self.root / path).read_bytes()
        except OSError as error:
            raise Rejected(f"cannot be read: {error.strerror or error}") from error


def _folder_name(path: str) -> str:
    """Name of the folder that a picture lies in; "" for the source's own."""
    return os.path.basename(os.path.dirname(path))


def _captionless(entry: Entry) -> str | None:
    """Its problem, unless that is the lack of a caption: the class says what the picture shows."""
    return None if entry.problem == _NO_CAPTION else entry.problem


def _list_folder(root: Path) -> tuple[list[Entry], dict[str, int]]:
    """Pictures below `root` in the order of their paths, and how many other files there are by suffix."""
    entries, others = [], Counter[str]()
    for folder, names, problem in _walk(root):
        prefix = "" if folder == "." else f"{folder}/"
        if problem:
            entries.append(Entry(folder, None, problem=f"unreadable folder: {problem}"))
        beside = {f"{Path(n).stem}{Path(n).suffix.lower()}": n for n in names if n.lower().endswith((".txt", ".json"))}
        maps = {name[: -len(MAP) - 1]: name for name in names if name.lower().endswith(f".{MAP}")}
        known = {*beside.values(), *maps.values()}
        for name in names:
            stem, suffix = Path(name).stem, Path(name).suffix.lower()
            if suffix in SUFFIXES and name not in known:
                caption = beside.get(f"{stem}.txt") or beside.get(f"{stem}.json")
                problem = None if caption else _NO_CAPTION
                meta = beside.get(f"{stem}.json")
                paths = [f"{prefix}{found}" if found else None for found in (caption, meta, maps.get(stem))]
                entries.append(Entry(f"{prefix}{name}", None, paths[0], problem, None, *paths[1:]))
            elif name not in known:
                others[suffix or "none"] += 1
    return sorted(entries, key=lambda entry: entry.path), dict(sorted(others.items()))


def _walk(root: Path) -> Iterator[tuple[str, list[str], str | None]]:
    """(folder relative to root, file names, problem) of each folder."""
    problems: list[OSError] = []
    for folder, _, names in os.walk(root, onerror=problems.append):
        yield Path(folder).relative_to(root).as_posix(), names, None
    for problem in problems:
        yield Path(problem.filename).relative_to(root).as_posix(), [], problem.strerror


def _read_table(path: Path, image_column: str, caption_column: str) -> Iterator[dict[str, Any]]:
    """The rows of a table, which must have the two columns."""
    if path.suffix.lower() == ".csv":
        return _read_csv(path, image_column, caption_column)
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, image_column, caption_column)
    raise UserError(f"path={path}: not a folder, .csv or .parquet file")


def _check_columns(path: Path, columns: list[str], image_column: str, caption_column: str) -> None:
    for option, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column not in columns:
            raise UserError(f"{option}={column}: {path} has the columns {', '.join(columns) or '(none)'}")


def _read_csv(path: Path, image_column: str, caption_column: str) -> Iterator[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            _check_columns(path, list(reader.fieldnames or []), image_column, caption_column)
            yield from reader
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"path={path}: not a CSV file in UTF-8 ({error})") from error


def _read_parquet(path: Path, image_column: str, caption_column: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"path={path}: reading parquet needs the package pyarrow: pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
        _check_columns(path, file.schema_arrow.names, image_column, caption_column)
        for batch in file.iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"path={path}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def _table_entry(table: Path, row: dict[str, Any], image_column: str, caption_column: str) -> Entry:
    """A row as an entry; a path may not leave the table's folder.

    img2dataset's own tables name pictures by "key", which lie in a folder named as the table, and have a "status".
    """
    path, caption = row[image_column], row[caption_column]
    meta = {
        name: value for name, value in row.items() if name not in (image_column, caption_column) and _is_plain(value)
    }
    if row.get("status") not in (None, "success") and "error_message" in row:
        return Entry(str(path), None, problem=f"not downloaded: {row['error_message'] or row['status']}")
    if not isinstance(path, str) or not path or "\0" in path:
        return Entry(repr(path), None, problem="the image column holds no path")
    if "://" in path:
        return Entry(path, None, problem="an address: download the images first, for example with img2dataset")
    if image_column == "key":
        found = (
            f"{table.stem}/{path}{suffix}"
            for suffix in SUFFIXES
            if (table.parent / table.stem / f"{path}{suffix}").exists()
        )
        path = next(found, f"{table.stem}/{path}.jpg")
    relative = os.path.relpath(table.parent / path, table.parent)  # compares names only: links are the user's own
    if relative.split(os.sep)[0] == os.pardir:
        return Entry(path, None, problem="the path leaves the table's folder")
    if not isinstance(caption, str):
        return Entry(path, None, problem="the caption column holds no text")
    return Entry(relative, caption, meta=meta)


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold it; what a CSV's rows have too much is a list."""
    return isinstance(value, str | int | bool) or (isinstance(value, float) and math.isfinite(value))


def _parse_caption(path: str, content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
        caption = loads(text)["caption"] if path.lower().endswith(".json") else text
    except UnicodeDecodeError as error:
        raise Rejected("not UTF-8") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Rejected('no JSON object with "caption"') from error
    if not isinstance(caption, str):
        raise Rejected('"caption" is not text')
    return caption


def _listing_digest(root: Path, entries: list[Entry]) -> str:
    """Identity of the source: names, captions of a table, and file sizes, so that a changed folder is noticed."""
    digest = hashlib.sha256()
    for entry in entries:
        sizes = [_size(root / path) for path in (entry.path, entry.caption_path, entry.map_path) if path]
        digest.update(json.dumps([entry.path, entry.caption, *sizes]).encode())
    return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return -1
