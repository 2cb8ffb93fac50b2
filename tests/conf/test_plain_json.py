"""What is written is JSON for every program, and what others wrote as Python does ends nothing."""

import json
import math
from typing import Any

import pytest

from conf.plain_json import dumps, loads, loads_finite


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_written_as_null(value: float) -> None:
    text = dumps({"a": [1.5, value, {"b": (value, 2)}], "c": "NaN"}, indent=1)
    assert json.loads(text, parse_constant=refuse) == {"a": [1.5, None, {"b": [None, 2]}], "c": "NaN"}


def test_finite_content_is_written_as_ever() -> None:
    content: dict[str, Any] = {"b": 0.1, "a": [1, None, "é"]}
    assert dumps(content, sort_keys=True, indent=2) == json.dumps(content, sort_keys=True, indent=2)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_are_none_are_read_as_null_or_refused(text: str) -> None:
    assert loads(f'{{"score": {text}, "rest": 1.5}}') == {"score": None, "rest": 1.5}
    with pytest.raises(ValueError, match="no finite number"):
        loads_finite(f'{{"score": {text}}}')


@pytest.mark.parametrize("read", [loads, loads_finite])
def test_hostile_depth_is_an_error_like_any_other(read: Any) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        read("[" * 100_000)
