"""Offsets of the members of a tar: ustar, GNU long names and pax headers, without tarfile's cost per member."""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from conf.errors import UserError

BLOCK = 512  # bytes: tar headers and the padding of members
END_OF_ARCHIVE = bytes(2 * BLOCK)
REGULAR_FILES = (b"0", b"\0", b"7")
WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders and pipes
NO_FILES = (b"5", b"g", b"V", b"M")  # folders, headers for all, volume labels, parts of another volume
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}


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
