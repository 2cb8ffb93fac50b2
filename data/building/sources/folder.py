"""Images of the user's own: a folder with captions beside the images, or tables of both.

What is wrong with one file never stops a build: it is a reject with a reason.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from conf.errors import UserError
from conf.schema import BuildRun
from data.building.sources import Ref, Rejected, Sample, SampleSource, numbered
from data.building.sources.files import Listing, image_limit, read_file
from data.building.sources.tables import Columns, ParquetImages, ParquetTable, parse_row, row_name, rows_of
from data.images import SUFFIXES
from data.labels import MAP, Vocabulary
from data.samples import CAPTION_BYTES, caption_from, caption_in, fields_in

MOST_NAMED = 8  # suffixes in a line
NO_SUFFIX = "none"
_LOOP = "a link to a folder that it lies in"
_DANGLING = "a link to what is not there"
SHOWN = 200  # characters of what a table names an image, where that is no path
_NO_CAPTION = 'no caption: neither a .txt nor a .json with "caption" lies beside it'


class Entry(NamedTuple):
    """One image that was found or that a table names; paths are relative to the source's folder."""

    path: str
    caption: str | None  # from a table
    caption_path: str | None = None  # beside the image
    problem: str | None = None  # found while listing
    meta: dict[str, Any] | None = None  # the further columns of a table
    meta_path: str | None = None  # a .json beside the image
    map_path: str | None = None  # a .seg.png beside the image
    row: str = ""  # of a table, which names it in a list of rejects


def folder_source(cfg: BuildRun) -> SampleSource:
    """`cfg.path`: a folder of images, searched to its depths, or tables: a file, or a folder that has only those."""
    path = Path(cfg.path or "").expanduser()
    if not path.exists():
        raise UserError(f"path={cfg.path}: no such file or folder")
    entries, others = _list_folder(path) if path.is_dir() else ([], {})
    images = any(entry.problem in (None, _NO_CAPTION) for entry in entries)  # others are of folders and links
    tables = ([] if images else _tables_below(path)) if path.is_dir() else [path]
    columns = Columns(cfg.image_column, cfg.caption_column)
    if tables and tables[0].suffix.lower() == ".parquet" and ParquetTable(tables[0], columns).holds_images:
        if entries:
            raise UserError(f"path={cfg.path}: {entries[0].path}: {entries[0].problem}")
        return ParquetImages(cfg, tables)
    return FolderSource(cfg, path, entries, others, tables)


class FolderSource:
    """Images that lie below a folder, or that tables name."""

    def __init__(
        self, cfg: BuildRun, path: Path, entries: list[Entry], others: dict[str, int], tables: list[Path]
    ) -> None:
        self.max_pixels = cfg.max_pixels
        self.root, self.entries, self.other_files = path if path.is_dir() else path.parent, entries, others
        columns, files = Columns(cfg.image_column, cfg.caption_column), Listing()
        for table in tables:
            files.add([], [], [table])
            for number, row in rows_of(table, columns):
                entry = _table_entry(self.root, table, row, columns)
                self.entries.append(entry._replace(row=row_name(tables, table, number)))
        for entry in self.entries:
            sized = [self.root / name for name in (entry.path, entry.caption_path, entry.map_path) if name]
            files.add([entry.path, entry.caption], sized, [self.root / entry.meta_path] if entry.meta_path else [])
        self.listing, self.written = files.digests()
        self.classes: dict[str, int] | None = None  # numbers by name, where folders are classes
        if cfg.class_from_folder:
            linked = (_LOOP, _DANGLING)  # to nothing that could be an image
            names = {_folder_name(entry.path) for entry in self.entries if entry.problem not in linked} - {""}
            self.classes = {name: number for number, name in enumerate(sorted(names))}
            self.entries = [entry._replace(problem=_captionless(entry)) for entry in self.entries]
        self.table = list(columns) if tables else None
        self.entries = self.entries[: cfg.samples or None]
        if not self.entries:
            there = f"; it has {by_suffix(self.other_files)}" if self.other_files else ""
            what = "rows" if tables else f"images ({', '.join(SUFFIXES)}) and no parquet tables"
            raise UserError(f"path={cfg.path}: no {what} in it{there}")

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        """Path of image `index`, relative to the source's folder; before it the row of a table."""
        entry = self.entries[index]
        return f"{entry.row}: {entry.path}" if entry.row else entry.path

    def expected(self) -> int:
        """Number of all samples."""
        return len(self)

    def refs(self, scratch: Path) -> Iterator[Ref]:
        """In order."""
        return numbered(map(self.name, range(len(self))))

    def sample(self, index: int) -> Sample:
        """Contents and caption of image `index`; raises Rejected."""
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
            except UserError as error:
                raise Rejected(f"caption file: {error}") from error
        content = self._read(entry.path, image_limit(self.max_pixels))
        beside = self._fields(entry.meta_path) if entry.meta_path else {}
        segments = self._read(entry.map_path, self.max_pixels + 2**20) if entry.map_path else None
        meta = {**beside, **(entry.meta or {}), **label, "path": entry.path}
        return Sample(content, caption, meta, segments, split_by)

    def _label(self, entry: Entry) -> dict[str, Any]:
        """The class that the image's folder stands for, where folders are classes."""
        if self.classes is None:
            return {}
        name = _folder_name(entry.path)
        if not name:
            raise Rejected("class_from_folder: it lies in no subfolder, and so has no class")
        return {"class": name, "class_id": self.classes[name]}

    def _fields(self, path: str) -> dict[str, Any]:
        """The fields of a JSON file; none where it does not parse: the caption that was needed came from elsewhere."""
        try:
            return fields_in(self._read(path, CAPTION_BYTES))
        except UserError:
            return {}

    def vocabulary(self) -> Vocabulary:
        """The folders, where they are classes."""
        return Vocabulary.of({"classes": self.classes or ()})

    def identity(self) -> dict[str, Any]:
        """The options that the samples depend on, and the files found: their names and sizes."""
        identity: dict[str, Any] = {"path": self.listing, "samples": len(self.entries)}
        identity |= {"columns": self.table} if self.table else {}
        return identity | ({"class_from_folder": True} if self.classes is not None else {})

    def times(self) -> str:
        """When its files were written."""
        return self.written

    def describe(self) -> dict[str, Any]:
        """Provenance; `other_files` counts what was not taken for an image, by suffix."""
        return {"name": str(self.root.resolve()), "other_files": self.other_files}

    def _read(self, path: str, limit: int) -> bytes:
        return read_file(self.root / path, limit)


def by_suffix(counts: Mapping[str, int]) -> str:
    """How many files there are, the commonest suffix first."""
    commonest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{count:,} {'without suffix' if suffix == NO_SUFFIX else suffix}" for suffix, count in commonest]
    return ", ".join(named[:MOST_NAMED]) + (f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else "")


def _folder_name(path: str) -> str:
    """Name of the folder that an image lies in; "" for the source's own."""
    return os.path.basename(os.path.dirname(path))


def _captionless(entry: Entry) -> str | None:
    """Problem of an entry, unless it is the lack of a caption: the class says what the image shows."""
    return None if entry.problem == _NO_CAPTION else entry.problem


def _list_folder(root: Path) -> tuple[list[Entry], dict[str, int]]:
    """Images below `root` in the order of their paths, and how many other files there are by suffix."""
    entries, others = [], Counter[str]()
    for folder, names, problem in _walk(root):
        prefix = "" if folder == "." else f"{folder}/"
        if problem:
            entries.append(Entry(folder, None, problem=problem))
        beside = {f"{Path(n).stem}{Path(n).suffix.lower()}": n for n in names if n.lower().endswith((".txt", ".json"))}
        maps = {name[: -len(MAP) - 1]: name for name in names if name.lower().endswith(f".{MAP}")}
        no_images, unused = set(maps.values()), set(names)
        for name in names:
            stem, suffix = Path(name).stem, Path(name).suffix.lower()
            path = os.path.join(root, prefix, name)
            lost = os.path.islink(path) and not os.path.exists(path)
            if suffix in SUFFIXES and name not in no_images:
                caption = beside.get(f"{stem}.txt") or beside.get(f"{stem}.json")
                problem = None if caption else _DANGLING if lost else _NO_CAPTION
                found = (caption, beside.get(f"{stem}.json"), maps.get(stem))
                paths = [f"{prefix}{file}" if file else None for file in found]
                entries.append(Entry(f"{prefix}{name}", None, paths[0], problem, None, paths[1], paths[2]))
                unused -= {name, caption, *found}
            elif lost:
                entries.append(Entry(f"{prefix}{name}", None, problem=_DANGLING))
                unused.remove(name)
        others.update(Path(name).suffix.lower() or NO_SUFFIX for name in unused)
    return sorted(entries, key=lambda entry: entry.path), dict(sorted(others.items()))


def _walk(root: Path) -> Iterator[tuple[str, list[str], str | None]]:
    """(folder relative to root, file names, problem) of each folder; links are followed, but not to a folder above."""
    problems: list[OSError] = []
    above = {str(root): {os.path.realpath(root)}}  # of each folder to come: where it and those above it really are
    for folder, folders, names in os.walk(root, onerror=problems.append, followlinks=True):
        behind = above.pop(folder)
        for name in list(folders):
            path = os.path.join(folder, name)
            real = os.path.realpath(path)
            if real in behind:
                folders.remove(name)
                yield Path(path).relative_to(root).as_posix(), [], _LOOP
            else:
                above[path] = behind | {real}
        yield Path(folder).relative_to(root).as_posix(), names, None
    for problem in problems:
        yield Path(problem.filename).relative_to(root).as_posix(), [], f"unreadable folder: {problem.strerror}"


def _tables_below(root: Path) -> list[Path]:
    """Every parquet file, as Spark and the Hub leave them; names that begin with a dot or "_" are none."""
    found = (root / folder / name for folder, names, _ in _walk(root) for name in names)
    return sorted(path for path in found if path.suffix.lower() == ".parquet" and path.name[0] not in "._")


def _table_entry(root: Path, table: Path, row: dict[Any, Any], columns: Columns) -> Entry:
    """A row as an entry; a path may not leave the table's folder.

    img2dataset's own tables name images by "key", which lie in a folder named as the table, and have a "status".
    """
    named = row[columns.image]
    shown = (named if isinstance(named, str) and named else repr(named))[:SHOWN]
    try:
        path, caption, meta = parse_row(row, columns)
        if isinstance(path, bytes):
            raise Rejected("the image column holds no path, as it does in other rows")
    except Rejected as error:
        return Entry(shown, None, problem=str(error))
    folder = table.parent
    if columns.image == "key":
        found = (f"{table.stem}/{path}{suffix}" for suffix in SUFFIXES)
        path = next((name for name in found if os.path.exists(folder / name)), f"{table.stem}/{path}.jpg")
    elif not os.path.exists(folder / path):  # a table from Windows, or with spaces around its cells
        path = path.strip().replace("\\", "/")
    relative = os.path.relpath(folder / path, folder)  # compares names only: links are the user's own
    if relative.split(os.sep)[0] == os.pardir:
        return Entry(shown, None, problem="the path leaves the table's folder")
    return Entry(os.path.relpath(folder / relative, root), caption, meta=meta)


def _parse_caption(path: str, content: bytes) -> str:
    if not path.lower().endswith(".json"):
        return caption_in(content)
    try:
        fields = fields_in(content)
    except UserError as error:
        raise Rejected(f'no JSON object with "caption" ({error})') from None
    if "caption" not in fields:
        raise Rejected('no JSON object with "caption"')
    return caption_from(fields["caption"])
