"""Files that people write are read as their editors show them, or refused in one line."""

from pathlib import Path

import pytest

from conf.errors import UserError
from data.text_files import json_object, lines_of


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"a\r\nb\nc", ["a", "b", "c"]),
        ("a\u2028b\u0085c\x0bd\x0ce\x1cf\ng".encode(), ["a\u2028b\u0085c\x0bd\x0ce\x1cf", "g"]),
        ("\ufeffa\n\ufeffb\n".encode(), ["a", "b", ""]),
        (b"a\rb\nc\r\r\n", ["a\rb", "c", ""]),
        (b"", [""]),
    ],
)
def test_lines_end_at_line_feeds_alone(content: bytes, lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert lines_of(str(tmp_path / "a.txt"), "prompts_file", "write one prompt a line") == lines


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("caf\xe9".encode("latin-1"), 1),
        ("a\nb\ncaf\xe9\n".encode("latin-1"), 3),
        ("a dog\n".encode("utf-16"), 1),
        ("a dog\n".encode("utf-16-le"), 1),
        ("a dog\n".encode("utf-32"), 1),
        (b"a\0b", 1),
    ],
)
def test_other_encodings_are_named_with_their_line(content: bytes, line: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(
        UserError, match=rf"^prompts_file=\S+: is no UTF-8 text from line {line} on; save it as UTF-8, and"
    ):
        lines_of(str(tmp_path / "a.txt"), "prompts_file", "write one prompt a line")


def test_lines_that_end_at_cr_alone_are_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a red ball\ra blue ball\r")
    with pytest.raises(UserError, match=r"^prompts_file=\S+: its lines end at CR alone; save it with LF or CRLF, and"):
        lines_of(str(tmp_path / "a.txt"), "prompts_file", "write one prompt a line")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^edits_file=\S+: is a folder; name a text file"):
        lines_of(str(tmp_path), "edits_file", "write")
    with pytest.raises(UserError, match=r"^edits_file=\S+: no such file$"):
        lines_of(str(tmp_path / "x"), "edits_file", "write")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": NaN}', "NaN is no number of JSON; write one such as 2.0"),
        ('{"a": -Infinity}', "-Infinity is no number of JSON"),
        ('[{"a": 1}]', "is a JSON array; write it"),
        ("{", "is no JSON object; write it"),
        ('"a"', "is no JSON object; write it"),
        ('{"a": 1, "a": 2}', "names 'a' twice; leave one out"),
        ('{"a": "\\ud83d"}', "holds half of a character"),
        ("[" * 100_000, "is no JSON object"),
    ],
)
def test_what_is_no_json_object_is_told(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        json_object(text, "write it")


def test_separators_of_unicode_stay_in_json() -> None:
    assert json_object('{"a": "b\u2028c"}', "") == {"a": "b\u2028c"}
