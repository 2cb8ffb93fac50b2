"""What people type as options, as Hydra reads it, and options as we print them for people to type.

Hydra has a language of its own for values. Options whose metadata say `text` are not written in it: prompts and other
free text are taken as typed, without quotes, with commas, colons, `${` and `???`; of lists of text, one text needs no
brackets. Options that say `path` may begin with `~`, the home folder. Keys of dictionaries may be quoted.
"""

import dataclasses
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from enum import EnumMeta
from typing import Any, TypeVar, cast, get_args, get_origin
from urllib import parse

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString, Sweep
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict

from conf.errors import UserError

TEXT = {"text": True}  # metadata of options that are taken as typed
PATH = {"path": True}  # metadata of options that name files or folders: their values, or the keys of a dictionary
HYDRA_PATHS = ("hydra.sweep.dir", "hydra.run.dir")
ENCODED = re.compile(r"\$\{as_typed:[\w%.-]*\}")  # how text that OmegaConf would read travels through it
KEY_MARK = "as_typed%3A"  # before keys that Hydra's grammar does not know
PLAIN_KEY = re.compile(r"(?:[\w/\-+.$%*@?| ]|\\[\\()\[\]{}:=, ])+", re.ASCII)
ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")
QUOTED = re.compile(r"""(['"])(?:(?!\1)[^\\]|\\.)*\1""", re.DOTALL)
SIMPLE = re.compile(r"(?!(?:null|true|false|inf|nan)$)[a-z_/][\w/.@%+-]*|0|[1-9]\d*", re.ASCII | re.IGNORECASE)
BRACKETS = {"[": "]", "{": "}", "(": ")"}
Config = TypeVar("Config")
UNSAID = "\u2060"  # keeps the text "???" from being a value that is missing


def as_typed(encoded: str) -> str:
    """The resolver of `ENCODED`."""
    text = parse.unquote(encoded)
    return text + UNSAID if text == "???" else text


def expanded(path: str) -> str:
    """A path whose `~` is the home folder."""
    return os.path.expanduser(path) if path.startswith("~") else path


OmegaConf.register_new_resolver("as_typed", as_typed, replace=True)
OmegaConf.register_new_resolver("expanded", expanded, replace=True)


def a_path(default: Any = MISSING) -> Any:
    """An option that names a file or a folder."""
    return dataclasses.field(default=default, metadata=PATH)


def a_text(default: Any) -> Any:
    """An option that is taken as typed."""
    return dataclasses.field(default=default, metadata=TEXT)


def argument(name: str, value: object) -> str:
    """NAME=VALUE to be copied into a shell, from which Hydra reads the value back."""
    text = str(value)
    return shlex.quote(f"{name}={text if SIMPLE.fullmatch(text) else quoted(text, Quote.double)}")


def quoted(text: str, quote: Quote = Quote.single) -> str:
    """A text that Hydra reads back as it is."""
    return QuotedString(encoded(text), quote).with_quotes()


def encoded(text: str) -> str:
    """A text that OmegaConf takes for no syntax of its own."""
    return f"${{as_typed:{_percent(text)}}}" if "${" in text or text == "???" else text


def literally(plain: Any) -> Any:
    """Plain values whose texts OmegaConf gives back as they are."""
    if isinstance(plain, Mapping):
        return {key: literally(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [literally(value) for value in plain]
    return encoded(plain) if isinstance(plain, str) else plain


def _percent(text: str) -> str:
    return parse.quote(text, safe="").replace("~", "%7E")


def readable(override: str, schema: type) -> str:
    """An override as Hydra reads it."""
    name, equals, value = override.partition("=")
    option = option_of(schema, name.lstrip("+"))
    if not equals or name.startswith("~"):
        return override
    if option is not None and option.metadata.get("path") and "\n" in value:
        raise UserError(f"{name}: {value!r} holds a line break; name a file or folder without one")
    if name in HYDRA_PATHS:
        return f"{name}={_paths(value)}"
    if option is None:
        return whole_dictionary(override)
    holds_keys = get_origin(option.type) is dict or section_of(option) is not None
    read = f"{name}={_value(option, value)}"
    return whole_dictionary(read) if holds_keys or not value.startswith("{") else read


def option_of(schema: Any, name: str) -> dataclasses.Field | None:
    """The declaration of an option, by its dotted name."""
    found = None
    for part in name.split("."):
        declared = {} if schema is None else {field.name: field for field in dataclasses.fields(schema)}
        if (found := declared.get(part)) is None:
            return None
        schema = section_of(found)
    return found


def section_of(option: dataclasses.Field) -> Any:
    """The dataclass of an option that is a group of options, None of others."""
    kinds = (option.type, *get_args(option.type)) if get_origin(option.type) not in (list, dict) else ()
    return next(filter(dataclasses.is_dataclass, kinds), None)


def _value(option: dataclasses.Field, raw: str) -> str:
    """What stands behind `=` or in a dictionary, as Hydra reads it; several values for a sweep stay several."""
    kind, text = get_origin(option.type), option.metadata.get("text")
    members = split(raw, ",")
    if kind is list and text:
        if all(map(_bracketed, members)):
            return ",".join(map(_list_of_text, members))
        if all(map(_is_quoted, members)):
            return ",".join(f"[{_kept(member)}]" for member in members)
        return f"[{quoted(raw)}]" if raw else "[]"
    if text:
        if raw == "" or (raw == "null" and type(None) in get_args(option.type)):
            return raw
        if all(map(_is_quoted, members)):
            return ",".join(_kept(member) for member in members)
        return quoted(raw)
    if kind is list:
        (element,) = get_args(option.type)
        if dataclasses.is_dataclass(element) and _bracketed(raw):
            return f"[{','.join(_dictionary(element, member) for member in split(raw[1:-1], ','))}]"
        return f"[{raw}]" if _is_one_value(raw) else raw
    if kind is dict or section_of(option) is not None:
        return ",".join(_dictionary(section_of(option), member) for member in members)
    return _paths(raw) if option.metadata.get("path") else raw


def _kept(literal: str) -> str:
    """A quoted text, changed only where OmegaConf would read something into it."""
    text = unquoted(literal)
    return quoted(text) if encoded(text) != text and not ENCODED.fullmatch(text) else literal


def _list_of_text(raw: str) -> str:
    inner = raw[1:-1].strip()
    elements = [element.strip() for element in split(inner, ",")] if inner else []
    texts = [_kept(e) if _is_quoted(e) else quoted(ESCAPED.sub(r"\1", e)) for e in elements]
    return f"[{','.join(texts)}]"


def _dictionary(section: Any, raw: str) -> str:
    """A dictionary of options, or where these are no section of anything; raw where it needs no other form."""
    pairs, changed, inner = [], False, raw.strip()
    if not inner.startswith("{") or not inner.endswith("}") or _closes(inner) != len(inner) - 1:
        return raw
    for pair in split(inner[1:-1], ","):
        parts = split(pair, ":")
        if len(parts) < 2:
            return raw
        key, value = (parts[0], ":".join(parts[1:])) if section else (":".join(parts[:-1]), parts[-1])
        key, value = key.strip(), value.strip()
        declared = option_of(section, key) if section else None
        new_key = key if section else _key(key)
        new_value = value if declared is None else _value(declared, value)
        changed |= (new_key, new_value) != (key, value)
        pairs.append(f"{new_key}: {new_value}")
    return f"{{{', '.join(pairs)}}}" if changed else raw


def _key(raw: str) -> str:
    if not _is_quoted(raw) and PLAIN_KEY.fullmatch(raw):
        return raw
    key = unquoted(raw) if _is_quoted(raw) else ESCAPED.sub(r"\1", raw)
    return KEY_MARK + _percent(key)


def _paths(raw: str) -> str:
    """Paths with the home folder in place of `~`, which Hydra's grammar does not know."""
    if "~" not in raw:
        return raw
    members = split(raw, ",")
    paths = [unquoted(member) if _is_quoted(member) else member for member in members]
    home = [quoted(expanded(path)) if path.startswith("~") else "" for path in paths]
    return ",".join(path or member for path, member in zip(home, members, strict=True))


def _is_one_value(raw: str) -> bool:
    """Whether a value is a single number, word or quoted text."""
    if not raw or raw.startswith(("[", "{", "${")):
        return False
    try:
        value = OverridesParser.create().parse_override(f"x={raw}")._value
    except HydraException:
        return False
    return value is not None and not isinstance(value, Sweep | list | dict)


def _is_quoted(raw: str) -> bool:
    return QUOTED.fullmatch(raw.strip()) is not None


def unquoted(literal: str) -> str:
    """The text of a quoted one, as Hydra reads it."""
    return str(OverridesParser.create().parse_override(f"x={literal.strip()}").value())


def _bracketed(raw: str) -> bool:
    """Whether a value is one list from its first to its last character."""
    return raw.startswith("[") and raw.endswith("]") and _closes(raw) == len(raw) - 1


def _closes(raw: str) -> int:
    """Where the bracket closes that a value begins with, -1: nowhere."""
    open_brackets: list[str] = []
    for position, character in _outside_quotes(raw):
        if character in BRACKETS:
            open_brackets.append(BRACKETS[character])
        elif open_brackets and character == open_brackets[-1]:
            open_brackets.pop()
            if not open_brackets:
                return position
    return -1


def form_of(option: dataclasses.Field) -> str:
    """How a value of an option is written."""
    kind = get_origin(option.type)
    if kind is dict or section_of(option) is not None:
        return "{KEY: VALUE}, and {'KEY': VALUE} where the key has special characters"
    if kind is list:
        return "a list: [VALUE,VALUE]"
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    for found in (option.type, *get_args(option.type)):
        if isinstance(found, EnumMeta):
            return f"one of {', '.join(found.__members__)}"
        if found in kinds:
            return kinds[found]
    return "of another form"


def split(raw: str, separator: str) -> list[str]:
    """Parts between separators, as far as these stand in no brackets and no quotes; the whole if a bracket is open."""
    parts, begin, depth = [], 0, 0
    for position, character in _outside_quotes(raw):
        depth += (character in BRACKETS) - (character in BRACKETS.values())
        if character == separator and depth == 0:
            parts.append(raw[begin:position])
            begin = position + 1
    return [*parts, raw[begin:]] if depth == 0 else [raw]


def _outside_quotes(raw: str) -> Iterator[tuple[int, str]]:
    """Characters with their places; a quote counts only where a value begins, and a backslash hides what follows."""
    position, begins = 0, True
    while position < len(raw):
        character = raw[position]
        literal = QUOTED.match(raw, position) if begins else None
        if literal is not None:
            position, begins = literal.end(), False
            continue
        if character == "\\":
            position, begins = position + 2, False
            continue
        yield position, character
        begins = character in "[{(,:" or (begins and character.isspace())
        position += 1


def whole_dictionary(override: str) -> str:
    """An override that Hydra takes although it cannot see its option in the schema.

    These are keys of a dictionary, as in `stream.mix={...}`, and all of a section that is absent by default, as in
    `conditions.boxes.most=8`: they are handed over as the value of the option that begins their name.
    """
    dictionary = re.match(r"([A-Za-z_]\w*)\.?([\w.]*)=(\{.*)", override, re.DOTALL)
    absent = re.match(r"(conditions)\.(\w+\.[\w.]+)=(.*)", override, re.DOTALL)
    if (found := dictionary or absent) is None:
        return override
    first, rest, value = found.groups()
    members = split(value, ",") if dictionary else [value]
    for name in reversed(rest.split(".") if rest else []):
        members = [f"{{{name}: {member}}}" for member in members]
    return f"++{first}={','.join(members)}"


def with_typed_keys(node: DictConfig, schema: Any) -> None:
    """Give dictionaries of a composed configuration the keys that were typed."""
    for option in dataclasses.fields(schema):
        child = node._get_node(option.name)
        if not isinstance(child, DictConfig) or child._is_none() or child._is_missing() or child._is_interpolation():
            continue
        if (section := section_of(option)) is not None:
            with_typed_keys(child, section)
        keys = [str(key) for key in child]
        if any(key.startswith(KEY_MARK) for key in keys):
            with open_dict(child):
                for key in keys:  # all of them, which keeps their order
                    value = child.pop(key)
                    child[parse.unquote(key.removeprefix(KEY_MARK)) if key.startswith(KEY_MARK) else key] = value


def finished(cfg: Config) -> Config:
    """A configuration object whose paths are expanded and whose texts are as typed.

    Raises:
        UserError: a path is empty, as that of a shell's unset variable; it would be the working folder, or the root.
    """
    for option in dataclasses.fields(cast(Any, cfg)):
        value = getattr(cfg, option.name)
        if dataclasses.is_dataclass(value):
            finished(value)
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            for member in value:
                finished(member)
        elif option.metadata.get("path") and value == "":
            raise UserError(f"{option.name}=: is empty; name a file or folder, '.' for the one you are in")
        elif option.metadata.get("text") or option.metadata.get("path"):
            setattr(cfg, option.name, _finished(value, option.metadata))
    return cfg


def _finished(value: Any, metadata: Any) -> Any:
    if isinstance(value, list):
        return [_finished(member, metadata) for member in value]
    if isinstance(value, dict):
        return {_finished(key, metadata): member for key, member in value.items()}
    if not isinstance(value, str):
        return value
    text = "???" if value == "???" + UNSAID else value
    return expanded(text) if metadata.get("path") else text
