"""What `--help` shows: the command's purpose and examples, its groups, and every option with type, default and meaning.

The meaning of an option is the comment behind it in the schema's source, so that nobody writes it twice.
"""

import ast
import dataclasses
import functools
import inspect
import io
import sys
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import EnumMeta
from typing import Any, get_args, get_origin

from omegaconf import OmegaConf
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from conf.errors import UserError, choices
from conf.overrides import section_of

SIMPLE = {int: "int", float: "float", bool: "bool", str: "text", Any: "any"}
MAIN = "options"  # what `--help SECTION` calls those that stand in no section


@dataclass(frozen=True, slots=True)
class Section:
    """Options that share a prefix."""

    name: str  # dotted; empty at the top
    title: str  # what the section is
    schema: Any
    values: Mapping[str, Any]  # by option


def show_help(
    schema: type,
    values: Mapping[str, Any],
    groups: Mapping[str, Sequence[str]],
    wanted: str | None = None,
    stages: Mapping[str, type] | None = None,
    console: Console | None = None,
) -> None:
    """Print the help of a command, or one section of it.

    Args:
        schema: dataclass of its options.
        values: what they are when nothing else is said, as plain values that may refer to each other.
        groups: names of the files to choose from, by group.
        wanted: a section with all below it, or a group.
        stages: of the pipeline: the commands behind it.
        console: where to; default: the terminal.

    Raises:
        UserError: no such section.

    """
    console, every = console or Console(highlight=False), list(sections(schema, values))
    chosen = [s for s in every if wanted in (None, s.name or MAIN) or s.name.startswith(f"{wanted}.")]
    known = dict.fromkeys([MAIN, *(s.name for s in every if s.name and "." not in s.name), *groups, *(stages or ())])
    if wanted is not None and not chosen and wanted not in groups:
        raise UserError(f"--help {wanted}: no such section; {choices(wanted, known)}")
    if wanted is None:
        _show_purpose(schema, groups, stages or {}, console)
    if wanted is not None and wanted in groups:
        console.print(_titled(f"{wanted}=NAME", ""), Text(", ".join(groups[wanted])), sep="\n")
    for section in chosen:
        console.print("", _titled(section.name or MAIN, section.title), _table(section), sep="\n")


def _show_purpose(
    schema: type, groups: Mapping[str, Sequence[str]], stages: Mapping[str, type], console: Console
) -> None:
    console.print(Text(purpose(schema), "bold"), "", sep="\n")
    for line in examples(schema):
        console.print(Padding(Text(line), (0, 0, 0, 2)))
    for title, rows in (
        ("groups: GROUP=NAME takes a file", {name: ", ".join(names) for name, names in groups.items()}),
        ("stages: STAGE.option=value is for one; --help STAGE", {name: purpose(run) for name, run in stages.items()}),
    ):
        if rows:
            grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
            grid.add_column(style="bold", no_wrap=True)
            grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
            for name, text in rows.items():
                grid.add_row(Text(f"  {name}"), Text(text))
            console.print("", _titled(title, ""), grid, sep="\n")
    console.print("", Text("OPTION=VALUE sets one of those below; --help SECTION shows one section"), sep="\n")


def purpose(schema: type) -> str:
    """First line of a command's docstring."""
    return inspect.cleandoc(schema.__doc__ or "").splitlines()[0].replace("`", "")


def examples(schema: type) -> list[str]:
    """Lines of a command's docstring that are to be typed."""
    lines = (line.strip() for line in (schema.__doc__ or "").splitlines())
    return [line for line in lines if line.startswith(("python ", "torchrun "))]


def sections(schema: Any, values: Mapping[str, Any], name: str = "") -> Iterator[Section]:
    """A section and all below it; of one that is null, or of which there are several, the schema's own values."""
    yield Section(name, "" if name == "" else purpose(schema), schema, values)
    for option in dataclasses.fields(schema):
        elements = [kind for kind in get_args(option.type) if dataclasses.is_dataclass(kind)]
        below = section_of(option) or (elements[0] if elements else None)
        if below is not None:
            own = values.get(option.name)
            plain = own if isinstance(own, dict) else OmegaConf.to_container(OmegaConf.structured(below))
            yield from sections(below, plain, f"{name}.{option.name}".removeprefix("."))  # type: ignore[arg-type]


def _titled(name: str, title: str) -> Text:
    return Text.assemble((name, "bold underline"), f"  {title}" if title else "")


def _table(section: Section) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(style="cyan", max_width=16, overflow="fold")
    table.add_column(style="green", max_width=22, overflow="fold")
    table.add_column(overflow="fold")
    for option in dataclasses.fields(section.schema):
        value = section.values.get(option.name)
        if not isinstance(value, dict) or section_of(option) is None:  # a section that is there has its own table
            cells = option.name, kind_of(option), shown(value), meaning(section.schema, option)
            table.add_row(*map(Text, cells))
    return table


def kind_of(option: dataclasses.Field) -> str:
    """What values an option takes, in a few words."""
    return "path" if option.metadata.get("path") and option.type in (str, str | None) else _kind(option.type)


def _kind(kind: Any) -> str:
    if dataclasses.is_dataclass(kind):
        return "section"
    if isinstance(kind, EnumMeta):
        return ", ".join(kind.__members__)
    members = get_args(kind)
    if get_origin(kind) is list:
        return f"list: {_kind(members[0])}"
    if get_origin(kind) is dict:
        return f"{{{_kind(members[0])}: {_kind(members[1])}}}"
    if members:
        return " or ".join("null" if member is type(None) else _kind(member) for member in members)
    return SIMPLE[kind]


def shown(value: Any) -> str:
    """A value as a command line has it, between quotes where it has spaces."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown(member)}' for key, member in value.items())}}}"
    if isinstance(value, str):
        return {"": '""', "???": "(needed)"}.get(value, value)
    return (
        "null"
        if value is None
        else str(value).lower()
        if isinstance(value, bool)
        else str(getattr(value, "name", value))
    )


def meaning(schema: Any, option: dataclasses.Field) -> str:
    """The comment behind an option, of its class or a base; else of one that is called and written alike elsewhere."""
    declared = [comments(owner.__module__).get((owner.__name__, option.name)) for owner in schema.__mro__[:-1]]
    (kind, text), *_ = (found for found in declared if found is not None)
    modules = [name for name in sys.modules if name.startswith("conf.schema.")]
    every = (found for module in modules for (_, name), found in comments(module).items() if name == option.name)
    return text or next((other for written, other in every if other and written == kind), "")


@functools.cache
def comments(module: str) -> dict[tuple[str, str], tuple[str, str]]:
    """Type and comment of each option of a module's dataclasses as they are written, by class and option."""
    source = inspect.getsource(sys.modules[module])
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    behind = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    for owner in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for option in owner.body:
            if isinstance(option, ast.AnnAssign) and isinstance(option.target, ast.Name):
                lines = range(option.lineno, (option.end_lineno or option.lineno) + 1)
                text = " ".join(behind[line] for line in lines if line in behind)
                found[owner.name, option.target.id] = ast.unparse(option.annotation), text
    return found
