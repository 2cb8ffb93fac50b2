"""What a run folder has so far; nothing of it needs to be there, and a run may still be writing into it."""

import re
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import yaml

from conf.errors import UserError
from conf.plain_json import read_object
from data.shards.manifest import MANIFEST
from train.board.panels import EVALUATIONS, TRAININGS
from train.engine.metric_log import CONFIG, METRICS, X_AXIS, read_metrics
from train.engine.state import DONE

PROOFS = (DONE, "metrics.json", f"train/{MANIFEST}")  # of a training, an evaluation, latents
PROTOCOL = "protocol.json"
ORDER = (*TRAININGS[:2], "latents", *TRAININGS[2:], *EVALUATIONS)  # stages that keep a journal
IMAGE = re.compile(r"(?P<name>.+)-(?P<samples_seen>\d{12})\.png")


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage."""

    name: str
    folder: Path

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of metrics that a stage recorded."""
        return read_metrics(self.folder / METRICS)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration of a stage; empty where it cannot be read."""
        try:
            found = yaml.safe_load(self.config_text)
        except yaml.YAMLError:
            found = None
        return found if isinstance(found, dict) else {}

    def section(self, name: str) -> dict[str, Any]:
        """A group of its options; empty where it has none."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    @cached_property
    def config_text(self) -> str:
        """The configuration of a stage as it is written."""
        path = self.folder / CONFIG
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    @property
    def is_student(self) -> bool:
        """Whether it was distilled; where a run has no other U-Net, a student takes its place."""
        return self.name == "student" or "teacher" in self.config

    @property
    def done(self) -> bool:
        """Whether there is what it leaves at its end."""
        return any((self.folder / proof).is_file() for proof in PROOFS)

    @property
    def samples(self) -> int:
        """Length of the training; 0 for other stages."""
        return int(self.section("loop").get("samples", 0))

    @property
    def samples_seen(self) -> int:
        """Samples seen by the most advanced row; an evaluation may take the newest checkpoint first."""
        return max((row[X_AXIS] for row in self.rows), default=0)

    @cached_property
    def images(self) -> dict[str, list[tuple[int, Path]]]:
        """Name → (samples seen, file), in the order of the training."""
        found: dict[str, list[tuple[int, Path]]] = {}
        for path in sorted((self.folder / "samples").glob("*.png")):
            match = IMAGE.fullmatch(path.name)
            if match:
                found.setdefault(match["name"], []).append((int(match["samples_seen"]), path))
        return found

    def latest(self, metric: str) -> float | None:
        """Finite value of a metric after the most samples."""
        known = [row for row in self.rows if row.get(metric) is not None]
        return max(known, key=itemgetter(X_AXIS))[metric] if known else None

    def values(self, metric: str) -> list[float]:
        """All finite values of a metric."""
        return [row[metric] for row in self.rows if row.get(metric) is not None]


@dataclass(frozen=True)
class RunFolder:
    """All stages below one folder."""

    path: Path

    @classmethod
    def open(cls, path: Path | str) -> "RunFolder":
        """Raises UserError where there is no run."""
        run = cls(Path(path))
        if not run.stages and not (run.path / "shards").is_dir():
            raise UserError(
                f"run_dir={path}: holds no run; point it at the folder that a training was given as run_dir, or start "
                "one with train/pipeline.py"
            )
        return run

    @cached_property
    def stages(self) -> dict[str, StageFolder]:
        """Stages that have begun, in the order in which they are trained."""
        found = [StageFolder(name, self.path / name) for name in ORDER]
        return {stage.name: stage for stage in found if (stage.folder / METRICS).is_file()}

    @cached_property
    def records(self) -> dict[str, dict[str, Any]]:
        """What the pipeline keeps of each stage that it ran."""
        return {path.stem: read_object(path) for path in sorted((self.path / ".stages").glob("*.json"))}

    @cached_property
    def protocols(self) -> dict[str, dict[str, Any]]:
        """StageFolder → everything that two labs must share to get the same numbers."""
        paths = {path.parent.name: path for path in sorted(self.path.glob(f"*/{PROTOCOL}"))}
        return {name: read_object(path) for name, path in paths.items()}
