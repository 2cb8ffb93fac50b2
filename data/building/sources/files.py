"""Files of sources: reading one without harm, and noticing that one was changed."""

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.building.sources import Rejected


def image_limit(max_pixels: int) -> int:
    """Bytes that an image file may have: 16 bits per channel, uncompressed."""
    return 8 * max_pixels + 2**20


def read_file(path: Path, limit: int) -> bytes:
    """Contents of a plain file (never a pipe or a device, which could block) of at most `limit` bytes, or Rejected."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Rejected("not a plain file")
        if status.st_size > limit:
            raise Rejected(f"more than {limit} bytes")
        return path.read_bytes()
    except OSError as error:
        raise Rejected(f"cannot be read: {error.strerror or error}") from error


class Listing:
    """Identity of a source's files, of which none is read: names and sizes, and apart from those when each was written.

    An edit that keeps the size is noticed by the time; one that puts the time back, too, is not.
    """

    def __init__(self) -> None:
        self._names, self._times = hashlib.sha256(), hashlib.sha256()

    def add(self, facts: Sequence[Any], sized: Sequence[Path], timed: Sequence[Path] = ()) -> None:
        """Files that belong together; `timed` are those whose names and sizes do not count."""
        found = [_status(path) for path in sized]
        if facts:
            self._names.update(json.dumps([*facts, *(size for size, _ in found)]).encode())
        self._times.update(json.dumps([time for _, time in [*found, *map(_status, timed)]]).encode())

    def digests(self) -> tuple[str, str]:
        """Digests of names and sizes, and of when the files were written."""
        return self._names.hexdigest(), self._times.hexdigest()


def _status(path: Path) -> tuple[int, int]:
    """Size and time of the last change in nanoseconds; -1 where there is no such file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns
