"""JSON as every program reads it: Python's own writes and reads NaN and infinities, which JSON does not have."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn


def dumps(content: Any, **layout: Any) -> str:
    """Valid JSON whatever the numbers are: what is not finite is null. `layout`: as json.dumps takes it."""
    try:
        return json.dumps(content, allow_nan=False, **layout)
    except ValueError:
        return json.dumps(_with_nulls(content), allow_nan=False, **layout)


def loads(text: str | bytes) -> Any:
    """Content of JSON from anywhere; null where others wrote NaN, an infinity, or a number too large to be one.

    Raises ValueError for what is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text, parse_constant=lambda name: None, parse_float=_finite_or_none)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def loads_finite(text: str | bytes, **hooks: Any) -> Any:
    """Content of JSON whose numbers all count, such as a network's description; raises ValueError for the others."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, **hooks)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file that a run keeps; empty where there is none, or it is torn."""
    try:
        found = loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _with_nulls(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _with_nulls(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_with_nulls(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _finite_or_none(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(digits)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no finite number")
