"""What a stage is, where its run stands, and how it ended: the words that loop, checkpoints and stages share."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from conf.errors import UserError
from conf.files import atomic_write
from conf.plain_json import dumps, read_object
from data.image_dataset import Batch
from data.loader import Dataset, Stream
from train.engine.metric_log import MetricLog, finite_metrics
from train.engine.trainable import Trainable

ARCHITECTURE = ("model", "discriminator", "process")  # sections of a configuration that the weights are bound to
DONE = "DONE"


class Stage(Protocol):
    """What makes one training differ from another. All methods run on all processes."""

    name: str
    trainables: dict[str, Trainable]
    flops_per_sample: float  # of a training step's forward and backward passes; 0: nobody counted them
    bound_to: dict[str, Any]  # what the weights are bound to beside sections of the configuration: no run changes it

    @property
    def extend(self) -> Callable[[Batch], Batch]:
        """Adds to a loaded micro-batch what else can be made of it on the CPU; goes to the loader's processes."""

    @property
    def dataset(self) -> Dataset | Stream:
        """What the loop draws batches from."""

    def micro_step(self, batch: dict[str, Any], last: bool, samples_seen: int) -> dict[str, Tensor]:
        """Forward and backward pass of a micro-batch, on the device, of the step that begins at `samples_seen`.

        Returns metrics, the same names on all processes: numbers, or tensors [2] of a sum and its weight. The step is
        left out where one whose name ends in `loss` is not finite.
        """

    def finish_step(self, samples_seen: int) -> dict[str, Tensor | float]:
        """Optimiser steps; `samples_seen` includes this step. Returns `train/lr`, `train/grad_norm`; nobody waits for
        numbers of the device, which are not finite where the step changed nothing.
        """

    def evaluate(self, samples_seen: int, journal: MetricLog) -> dict[str, float]:
        """Metrics `eval/…` over all processes, which the loop logs; images go to the journal."""

    def export(self, folder: Path) -> None:
        """Final weights in diffusers' format; the main process writes."""


@dataclass(kw_only=True, slots=True)
class Outcome:
    """How a call of `run` ended."""

    finished: bool  # False: a signal asked for a stop; the next start continues
    samples_seen: int
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation


@dataclass(kw_only=True)
class State:
    """Everything beside the trainables that a run needs to continue as if it had never stopped."""

    samples_seen: int = 0
    seconds: float = 0.0  # of work in this stage, over all its starts
    device_hours: float = 0.0  # likewise, times the processes of each start
    architecture: dict[str, Any] = field(default_factory=dict)  # dotted option → value
    data: str = ""  # digest of the data set's manifest
    config: str = ""  # digest of the whole configuration
    wandb_run_id: str = ""
    interval: dict[str, list[float]] = field(default_factory=dict)  # metric → [sum, weight] since the last log line

    def pass_time(self, seconds: float, world: int) -> None:
        """So much more work by so many processes."""
        self.seconds += seconds
        self.device_hours += seconds * world / 3600


def architecture_of(config: Mapping[str, Any], trainables: Mapping[str, Trainable]) -> dict[str, Any]:
    """The part of a plain configuration that must not change between two starts of a run, flat."""
    facts: dict[str, Any] = {"networks": sorted(trainables)}
    for section in ARCHITECTURE:
        if section in config:
            facts |= _flat(config[section], section)
    if config.get("lora", {}).get("rank", 0) > 0:  # what began without adapters does not name their options
        facts |= _flat(config["lora"], "lora")
    return facts


def _flat(node: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {prefix: node}
    return {name: value for key in node for name, value in _flat(node[key], f"{prefix}.{key}").items()}


def config_digest(content: Any) -> str:
    """sha256 of the canonical JSON of `content`."""
    return hashlib.sha256(dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def require_same_run(saved: Mapping[str, Any], now: State, output_dir: Path) -> None:
    """Refuse to continue what another network or other data began; raises UserError naming what differs."""
    before, after = saved["architecture"], json.loads(dumps(now.architecture))
    if (
        "teacher" in after and "teacher" not in before
    ):  # of a student from before they said whose: that is taken on trust
        after = {name: value for name, value in after.items() if name in before or name.startswith("lora.")}
    changed = [
        f"{name} was {before.get(name)}, is {after.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if saved["data"] != now.data:
        changed.append(f"the data set was {saved['data'][:12]}, is {now.data[:12]}")
    if changed:
        shown = "; ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        raise UserError(
            f"output_dir='{output_dir}' holds a run that began differently ({shown}): "
            "set another run_dir or output_dir, or delete that folder"
        )


def write_done(output_dir: Path, state: State, metrics: Mapping[str, float]) -> None:
    """Mark a stage as finished: DONE says at how many samples, with which last metrics, after how many seconds."""
    done = {"samples_seen": state.samples_seen, "seconds": round(state.seconds, 1), "metrics": finite_metrics(metrics)}
    belongs = {"architecture": state.architecture, "data": state.data}
    atomic_write(output_dir / DONE, dumps(done | belongs, indent=1).encode())


def read_done(output_dir: Path | str, samples: int) -> dict[str, Any] | None:
    """Content of DONE (samples_seen, seconds, metrics, architecture, data); None when less than `samples` are done."""
    try:
        done = read_object(Path(output_dir) / DONE)
        done["metrics"] = {name: math.nan if value is None else value for name, value in done["metrics"].items()}
        return done if done["samples_seen"] >= samples else None
    except (KeyError, TypeError, AttributeError):  # none, or not ours
        return None
