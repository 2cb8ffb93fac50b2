"""Tables of images: CSV and parquet files whose rows name image files, or hold the images themselves.

A row that cannot be used is a reject with its number (from 1, without the header); a table that cannot be read is one
line.
"""

import codecs
import csv
import math
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

from conf.errors import UserError
from conf.schema import BuildRun
from data.building.sources import Ref, Rejected, Sample
from data.building.sources.files import Listing, image_limit
from data.labels import Vocabulary

SUFFIXES = (".csv", ".tsv", ".parquet")
MARKS = ",\t;|"  # between the cells of a CSV
CELL = 2**24  # characters of a CSV's cell; more are taken for a quote that is never closed
CAPTION = 65536  # characters; a longer caption is taken for a mistake
PATH = 4096  # characters
BATCH = 16  # rows with images that a process holds in memory
BUFFER = 2**20  # bytes of a parquet file that are read ahead in each column


class Columns(NamedTuple):
    """The options that name two columns."""

    image: str
    caption: str


class TableRow(NamedTuple):
    """A row of a table, as far as it says anything about an image."""

    image: str | bytes  # path, or contents of the file
    caption: str
    meta: dict[str, Any]  # further columns whose values JSON can hold


def rows_of(table: Path, columns: Columns) -> Iterator[tuple[int, dict[Any, Any]]]:
    """The rows of a table with their numbers; raises UserError where it is none or lacks one of the two columns."""
    if table.suffix.lower() not in SUFFIXES:
        raise UserError(f"path={table}: not a folder, .csv, .tsv or .parquet file")
    if table.suffix.lower() == ".parquet":
        return enumerate(ParquetTable(table, columns), 1)
    return _rows_of_csv(table, columns)


def parse_row(row: dict[Any, Any], columns: Columns) -> TableRow:
    """Image, caption and labels of a row; raises Rejected."""
    if row.get("status") not in (None, "success") and "error_message" in row:  # a table that img2dataset wrote
        raise Rejected(f"not downloaded: {row['error_message'] or row['status']}")
    image = row[columns.image]
    if isinstance(image, dict):  # the Hub's format
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes) and _is_text(image):  # Spark's strings
        image = image.decode()
    if not image or not isinstance(image, str | bytes) or (isinstance(image, str) and "\0" in image):
        raise Rejected("the image column holds no path and no image")
    if isinstance(image, str) and "://" in image:
        raise Rejected("an address: download the images first, for example with img2dataset")
    if isinstance(image, str) and len(image) > PATH:
        raise Rejected(f"the image column holds text of {len(image)} characters, which is no path")
    if None in row:
        raise Rejected(f"{row[None]} cells more than the header has: put quotes around text that holds the separator")
    meta = {name: value for name, value in row.items() if name not in columns and _is_kept(name, value)}
    return TableRow(image, _caption(row[columns.caption]), meta)


def sample_in(row: dict[Any, Any], columns: Columns, limit: int) -> Sample:
    """Sample of a row that holds its image, in at most `limit` bytes; raises Rejected.

    Of a list of captions the first counts; all are kept under their column's name, or as "captions" where that is
    "caption", so that a training can name them.
    """
    texts = row[columns.caption]
    listed = isinstance(texts, list)
    parsed = parse_row({**row, columns.caption: texts[0]} if listed and texts else row, columns)
    if isinstance(parsed.image, str):
        raise Rejected("the row holds the name of an image and not the image")
    if len(parsed.image) > limit:
        raise Rejected(f"more than {limit} bytes")
    image, kept = row[columns.image], "captions" if columns.caption == "caption" else columns.caption
    name = image.get("path") if isinstance(image, dict) else None
    more = ({kept: texts} if listed else {}) | ({"path": name} if isinstance(name, str) else {})
    return Sample(parsed.image, parsed.caption, parsed.meta | more)


def _caption(value: Any) -> str:
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise Rejected(f"the caption column holds a list of {len(value)}: write a row, or one text, for each image")
        value = value[0]
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise Rejected("the caption column holds bytes that are not UTF-8") from error
    if not isinstance(value, str):
        raise Rejected("the caption column holds no text")
    if len(value) > CAPTION:
        raise Rejected(f"the caption column holds more than {CAPTION} characters")
    return value


def _is_text(content: bytes) -> bool:
    """Whether bytes are a path; the contents of an image have control characters at their beginning."""
    try:
        return len(content) <= PATH and content.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _is_kept(name: str, value: Any) -> bool:
    """Whether JSON can hold it; a class that is no number is kept, too, and makes the row a reject."""
    if isinstance(value, float):
        return math.isfinite(value) or name == "class_id"
    return isinstance(value, str | int | list | dict)


def check_columns(table: Path, names: Sequence[str], columns: Columns) -> None:
    """Raises UserError where one of the two columns is not among `names`, or a name is there twice."""
    for option, column in (("image_column", columns.image), ("caption_column", columns.caption)):
        if column not in names:
            shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            remedy = f"set {option} to one of them" if names else "its first line must name them"
            raise UserError(f"{option}={column}: {table} has the columns {shown[:500] or '(none)'}: {remedy}")
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise UserError(f"path={table}: {names.count(twice[0])} columns are called {twice[0]}; rename all but one")


def _rows_of_csv(table: Path, columns: Columns) -> Iterator[tuple[int, dict[Any, Any]]]:
    """Separated as the header is: by a comma, tab, semicolon or bar; in UTF-8, or UTF-16 with its mark."""
    number = 0
    csv.field_size_limit(CELL)
    try:
        with open(table, "rb") as start:
            wide = start.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        with open(table, encoding="utf-16" if wide else "utf-8-sig", newline="") as file:
            header = next((line for line in file if line.strip()), "")
            if "\0" in header:
                raise UserError(f"path={table}: not a CSV file in UTF-8 (NUL in its first line); save it as UTF-8")
            read = {mark: [name.strip() for name in next(csv.reader([header], delimiter=mark), [])] for mark in MARKS}
            mark = max(MARKS, key=lambda mark: (len({*columns} & {*read[mark]}), len(read[mark])))
            file.seek(0)
            spaced = f"{mark} " in header  # "path, caption"
            reader = csv.reader(file, delimiter=mark, skipinitialspace=spaced, strict=True)
            names = [name.strip() for name in next(filter(None, reader), [])]
            check_columns(table, names, columns)
            for number, cells in enumerate(reader, 1):
                if cells:  # no blank line
                    yield number, _named(names, cells)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"path={table}: not a CSV file in UTF-8 (byte {byte:#04x} near row {number + 1}); save it as UTF-8"
        ) from error
    except csv.Error as error:
        reason = {"unexpected end of data": "a quote that is never closed"}.get(str(error), str(error))
        raise UserError(f"path={table}: not a CSV file in UTF-8 (row {number + 1}: {reason})") from error
    except OSError as error:
        raise UserError(f"path={table}: cannot be read: {error.strerror or error}") from error


def _named(names: list[str], cells: list[str]) -> dict[Any, Any]:
    """Cells by their columns: None where one is missing, and under None how many there are too much."""
    row: dict[Any, Any] = dict(zip(names, [*cells, *[None] * (len(names) - len(cells))], strict=False))
    return row | {None: len(cells) - len(names)} if any(cells[len(names) :]) else row


class ParquetTable:
    """The rows of a parquet file; columns that are neither numbers nor text are read only where they are asked for.

    Args:
        lists: whether lists of texts are read, too.
    """

    def __init__(self, path: Path, columns: Columns, lists: bool = False) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise UserError(
                f"path={path}: reading parquet needs the package pyarrow: pip install 'latentline[parquet]'"
            ) from error
        self.path, self.errors = path, (pyarrow.ArrowException, OSError, ValueError, OverflowError)
        try:
            self.file = parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)  # or it holds a whole group
            schema = self.file.schema_arrow
            counts = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        except self.errors as error:
            raise UserError(f"path={path}: not a readable parquet file ({_first_line(error)})") from error
        check_columns(path, schema.names, columns)
        kinds = {name: schema.field(name).type for name in schema.names}
        self.columns = [name for name in kinds if name in columns or _is_simple(kinds[name], lists)]
        self.image_column, self.image_type = columns.image, kinds[columns.image]
        self.starts = list(accumulate(counts, initial=0))
        self.group, self.first, self.batch, self.batches = -1, 0, None, iter(())

    def __len__(self) -> int:
        return self.starts[-1]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            for batch in self.file.iter_batches(columns=self.columns):
                yield from batch.to_pylist()
        except self.errors as error:
            raise UserError(f"path={self.path}: not a readable parquet file ({_first_line(error)})") from error

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One row; quick where rows are asked for in their order. Raises Rejected."""
        group = bisect_right(self.starts, row) - 1
        try:
            if group != self.group or row < self.first:
                self.group, self.first, self.batch = group, self.starts[group], None
                self.batches = self.file.iter_batches(BATCH, row_groups=[group], columns=self.columns)
            while self.batch is None or row >= self.first + len(self.batch):
                self.first += len(self.batch or ())
                self.batch = next(self.batches)
            return self.batch.slice(row - self.first, 1).to_pylist()[0]
        except (*self.errors, StopIteration) as error:
            self.group = -1
            raise Rejected(f"cannot be read: {_first_line(error)}") from error

    @property
    def holds_images(self) -> bool:
        """Whether its image column has the contents of files, as on the Hub, rather than their paths."""
        kind = str(self.image_type)
        if kind.startswith("struct"):
            return True
        if "binary" not in kind:
            return False
        try:
            batches = self.file.iter_batches(1, columns=[self.image_column])
            found = next((value for batch in batches if (value := batch.to_pylist()[0][self.image_column])), b"")
        except self.errors:
            return True  # each row will say so
        return not _is_text(found)


class ParquetImages:
    """A source whose samples are rows of parquet files that hold the images; a place is a file and a row of it."""

    def __init__(self, cfg: BuildRun, tables: Sequence[Path]) -> None:
        self.columns, self.samples = Columns(cfg.image_column, cfg.caption_column), cfg.samples
        self.path, self.tables, self.limit = Path(cfg.path or ""), list(tables), image_limit(cfg.max_pixels)
        self.sizes = [len(ParquetTable(table, self.columns)) for table in self.tables]
        files = Listing()
        for table in self.tables:
            files.add([table.name], [table])
        self.listing, self.written = files.digests()
        self._open: tuple[int, ParquetTable] | None = None
        if cfg.class_from_folder:
            raise UserError(f"class_from_folder=true: {cfg.path} is a table, whose column class_id has the classes")
        if not sum(self.sizes):
            raise UserError(f"path={cfg.path}: no rows in it")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def expected(self) -> int:
        """Rows of all files, or as many as are asked for."""
        return min(sum(self.sizes), self.samples or sys.maxsize)

    def refs(self, scratch: Path) -> Iterator[Ref]:
        """File by file, row by row."""
        rows = ((number, row) for number, size in enumerate(self.sizes) for row in range(size))
        for count, (number, row) in enumerate(islice(rows, self.samples or None)):
            yield Ref(f"{count:09d}", row_name(self.tables, self.tables[number], row + 1), (number, row))

    def sample(self, place: tuple[int, int]) -> Sample:
        """Contents and caption of a row; raises Rejected."""
        number, row = place
        if self._open is None or self._open[0] != number:
            self._open = number, ParquetTable(self.tables[number], self.columns, lists=True)
        return sample_in(self._open[1][row], self.columns, self.limit)

    def vocabulary(self) -> Vocabulary:
        """Vocabulary of the rows' labels."""
        return Vocabulary()

    def identity(self) -> dict[str, Any]:
        """The options that the samples depend on, and the files: their names and sizes."""
        return {"path": self.listing, "samples": self.samples, "columns": list(self.columns)}

    def times(self) -> str:
        """When its files were written."""
        return self.written

    def describe(self) -> dict[str, Any]:
        """Provenance."""
        return {"name": str(self.path.resolve()), "tables": len(self.tables)}


def row_name(tables: Sequence[Path], table: Path, number: int) -> str:
    """Name of a row in a list of rejects."""
    return f"row {number}" if len(tables) == 1 else f"{table.name} row {number}"


def _is_simple(kind: Any, lists: bool = False) -> bool:
    """Whether a column has numbers or text, as JSON has them, or lists of texts where those are wanted."""
    from pyarrow import types

    if lists and (types.is_list(kind) or types.is_large_list(kind)):
        return types.is_string(kind.value_type) or types.is_large_string(kind.value_type)
    kind = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(test(kind) for test in tests)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
