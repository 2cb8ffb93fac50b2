"""Text files that people write: lines of text, or a JSON object a line."""

import json
from pathlib import Path
from typing import Any, NoReturn

from conf.errors import UserError

MARK = "\ufeff"  # of the byte order; editors put it at the beginning, and concatenation into the middle


def lines_of(path: str, option: str, form: str) -> list[str]:
    """Lines of a file in UTF-8; they end at LF or CRLF, and at nothing else that Unicode calls a line's end.

    A CR inside a line is text; a file without LF that has CRs inside is an error, since it would be a single line.

    Args:
        path: the file.
        option: what errors call it.
        form: what to write into it, for errors.

    Raises:
        UserError: no file, or none of text in UTF-8.

    """
    if Path(path).is_dir():
        raise UserError(f"{option}={path}: is a folder; name a text file")
    if not Path(path).is_file():
        raise UserError(f"{option}={path}: no such file")
    content, lines = Path(path).read_bytes(), []
    if b"\n" not in content and b"\r" in content.rstrip(b"\r"):
        raise UserError(f"{option}={path}: its lines end at CR alone; save it with LF or CRLF, and {form}")
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            text = line.rstrip(b"\r").decode()
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:  # as all that UTF-16 makes of ASCII
            raise UserError(f"{option}={path}: is no UTF-8 text from line {number} on; save it as UTF-8, and {form}")
        lines.append(text.removeprefix(MARK))
    return lines


def json_object(text: str, form: str) -> dict[str, Any]:
    """A JSON object as its standard defines it: without NaN, and with each name once.

    Args:
        text: what was written.
        form: what to write, for errors.

    Raises:
        UserError: it is none.

    """
    try:
        found = json.loads(text, parse_constant=_no_number, object_pairs_hook=_each_once)
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("holds half of a character, a lone surrogate; write the whole one") from None
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, list):
        raise UserError(f"is a JSON array; {form}")
    if not isinstance(found, dict):
        raise UserError(f"is no JSON object; {form}")
    return found


def _no_number(constant: str) -> NoReturn:
    raise UserError(f"{constant} is no number of JSON; write one such as 2.0")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"names '{twice}' twice; leave one out")
    return dict(pairs)
