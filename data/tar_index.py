"""Where the members of a tar lie: ustar, GNU long names and pax headers, without tarfile's cost per member."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

from conf.errors import UserError

BLOCK = 512  # bytes: tar headers and the padding of members
END_OF_ARCHIVE = bytes(2 * BLOCK)
REGULAR_FILES = (b"0", b"\0", b"7")


def unreadable(path: Path) -> UserError:
    """The error of a file that is not a whole tar."""
    return UserError(f"shard {path} is not a readable tar (truncated?): rebuild it or delete it")


def scan_tar(content: memoryview, path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size in bytes) of each regular member; far faster than tarfile, and it finds truncation."""
    offset, end = 0, len(content)
    long_name, long_size = "", -1
    while True:
        header = bytes(content[offset : offset + BLOCK])
        if header == END_OF_ARCHIVE[:BLOCK]:
            return
        if len(header) < BLOCK or header[257:262] != b"ustar":
            raise unreadable(path)
        try:
            size = _number(header[124:136])
            checksum = _number(header[148:156])
        except tarfile.HeaderError:
            raise unreadable(path) from None
        if sum(header) - sum(header[148:156]) + 8 * 0x20 != checksum:
            raise unreadable(path)
        kind = header[156:157]
        if long_size >= 0:
            size = long_size
        start, offset = offset + BLOCK, offset + BLOCK + size + -size % BLOCK
        if size < 0 or offset > end:
            raise unreadable(path)
        if kind == b"L":
            long_name = _text(bytes(content[start : start + size]))
            continue
        if kind == b"x":
            records = _pax(bytes(content[start : start + size]))
            long_name = records.get("path", long_name)
            long_size = int(records["size"]) if records.get("size", "").isdigit() else -1
            continue
        if kind in REGULAR_FILES:
            yield long_name or _ustar_name(header), start, size
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
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax(content: bytes) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n" of a pax header (POSIX.1-2001)."""
    records = {}
    while content:
        digits, _, _ = content.partition(b" ")
        if not digits.isdigit() or int(digits) <= len(digits):
            break
        key, _, value = content[len(digits) + 1 : int(digits) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        content = content[int(digits) :]
    return records
