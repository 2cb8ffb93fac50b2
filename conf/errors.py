"""The one error that people are meant to read."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that a person can act on: one line that names the option and the remedy."""


def choices(wrong: str, known: Iterable[str]) -> str:
    """What to say of a name that is none of those known: these, the nearest first."""
    names = list(dict.fromkeys(known))
    folded = {name.lower(): name for name in names}
    near = [folded[name] for name in difflib.get_close_matches(wrong.lower(), folded, n=3, cutoff=0.7)]
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"choose one of {', '.join([*near, *(name for name in names if name not in near)])}{hint}"
