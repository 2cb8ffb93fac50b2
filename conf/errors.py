"""The one error that people are meant to read."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that a person can act on: one line that names the option and the remedy."""


def first_line(error: BaseException) -> str:
    """What an error says, without the lines that libraries add for those who read their code."""
    return str(error).strip().split("\n")[0]


def choices(wrong: str, known: Iterable[str]) -> str:
    """What to say of a name that is none of those known: these, the nearest first."""
    names = list(known)
    near = nearest(wrong, names)
    listed = ", ".join([*near, *(name for name in names if name not in near)])
    return f"choose one of {listed}{did_you_mean(wrong, names)}"


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """The end of a line about a name that is none of those known; empty where none is near."""
    return "".join(f"; did you mean {name}?" for name in nearest(wrong, known)[:1])


def nearest(wrong: str, known: Iterable[str]) -> list[str]:
    """Names that are written much like another, whatever the case of their letters."""
    folded = {name.lower(): name for name in known}
    return [folded[name] for name in difflib.get_close_matches(wrong.lower(), folded, n=3, cutoff=0.7)]
