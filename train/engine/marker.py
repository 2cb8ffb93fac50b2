"""COMPLETE: the file, written last, that says what a folder must hold, so that damage is found before it is used."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

MARKER = "COMPLETE"  # {"files": {name: [bytes, sha256]}}, or of several writers [bytes, [[end of a part, sha256], …]]
BLOCK = 1 << 22  # bytes read at a time

Print = list[Any]  # what the marker says of a file


class Part(NamedTuple):
    """Bytes of a file that one process has written."""

    begin: int
    end: int  # exclusive
    size: int  # of the file
    sha256: str


def joined(written: Iterable[Mapping[str, Part]]) -> dict[str, Print]:
    """What the marker says of each file, from the parts that each process has written.

    Raises:
        RuntimeError: of a file something is missing.
    """
    found: dict[str, list[Part]] = {}
    for parts in written:
        for name, part in parts.items():
            found.setdefault(name, []).append(part)
    prints = dict[str, Print]()
    for name, those in sorted(found.items()):
        size = those[0].size
        filled = sorted(part for part in those if part.end > part.begin or size == 0)
        ends = [0, *(part.end for part in filled)]
        if [part.begin for part in filled] != ends[:-1] or ends[-1] != size:
            raise RuntimeError(f"{name}: not all of it was written")
        marks = [[part.end, part.sha256] for part in filled]
        prints[name] = [size, marks[0][1] if len(marks) == 1 else marks]
    return prints


def damage_of(folder: Path, share: slice = slice(None), needed: str | None = None) -> str | None:
    """What is wrong with the files that the marker lists, None for nothing.

    Args:
        share: of all parts of files, by name and place, that are read.
        needed: a file without which the marker itself is broken.

    """
    try:
        files = json.loads((folder / MARKER).read_bytes())["files"]
        if needed is not None and needed not in files:
            return f"its {MARKER} does not list {needed}"
        parts = [(name, *part) for name in sorted(files) for part in _parts(files[name])]
        for name, begin, end, digest in parts[share]:
            path = folder / name
            if path.stat().st_size != files[name][0] or _sha256(path, begin, end) != digest:
                return f"{name} is not what was written (size or sha256 differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, IndexError):
        return f"its {MARKER} is damaged"
    return None


def _parts(told: Print) -> Iterator[tuple[int, int, str]]:
    """First byte, end and digest of each part."""
    size, marks = told
    begin = 0
    for end, digest in [[size, marks]] if isinstance(marks, str) else marks:
        yield begin, end, digest
        begin = end


def _sha256(path: Path, begin: int, end: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while begin < end and (block := file.read(min(BLOCK, end - begin))):
            digest.update(block)
            begin += len(block)
    return digest.hexdigest()
