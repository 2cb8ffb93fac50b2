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
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.ending import fail, first_line, leave, tell
from conf.errors import UserError
from conf.slurm_launcher import check_launcher, prepare_launcher
from conf.sweep import report, run_member

CONF = Path(__file__).parent
Run = TypeVar("Run")
AfterSweep = Callable[[Path, str, DictConfig], None]
LONGEST_NAME = 200  # bytes; file systems allow 255, of which temporary names need some


def entry(
    config_name: str, schema: type[Run], after_sweep: AfterSweep | None = None
) -> Callable[[Callable[[Run], Any]], Callable[[], None]]:
    """Wrap `main(cfg)` into a Hydra command whose primary configuration is `conf/{config_name}.yaml`."""
    register(config_name, schema)

    def wrap(main: Callable[[Run], Any]) -> Callable[[], None]:
        program, sweep = str(Path(inspect.getfile(main)).resolve()), os.urandom(8).hex()

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
            sys.argv[1:] = [readable(argument, schema) for argument in sys.argv[1:]]
            flags, overrides = ([a for a in sys.argv[1:] if a.startswith("-") is flag] for flag in (True, False))
            start = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)
            try:
                prepare_launcher(overrides)
                if flags in (["-m"], ["--multirun"]):
                    folder, composed = start_sweep(start, config_name, schema, overrides)
                    status = report(folder, sweep)
                    if after_sweep is not None:
                        after_sweep(folder, sweep, composed)
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


def start_sweep(
    start: Callable[[], Any], config_name: str, schema: type, overrides: list[str]
) -> tuple[Path, DictConfig]:
    """Run a sweep to its end; returns its folder and the configuration without what was swept.

    Raises:
        UserError: an option or the launcher is wrong; no member was started then.

    """
    if "RANK" in os.environ:
        raise UserError("-m under torchrun: start a sweep with python; NPROC=8 gives each member 8 processes")
    register(config_name, schema)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through that it would print by itself
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            parsed = OverridesParser.create().parse_overrides(overrides)
            fixed = [o.input_line for o in parsed if not o.is_sweep_override() and o.input_line]
            composed = hydra.compose(config_name, fixed, return_hydra_config=True)
            folder = Path(composed.hydra.sweep.dir)
        check_launcher(composed.hydra.launcher)
        start()
    except HydraException as error:
        raise UserError(explain(error, schema)) from error
    return folder, composed


def register(config_name: str, schema: type) -> None:
    """Let `conf/{config_name}.yaml` start from its dataclass and name the members of a sweep."""
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema, provider="conf.schema")


def folder_name(overrides: str) -> str:
    """One folder for a member of a sweep, not one per slash in its paths, and no longer than a file system allows."""
    name = overrides.replace("/", "_")
    if len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(overrides.encode()).hexdigest()[:12]
    return f"{name.encode()[: LONGEST_NAME - 13].decode(errors='ignore')}-{digest}"


def compose(config_name: str, schema: type[Run], overrides: list[str]) -> Run:
    """The checked configuration that a command line gives; raises UserError."""
    register(config_name, schema)
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return to_object(hydra.compose(config_name, [readable(override, schema) for override in overrides]))
    except HydraException as error:
        raise UserError(explain(error, schema)) from error


def readable(override: str, schema: type) -> str:
    """An override as Hydra reads it: one of free text needs no quotes, nor does a dictionary its declaration."""
    name, equals, value = override.partition("=")
    texts = [option.name for option in dataclasses.fields(schema) if option.metadata.get("text")]
    if name not in texts or not equals or value in ("", "null") or value[0] in "'\"":
        return whole_dictionary(override)
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"{name}='{escaped}'"


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
    for name in reversed(rest.split(".") if rest else []):
        value = f"{{{name}: {value}}}"
    return f"++{first}={value}"


def to_object(composed: DictConfig) -> Any:
    """Dataclasses of a composed configuration; their own checks run here."""
    try:
        made = OmegaConf.to_object(composed)
        require_finite(OmegaConf.to_container(composed))  # comparisons let NaN pass
        return made
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(first_line(error)) from error
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
    return OmegaConf.to_container(OmegaConf.structured(cfg), resolve=True, enum_to_str=True)  # type: ignore[return-value]


def explain(error: Exception, schema: type) -> str:
    """One line of a Hydra error; a misspelt option gets its nearest neighbours."""
    line = first_line(error)
    if isinstance(error, OverrideParseException):
        override = error.override.removeprefix("++")
        name = override.partition("=")[0]
        quoted = f"'{name}=\"VALUE\"' where it has special characters"
        return f"cannot read '{override}': write {name}=VALUE, and {quoted}"
    cause = "" if error.__cause__ is None else first_line(error.__cause__)
    if "Error merging override" in line and " not in " in cause:
        return no_option(error.__cause__.full_key, options(OmegaConf.structured(schema)))  # type: ignore[union-attr]
    if line.startswith("Could not override") and " not in " in cause:
        return no_option(line.split("'")[1], options(OmegaConf.structured(schema)))
    if "Available options in" in str(error):
        listed = str(error).split("Available options in")[1].split("Config search path")[0]
        return f"{line.split(': ', 1)[-1]}: choose one of {', '.join(listed.split()[1:])}"
    if line.endswith("raised while composing config:"):  # a file that does not fit: which, and why
        file, reason = line.split("'")[1], str(error).splitlines()[1]
        return f"{file} is not for this command: {reason}"
    return f"{line}: {cause}" if cause not in line else line


def no_option(name: str, known: list[str]) -> str:
    """What to say of a name that no schema declares."""
    near = [o for o in known if o.endswith(f".{name}")] or difflib.get_close_matches(name, known, n=3, cutoff=0.6)
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
