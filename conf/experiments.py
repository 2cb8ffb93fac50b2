"""Experiments: one file each, whose sections become what every command composes.

    conf/experiment/NAME.yaml
        begin_from: demo    another experiment, of which this one says only what differs; a list is replaced as a whole
        stages: [build, …]  those that train/pipeline.py runs
        all: {…}            for every command that has the option; of `sampling` those that draw take its options
        unet: {…}           for one command, after `all`; may begin with a defaults list as Hydra reads it

For the command that runs, an experiment becomes a node of Hydra's group `experiment`. Its file lies where Hydra looks
for groups, too, which is how Hydra knows all names; the node must be found before it: hence the plugin.
"""

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from conf import schema as schemas
from conf.errors import UserError
from conf.schema import DistillMethod, SamplingConfig

FOLDER = Path(__file__).parent / "experiment"
STAGES = {  # command → section, without which an experiment is not for it
    "build_shards": "build",
    "train_autoencoder": "autoencoder",
    "train_clip": "clip",
    "precompute_latents": "latents",
    "train_unet": "unet",
    "distill_unet": "distill",
    "plan": "unet",
    "sample": "sample",
    "evaluate": "evaluate",
}
NONE = "none"  # the options as they stand in the schema
OWN = ("begin_from", "stages", "all")  # keys of a file that are no command's section
OTHERS = ("edit", "evaluate_edits", "export", "average", "preview", "report", "dashboard", "playground")  # may have one


class ExperimentsFirst(SearchPathPlugin):
    """Lets Hydra find what is stored in memory before the files of the same name."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        # "schema" is what Hydra calls its own such source: from another one it would look for a second schema
        search_path.prepend("schema", "structured://", anchor="main")


def register_experiments(command: str, schema: type, overrides: Sequence[str]) -> None:
    """Store for Hydra what the experiments of a command line say to its command.

    Raises:
        UserError: one of them is not there, cannot be read, or has no section for this command.
    """
    Plugins.instance().register(ExperimentsFirst)
    for name in {NONE, *chosen(overrides)}:
        node = OmegaConf.create() if name == NONE else node_of(name, command, schema)
        ConfigStore.instance().store(group="experiment", name=name, node=node, package="_global_")


def names() -> list[str]:
    """All experiments that have a file."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def chosen(overrides: Sequence[str]) -> list[str]:
    """Experiments that a command line names, several in a sweep."""
    try:
        parsed = OverridesParser.create().parse_overrides([o for o in overrides if o.startswith("experiment=")])
    except OverrideParseException:  # told with the other options
        return []
    return [str(value) for o in parsed for value in (o.sweep_iterator() if o.is_sweep_override() else [o.value()])]


def node_of(name: str, command: str, schema: type) -> DictConfig:
    """What an experiment says to a command, for the top of its configuration; errors as of `register_experiments`."""
    sections = read_experiment(name)
    section = STAGES.get(command, command)
    if command in STAGES and section not in sections:
        has = ", ".join(str(known) for known in sections if known not in OWN)
        raise UserError(f"experiment={name} has no section '{section}', which this command reads; it has {has}")
    own = sections.get(section)
    if command == "pipeline":
        own = {"stages": sections.get("stages")}
    elif command == "plan" and is_of_a_student(sections):
        own = as_plan(sections, schema)
    merged = OmegaConf.merge({"name": name}, for_all(sections.get("all", OmegaConf.create()), schema), own or {})
    assert isinstance(merged, DictConfig)
    return merged


def is_of_a_student(sections: DictConfig) -> bool:
    """Whether an experiment distils a U-Net that another one trains."""
    stages = sections.get("stages", [])
    return "distill" in stages and "unet" not in stages


def as_plan(sections: DictConfig, schema: type) -> DictConfig:
    """What `train/plan.py` reads of a student: its training, of a network as its teacher's section describes it."""
    options = {option.name for option in dataclasses.fields(schema)} - {"output_dir"}  # a plan is no training's output
    student = OmegaConf.masked_copy(sections["distill"], sorted(options & sections["distill"].keys()))
    merged = OmegaConf.merge(sections["unet"], {"method": DistillMethod.lcm}, student)
    assert isinstance(merged, DictConfig)
    return merged


def for_all(options: DictConfig, schema: type) -> dict[str, Any]:
    """Options of the section `all` that a command has; one that draws has those of `sampling` at its top."""
    known = {option.name for option in dataclasses.fields(schema)}
    plain = OmegaConf.to_container(options)  # interpolations stay: they are of the command's configuration
    assert isinstance(plain, dict)
    found = {str(key): value for key, value in plain.items() if key in known}
    return {**plain.get("sampling", {}), **found} if issubclass(schema, SamplingConfig) else found


def require_known(where: str, found: Iterable[Any], known: Collection[str]) -> None:
    """Refuse the first name that nothing reads; raises UserError with the nearest ones."""
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"{where} '{name}' is read by no command{hint}")


def read_experiment(name: str) -> DictConfig:
    """The sections of an experiment, on those that it begins from.

    Raises:
        UserError: the file, or the one that it begins from, is not there or cannot be read.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"no experiment '{name}': {hint}choose one of {', '.join([NONE, *names()])}")
    path = FOLDER / f"{name}.yaml"
    try:
        own = OmegaConf.load(path)
    except YAMLError as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    if not isinstance(own, DictConfig):
        raise UserError(f"{path}: must hold sections, such as `unet: {{...}}`")
    require_known(f"{path}: section", own, {*OWN, *STAGES.values(), *OTHERS})
    runs = [vars(schemas)[run] for run in schemas.__all__ if run.endswith("Run")]
    require_known(f"{path}: all", own.get("all", {}), {o.name for run in runs for o in dataclasses.fields(run)})
    base = own.pop("begin_from", None)
    return own if base is None else OmegaConf.merge(read_experiment(base), own)  # type: ignore[return-value]
