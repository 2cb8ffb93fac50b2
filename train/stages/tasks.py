"""Which stages, with which options: a command line becomes a list of tasks, all checked before the first one starts."""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from conf.entry import compose, options, to_plain
from conf.errors import UserError, did_you_mean
from conf.files import sha256
from conf.plain_json import read_object
from conf.process import python
from conf.schema import (
    AutoencoderRun,
    BuildRun,
    ClipRun,
    DistillRun,
    EvaluateRun,
    PipelineRun,
    PrecomputeRun,
    SampleRun,
    UNetRun,
)
from data.building.build import is_outdated
from train.stages.display import tail
from train.stages.time_left import Work

ROOT = Path(__file__).parents[2]
SHARED = ("experiment", "run_dir", "name", "seed")  # options of the pipeline and of every stage
# options that name what a stage reads
INPUTS = (
    "shards",
    "latents",
    "autoencoder",
    "clip",
    "unet",
    "init_from",
    "teacher",
    "lora",
    "prompts_file",
    "prompts_from",
)
OVERRIDE = re.compile(r"^(?:\+{1,2}|~)?([^=]*).*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class StageCommand:
    """A stage as a user would start it."""

    name: str
    script: Path  # its configuration is conf/<stem>.yaml
    schema: type
    proof: str  # file below output_dir that is there, and tells results apart, only after a finished run
    distributed: bool = True  # whether several processes can share the work

    def command(self, arguments: Sequence[str], processes: int) -> list[str]:
        """The command line, under torchrun when there are several processes."""
        return [*python(processes if self.distributed else 1), str(self.script), *arguments]

    def options(self) -> list[str]:
        """Dotted names of all its options."""
        return options(OmegaConf.structured(self.schema))


STAGES = (
    StageCommand("build", ROOT / "data/build_shards.py", BuildRun, "train/manifest.json", distributed=False),
    StageCommand("autoencoder", ROOT / "train/train_autoencoder.py", AutoencoderRun, "DONE"),
    StageCommand("clip", ROOT / "train/train_clip.py", ClipRun, "DONE"),
    StageCommand("latents", ROOT / "data/precompute_latents.py", PrecomputeRun, "train/manifest.json"),
    StageCommand("unet", ROOT / "train/train_unet.py", UNetRun, "DONE"),
    StageCommand("distill", ROOT / "train/distill_unet.py", DistillRun, "DONE"),
    StageCommand("sample", ROOT / "train/sample.py", SampleRun, "grid.png"),
    StageCommand("evaluate", ROOT / "train/evaluate.py", EvaluateRun, "metrics.json"),
)


@dataclass(frozen=True, slots=True)
class Task:
    """A stage with its checked options."""

    stage: StageCommand
    cfg: Any
    arguments: list[str]

    @property
    def output_dir(self) -> Path:
        """Where the stage leaves its results."""
        return Path(self.cfg.output_dir)

    @property
    def samples(self) -> int:
        """Length of a training; 0 for other stages."""
        return self.cfg.loop.samples if self.stage.proof == "DONE" else 0

    def work(self, images: int | None) -> Work:
        """How much there is to do, of so many images in the data set."""
        match self.stage.name:
            case "sample":
                drawn = len(self.cfg.prompts) + len(self.cfg.inputs)
                drawn += self.cfg.prompts_from_samples if self.cfg.prompts_from else 0
                return Work(drawn * self.cfg.images_per_prompt or None)
            case "evaluate":
                return Work(self.cfg.samples)
        return Work(self.samples, self.cfg.loop.evaluate_every) if self.samples else Work(images)

    def inputs(self) -> str:
        """Digest of all that may change the result; a moved run folder or another W&B project does not."""
        plain = to_plain(self.cfg)
        plain.pop("wandb", None)
        if "runtime" in plain:
            plain["runtime"] = plain["runtime"]["precision"]
        moved = {name: value.removeprefix(self.cfg.run_dir) for name, value in plain.items() if isinstance(value, str)}
        content = [plain | moved | {"run_dir": ""}, sorted(self.read().values())]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def read(self) -> dict[str, str]:
        """What the stage reads, path or name → `origin`."""
        values = [getattr(self.cfg, name, None) for name in INPUTS]
        return {value: origin(value) for value in values if value and isinstance(value, str)}  # lora: a section, too

    def outcome(self) -> str:
        """Digest of the proof that the stage is finished; empty when it is not."""
        path = self.output_dir / self.stage.proof
        if not path.is_file():
            return ""
        if self.stage.proof == "DONE" and not read_object(path).get("samples_seen", 0) >= self.samples:
            return ""  # a longer training is asked for now
        return sha256(path)

    def outdated(self) -> bool:
        """Whether a finished build is of other files than are there now."""
        return isinstance(self.cfg, BuildRun) and is_outdated(self.cfg)

    def metrics(self) -> dict[str, float]:
        """What the finished stage recorded at last; `eval/psnr` of a training becomes `autoencoder/psnr`."""
        recorded: dict[str, Any] = {}
        if self.stage.proof == "DONE":
            last = read_object(self.output_dir / "DONE").get("metrics", {})
            recorded = {f"{self.stage.name}/{name.removeprefix('eval/')}": value for name, value in last.items()}
        elif self.stage.proof == "metrics.json":
            recorded = read_object(self.output_dir / "metrics.json")
        elif self.stage.name == "latents":
            for row in tail(self.output_dir / "metrics.jsonl"):
                recorded = {name: value for name, value in row.items() if name.startswith("latents/")}
        return {name: value for name, value in recorded.items() if value is not None}


def images_of(tasks: Sequence[Task]) -> int | None:
    """Images in the data set of some stages: that are there, else that are asked for; None: nobody knows."""
    shards = next((Path(named) for task in tasks if (named := getattr(task.cfg, "shards", None))), Path())
    there = sum(read_object(shards / side / "manifest.json").get("samples", 0) for side in ("train", "heldout"))
    return there or next((task.cfg.samples for task in tasks if isinstance(task.cfg, BuildRun)), 0) or None


def origin(value: str) -> str:
    """Digest of what tells versions of an input apart; empty for a pretrained name and for files from elsewhere.

    An input is a file, both sides of shards or latents, one of them, or an export.
    """
    path = Path(value)
    proofs = [path, path / "train/manifest.json", path / "manifest.json", path.parent / "DONE"]
    return next((sha256(proof) for proof in proofs if proof.is_file()), "")


def separate(
    arguments: Sequence[str], stages: Sequence[StageCommand] = STAGES
) -> tuple[list[str], dict[str, list[str]]]:
    """A command line as (what Hydra reads for the pipeline, overrides of each stage).

    Raises:
        UserError: an option that nobody has.

    """
    known = {stage.name: stage.options() for stage in stages}
    pipeline = [*options(OmegaConf.structured(PipelineRun)), *SHARED]
    own: list[str] = []
    passed: dict[str, list[str]] = {stage.name: [] for stage in stages}
    for argument in arguments:
        if argument in ("-m", "--multirun"):
            raise UserError(f"{argument}: the pipeline does not sweep; start it once for each run_dir")
        key = OVERRIDE.sub(r"\1", argument)
        first, _, rest = key.partition(".")
        if rest and first in known:
            passed[first].append(argument.replace(f"{first}.", "", 1))
        elif argument.startswith("-") or "=" not in argument:  # a flag or its value
            own.append(argument)
        elif key in pipeline or first in ("hydra", "overrides"):
            own.append(argument)
            for name in known if key in SHARED else ():
                passed[name].append(argument)
        else:
            for name in _takers(key, pipeline, known):
                passed[name].append(argument)
    return own, passed


def _takers(key: str, pipeline: list[str], known: Mapping[str, list[str]]) -> list[str]:
    """The stages that have an option."""
    if key == "output_dir":
        raise UserError("output_dir: each stage has its own; set run_dir=FOLDER or STAGE.output_dir=FOLDER")
    takers = [name for name in known if key in known[name]]
    if not takers:
        raise UserError(f"no option '{key}': {_hint(key, pipeline, known)}")
    return takers


def _hint(key: str, pipeline: list[str], known: Mapping[str, list[str]]) -> str:
    plain = dict.fromkeys([*pipeline, *(option for names in known.values() for option in names)])
    full = [f"{stage}.{option}" for stage, names in known.items() for option in names]
    near = [name for name in plain if name.endswith(f".{key}")] or difflib.get_close_matches(key, [*plain, *full], 3)
    return f"did you mean {' or '.join(near)}?" if near else "`python train/STAGE.py --help` lists those of a stage"


def plan_tasks(
    cfg: PipelineRun, overrides: Mapping[str, Sequence[str]], stages: Sequence[StageCommand] = STAGES
) -> list[Task]:
    """The chosen stages in their order, each with checked options; raises UserError naming the stage."""
    names = [stage.name for stage in stages]
    for option, chosen in (("stages", cfg.stages), ("overrides", list(cfg.overrides))):
        wrong = [name for name in chosen if name not in names]
        if wrong:
            near = did_you_mean(wrong[0], names)
            raise UserError(f"{option}: no stage '{wrong[0]}'; choose from {', '.join(names)}{near}")
    if cfg.processes < 1:
        raise UserError(f"processes={cfg.processes}: must be positive")
    GlobalHydra.instance().clear()  # it holds the pipeline's own composition, and only one at a time
    tasks = []
    for stage in stages:
        if stage.name in cfg.stages:
            arguments = [*cfg.overrides.get(stage.name, []), *overrides.get(stage.name, [])]
            try:
                task = Task(stage, compose(stage.script.stem, stage.schema, arguments), arguments)
                if task.samples:
                    task.cfg.batch.split(cfg.processes)
            except UserError as error:
                raise UserError(f"stage {stage.name}: {error}") from error
            tasks.append(task)
    return tasks
