"""From a command line to a checked configuration object: what every entry script shares.

    @entry("train_unet", UNetRun)
    def main(cfg: UNetRun) -> float: ...

What `main` returns is the objective of the command, of which less is better; a command may have none. A misspelt
option, a wrong type or an impossible combination ends the command with one line and exit code 2, before torch is
imported. So does every `UserError` and every operating-system error later on. `-m` starts a sweep (`conf.sweep`), after
which `after_sweep(its folder, the id of this start, the configuration without what was swept)` is called.
"""

import dataclasses
import difflib
import functools
import hashlib
import inspect
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import Enum, EnumMeta
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from conf.ending import fail, leave, tell
from conf.errors import UserError, choices, did_you_mean, first_line
from conf.experiments import STAGES, register_experiments
from conf.help import show_help
from conf.overrides import UNSAID, argument, finished, form_of, option_of, readable, section_of, with_typed_keys
from conf.process import wait_briefly
from conf.schema import COMMANDS, UNetRuntimeConfig
from conf.slurm_launcher import check_launcher, prepare_launcher
from conf.sweep import Start, print_members, run_member

CONF = Path(__file__).parent
Run = TypeVar("Run")
AfterSweep = Callable[[Path, str, DictConfig], None]
LONGEST_NAME = 200  # bytes; file systems allow 255, of which temporary names need some


def entry(
    config_name: str, schema: type[Run], after_sweep: AfterSweep | None = None
) -> Callable[[Callable[[Run], Any]], Callable[[], None]]:
    """Wrap `main(cfg)` into a Hydra command whose primary configuration is `conf/{config_name}.yaml`."""

    def wrap(main: Callable[[Run], Any]) -> Callable[[], None]:
        program, sweep = str(Path(inspect.getfile(main)).resolve()), Start(os.urandom(8).hex())

        @functools.wraps(main)
        def task(composed: DictConfig) -> Any:
            try:
                if HydraConfig.get().mode is RunMode.MULTIRUN:
                    return run_member(program, composed, sweep)
                objective = main(to_object(composed))
                if os.environ.get("RANK", "0") == "0":
                    tell(objective=objective, diverged=objective is not None and not math.isfinite(objective))
                return objective
            except (UserError, OSError) as error:
                fail(error)

        @functools.wraps(main)
        def command() -> None:
            wait_briefly()
            flags, overrides = ([a for a in sys.argv[1:] if a.startswith("-") is flag] for flag in (True, False))
            start = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)
            try:
                require_text(sys.argv[1:])
                sys.argv[1:] = [readable(given, schema) for given in sys.argv[1:]]
                register(config_name, schema, overrides)
                prepare_launcher(overrides)
                if {"-h", "--help"} & set(flags):
                    return explain_command(config_name, schema, overrides)
                if len(flags) > 1 and {"-m", "--multirun"} & set(flags):
                    raise UserError(f"{' '.join(flags)}: a sweep takes no other flag; leave out -m or the rest")
                if flags in (["-m"], ["--multirun"]):
                    composed = start_sweep(start, config_name, schema, overrides, sweep)
                    status = print_members(sweep.folder, sweep.id)
                    if after_sweep is not None:
                        after_sweep(sweep.folder, sweep.id, composed)
                    sys.exit(status)
                if not flags:  # such as --help
                    compose(config_name, schema, overrides)
            except (UserError, OSError) as error:
                fail(error)
            start()
            if "RANK" in os.environ:
                leave(0)

        return command

    return wrap


def explain_command(command: str, schema: type, arguments: Sequence[str]) -> None:
    """Print the help of a command, with the values that its options have by these arguments; raises UserError.

    The first argument without `=` names the only section to show; of the pipeline it may be a stage.
    """
    words = [argument for argument in arguments if "=" not in argument]
    stages = {stage: name for name, stage in STAGES.items() if name != "plan"} if command == "pipeline" else {}
    if words and words[0] in stages:
        command = stages[words.pop(0)]
        schema, stages = COMMANDS[command], {}
    with composing(command, schema, [argument for argument in arguments if "=" in argument]) as read:
        composed = hydra.compose(command, read, return_hydra_config=True)
        chosen = [group for group in composed.hydra.runtime.choices if not group.startswith("hydra/")]
        told = ["conditions"] if option_of(schema, "conditions") else []  # a group that is added where one wants it
        list_group = GlobalHydra.instance().config_loader().get_group_options
        groups = {group: list_group(group) for group in chosen} | {f"+{group}": list_group(group) for group in told}
    values: Any = OmegaConf.to_container(composed, resolve=False, enum_to_str=True)
    runs = {stage: COMMANDS[name] for stage, name in stages.items()}
    show_help(schema, values, groups, words[0] if words else None, runs)


def require_text(arguments: Sequence[str]) -> None:
    """Raise UserError where bytes were typed that are no text: no file that we write could name them."""
    for typed in arguments:
        try:
            typed.encode()
        except UnicodeEncodeError:
            raise UserError(f"{typed!a}: is no UTF-8 text; name files and write texts in UTF-8") from None


def start_sweep(
    start: Callable[[], Any], config_name: str, schema: type, overrides: list[str], sweep: Start
) -> DictConfig:
    """Run a sweep to its end, in the folder that it notes; returns the configuration without what was swept.

    Raises:
        UserError: an option or the launcher is wrong; no member was started then.

    """
    if "RANK" in os.environ:
        raise UserError("-m under torchrun: start a sweep with python; NPROC=8 gives each member 8 processes")
    register(config_name, schema, overrides)
    read = [readable(override, schema) for override in overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through that it would print by itself
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            parsed = OverridesParser.create().parse_overrides(read)
            fixed = [o.input_line for o in parsed if not o.is_sweep_override() and o.input_line]
            composed = hydra.compose(config_name, fixed, return_hydra_config=True)
            sweep.folder = Path(composed.hydra.sweep.dir).absolute()
        check_launcher(composed.hydra.launcher)
        start()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, schema, dict(zip(read, overrides, strict=True)))) from error
    return composed


def register(config_name: str, schema: type, overrides: Sequence[str]) -> None:
    """Let `conf/{config_name}.yaml` start from its dataclass, know its experiments and name the members of a sweep."""
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema, provider="conf.schema")
    register_runtimes(schema)
    register_experiments(config_name, schema, overrides)


def register_runtimes(schema: type) -> None:
    """Store for Hydra what each file of `runtime/` says to a command, without the options that only others have.

    So one file serves all stages of a run. On a command line such an option is an error: there it was meant.
    """
    if (option := option_of(schema, "runtime")) is None:
        return
    own, known = ({o.name for o in dataclasses.fields(kind)} for kind in (section_of(option), UNetRuntimeConfig))
    for path in (CONF / "runtime").glob("*.yaml"):
        with suppress(YAMLError):  # Hydra reads it again and says what is wrong, if it is chosen
            node = {key: value for key, value in OmegaConf.load(path).items() if key in own or key not in known}
            ConfigStore.instance().store(group="runtime", name=path.stem, node=node)


def folder_name(overrides: str) -> str:
    """One folder for a member of a sweep, not one per slash in its paths, and no longer than a file system allows.

    Where two members get the same one, `conf.sweep.claim` tells them apart.
    """
    name = overrides.replace("/", "_").replace(UNSAID, "")
    name = name.replace("${", "$_")  # Hydra would look for what the braces name
    if len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(overrides.encode()).hexdigest()[:12]
    return f"{name.encode()[: LONGEST_NAME - 13].decode(errors='ignore')}-{digest}"


def compose(config_name: str, schema: type[Run], overrides: list[str]) -> Run:
    """The checked configuration that a command line gives; raises UserError."""
    with composing(config_name, schema, overrides) as read:
        composed = hydra.compose(config_name, read)
    return to_object(composed)


@contextmanager
def composing(config_name: str, schema: type, overrides: Sequence[str]) -> Iterator[list[str]]:
    """Hydra, ready to compose a command from the overrides as it reads them; its errors become one-line UserErrors."""
    register(config_name, schema, overrides)
    read = [readable(override, schema) for override in overrides]
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            yield read
    except Exception as error:  # Hydra has no one class for what it cannot read
        raise UserError(explain(error, schema, dict(zip(read, overrides, strict=True)))) from error


def to_object(composed: DictConfig) -> Any:
    """Dataclasses of a composed configuration; their own checks run here."""
    try:
        with_typed_keys(composed, OmegaConf.get_type(composed))
        made = finished(OmegaConf.to_object(composed))
        require_finite(OmegaConf.to_container(composed))  # comparisons let NaN pass
        return made
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        where = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{where}{first_line(error)}") from error
    except AttributeError as error:  # +name=value adds what no schema declares
        known = options(OmegaConf.structured(OmegaConf.get_type(composed)))
        added = [name for name in options(composed) if name not in known]
        raise UserError(no_option(added[0], known) if added else first_line(error)) from error


def require_finite(node: Any, name: str = "") -> None:
    """Refuse NaN and infinities anywhere in plain values; no option has a meaning for them."""
    if isinstance(node, float) and not math.isfinite(node):
        raise UserError(f"{name}={node}: must be a finite number")
    parts = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in parts:
        require_finite(value, f"{name}.{key}".removeprefix("."))


def to_plain(cfg: Any) -> dict[str, Any]:
    """The configuration as plain values, for records."""
    return {option.name: _plain(getattr(cfg, option.name)) for option in dataclasses.fields(cfg)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_plain(value)
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_plain(member) for member in value]
    return value.name if isinstance(value, Enum) else value


def explain(error: Exception, schema: type, typed: Mapping[str, str]) -> str:
    """One line of a Hydra error; a misspelt option gets its nearest neighbours.

    Args:
        error: what Hydra raised.
        schema: dataclass of the options.
        typed: what was typed for each override that Hydra read.

    """
    line = first_line(error)
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: no YAML, {error.problem}"
    if isinstance(error, OverrideParseException):
        override = error.override.removeprefix("++")
        name = override.partition("=")[0]
        written, equals, value = typed.get(error.override, "").partition("=")
        option = option_of(schema, written)
        if equals and option is not None and get_origin(option.type) is dict:
            return f"cannot read '{typed[error.override]}': {written} is {form_of(option)}"
        quoted = f"'{name}=\"VALUE\"' where it has special characters"
        here = f": {argument(written, value)}" if option is not None and option.type in (str, str | None) else ""
        return f"cannot read '{override}': write {name}=VALUE, and {quoted}{here}"
    if "Ambiguous value for argument" in line:
        return several(next((typed[override] for override in typed if f"'{override}'" in line), line), schema)
    cause = "" if error.__cause__ is None else first_line(error.__cause__)
    if "Error merging override" in line and " not in " in cause:
        return no_option(error.__cause__.full_key, options(OmegaConf.structured(schema)))  # type: ignore[union-attr]
    if line.startswith("Could not override") and " not in " in cause:
        return no_option(line.split("'")[1], options(OmegaConf.structured(schema)))
    if "No match in the defaults list" in line:
        return no_option(line.split("'")[1], options(OmegaConf.structured(schema)))
    if "Available options in" in str(error):
        listed = str(error).split("Available options in")[1].split("Config search path")[0]
        what = line.split(": ", 1)[-1]
        wrong = what.split("'")[1].rpartition("/")[2]
        known = listed.split()[1:]
        return f"{what}: choose one of {', '.join(known)}{did_you_mean(wrong, known)}"
    if line.endswith("raised while composing config:"):  # a file that does not fit: which, and why
        file, reason = line.split("'")[1], str(error).splitlines()[1]
        return f"{file} is not for this command: {reason}"
    if line.startswith("Error merging override") and (key := key_of(error.__cause__, schema)):
        merged = line.removeprefix("Error merging override ")
        swept = merged.removesuffix(f": {cause}").removeprefix("++")
        given = next((typed[override] for override in typed if merged.startswith(override)), swept)
        return f"{given}: {wrong_value(cause, key, schema)}"
    return f"{line}: {cause}" if cause not in line else line


def wrong_value(cause: str, key: str, schema: type) -> str:
    """Why an option cannot have a value, and how one is written."""
    option = option_of(schema, key)
    assert option is not None
    chosen = re.match("Invalid value '(.*)', expected one of", cause)
    enum = next((kind for kind in (option.type, *get_args(option.type)) if isinstance(kind, EnumMeta)), None)
    if chosen is not None and enum is not None:
        return choices(chosen[1], enum.__members__)
    return f"{cause.rstrip('.')}; {key} is {form_of(option)}"


def key_of(error: BaseException | None, schema: type) -> str:
    """The option that an error of OmegaConf is about, the dictionary where it is one of its keys; empty if unknown."""
    key = re.sub(r"\[.*", "", str(getattr(error, "full_key", None) or ""))
    while key and option_of(schema, key) is None:
        key = key.rpartition(".")[0]
    return key


def several(override: str, schema: type) -> str:
    """What to say of several values where no sweep was started."""
    name, _, value = override.partition("=")
    option = option_of(schema, name.lstrip("+"))
    kinds = [] if option is None else [get_origin(option.type), option.type, *get_args(option.type)]
    if list in kinds and not value.startswith("["):
        one = f"write {shlex.quote(f'{name}=[{value}]')} for a list"
    elif str in kinds and not {list, dict} & set(kinds):
        one = f"write {argument(name, value)} for one"
    else:
        one = "give one"
    return f"{override}: several values: {one}, or start a sweep over them with -m"


def no_option(name: str, known: list[str]) -> str:
    """What to say of a name that no schema declares."""
    near = [o for o in known if o.endswith(f".{name}")]
    if not near and (others := [command for command, schema in COMMANDS.items() if option_of(schema, name)]):
        return (
            f"no option '{name}': this command does not read it; {', '.join(others)} {'do' if others[1:] else 'does'}"
        )
    near = near or difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "--help lists the options"
    return f"no option '{name}': {hint}"


def options(node: DictConfig, prefix: str = "") -> list[str]:
    """Dotted names of all options below a schema."""
    names = []
    for key in map(str, node):
        names.append(prefix + key)
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            names += options(child, prefix + key + ".")
    return names
