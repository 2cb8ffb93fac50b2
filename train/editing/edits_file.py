"""What `train/edit.py` is asked for: one edit of the command line, or a file of them."""

from dataclasses import MISSING, fields
from enum import Enum
from typing import Any

from conf.errors import UserError, choices, did_you_mean
from conf.overrides import finished
from conf.schema import Edit, EditRun
from conf.schema.editing import EditStrength, numbers_of, phrases_of, windows_of
from data.text_files import json_object, lines_of

STRENGTH = {option.name: option for option in fields(EditStrength)}
OPTIONS = [option.name for option in fields(Edit)]


def read_edits(cfg: EditRun) -> list[Edit]:
    """All edits, in order; what a line of the file leaves out is as on the command line.

    Raises:
        UserError: no file, or a line of it that is no edit.
    """
    common = {name: getattr(cfg, name) for name in STRENGTH}
    common |= {name: getattr(cfg, name) for name in ("edit", "image", "weights", "during", "until", "blend")}
    if cfg.edits_file is None:
        return [edit_of(common | {"prompt": cfg.prompt})]
    path = cfg.edits_file
    lines = lines_of(path, "edits_file", "write one JSON object a line")
    edits = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                edits.append(edit_of(common | options_of(line)))
            except UserError as error:
                raise UserError(f"edits_file={path}, line {number}: {error}") from None
    if not edits:
        raise UserError(f"edits_file={path}: holds no edit; write one JSON object a line")
    return edits


def options_of(line: str) -> dict[str, Any]:
    """The options in a line."""
    found = json_object(line, 'write {"prompt": "...", "edit": "..."}, each on one line')
    unknown = [name for name in found if name not in OPTIONS]
    if unknown:
        near = did_you_mean(unknown[0], OPTIONS)
        raise UserError(f"no option '{unknown[0]}': choose among {', '.join(OPTIONS)}{near}")
    if not isinstance(found.get("prompt"), str):
        raise UserError('names no prompt; write {"prompt": "...", "edit": "..."}')
    return found


def edit_of(options: dict[str, Any]) -> Edit:
    """An edit of plain values, whose words may be written as on the command line."""
    made = dict(options)
    for name in ("weights", "until"):
        if isinstance(made[name], str):
            made[name] = numbers_of(name, made[name])
    if isinstance(made["during"], str):
        made["during"] = windows_of("during", made["during"])
    if isinstance(made["blend"], str):
        made["blend"] = phrases_of(made["blend"])
    for name, option in STRENGTH.items():
        made[name] = checked(name, made[name], option.default)
    sound = {
        "edit": made["edit"] is None or isinstance(made["edit"], str),
        "image": made["image"] is None or isinstance(made["image"], str),
        "weights": is_numbers(made["weights"]),
        "until": is_numbers(made["until"]),
        "during": is_windows(made["during"]),
        "blend": isinstance(made["blend"], list) and all(isinstance(word, str) for word in made["blend"]),
    }
    for name, right in sound.items():
        if not right:
            raise UserError(f"{name}={made[name]}: of another type than on the command line")
    made["during"] = {word: (begin, end) for word, (begin, end) in made["during"].items()}
    return finished(Edit(**made))


def checked(name: str, value: Any, default: Any) -> Any:
    """A plain value as the type of its default."""
    assert default is not MISSING
    if isinstance(default, Enum) and isinstance(value, str):
        known = {choice.value: choice for choice in type(default)}
        if value not in known:
            raise UserError(f"{name}={value}: {choices(value, known)}")
        return known[value]
    right = isinstance(value, type(default)) or (isinstance(default, float) and type(value) is int)
    if not right:
        raise UserError(f"{name}={value}: of another type than on the command line")
    return value


def is_windows(value: Any) -> bool:
    """Whether it gives words a begin and an end."""
    pairs = list(value.values()) if isinstance(value, dict) else [None]
    return all(
        isinstance(pair, list | tuple) and [type(share) in (int, float) for share in pair] == [True] * 2
        for pair in pairs
    )


def is_numbers(value: Any) -> bool:
    """Whether it gives words a number."""
    return isinstance(value, dict) and all(type(number) in (int, float) for number in value.values())
