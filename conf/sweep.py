"""Members of a sweep: each is a command of its own, so that one that dies takes nothing else with it.

    RUN/sweep/COMMAND/MEMBER/member.json    which start of the sweep ran it last, its overrides, and how it ended
    RUN/sweep/COMMAND/.elsewhere/DIGEST     folder of a member that lies in another one, as where run_dir is swept

A command's objective is such that less is better; that of a member that failed is infinite.
"""

import hashlib
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from conf.ending import OUTCOME
from conf.files import atomic_create, atomic_write
from conf.overrides import expanded, quoted
from conf.plain_json import dumps, read_object
from conf.process import die_with_parent, handled_signals, python
from conf.slurm_launcher import lost_jobs

RECORD = "member.json"
ELSEWHERE = ".elsewhere"
NAME_LENGTH = 128  # characters that W&B shows of a run's name


@dataclass(slots=True)
class Start:
    """One start of a sweep."""

    id: str
    folder: Path = Path()  # of what concerns all members


def run_member(program: str, composed: DictConfig, start: Start) -> float | None:
    """Run one member to its end; returns its objective, or None if the command has none."""
    settings = HydraConfig.get()
    overrides, excluded = list(settings.overrides.task), settings.job.config.override_dirname.exclude_keys
    folder, named = Path(settings.runtime.output_dir), set(excluded) - {"experiment"}
    if not folder.is_relative_to(Path(expanded(composed.run_dir)).absolute()):
        named -= {"run_dir"}
    folder = claim(folder, overrides, named, start)
    record = read_object(folder / RECORD)
    outcome_file, requeue_file = folder / ".outcome", folder / ".requeue"
    for file in (outcome_file, requeue_file):
        file.unlink(missing_ok=True)
    environment = os.environ | {OUTCOME: str(outcome_file)}
    if in_a_job():
        environment["REQUEUE_FILE"] = str(requeue_file)
    command = [*launcher(), program, *overrides, *placement(folder, composed)]
    status = follow(command, environment, requeue_file)
    outcome = read_object(outcome_file)
    outcome_file.unlink(missing_ok=True)
    objective = outcome.get("objective")
    if status:
        error = outcome.get("error") or ending(status)
    else:
        error = "no finite objective: diverged, or stopped before its end" if outcome.get("diverged") else None
    ended = {"objective": None if error else objective, "error": error}
    atomic_write(folder / RECORD, dumps(record | ended).encode())
    return math.inf if error else objective


def claim(plain: Path, overrides: list[str], excluded: Set[str], start: Start) -> Path:
    """The folder of a member, with its record: the one of its name, which is another member's where names are alike.

    Args:
        plain: the folder of its name, in which slashes are underscores and some options are not told.
        overrides: all that tells it from others.
        excluded: options that its name does not tell, and that may differ between two starts of it.
        start: of the sweep.

    """

    def telling(given: list[str]) -> list[str]:
        return sorted(override for override in given if override.lstrip("+").partition("=")[0] not in excluded)

    mine = {"sweep": start.id, "overrides": overrides, "error": "ended with the process that looked after it"}
    plain.mkdir(parents=True, exist_ok=True)
    found = {} if atomic_create(plain / RECORD, dumps(mine).encode()) else read_object(plain / RECORD)
    folder = plain
    if found:
        same_member = telling(found["overrides"]) == telling(overrides)
        if not same_member or (found["sweep"] == start.id and sorted(found["overrides"]) != sorted(overrides)):
            digest = hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:12]
            folder = plain / digest if plain == start.folder else plain.with_name(f"{plain.name}-{digest}")
            folder.mkdir(parents=True, exist_ok=True)
    mine["name"] = folder.name if folder.parent == start.folder else str(folder)
    atomic_write(folder / RECORD, dumps(mine).encode())
    if folder.parent != start.folder:
        pointer = start.folder / ELSEWHERE / hashlib.sha256(str(folder).encode()).hexdigest()[:12]
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.write_text(str(folder), encoding="utf-8")
    return folder


def records(folder: Path) -> list[Path]:
    """The records of all members of a sweep, which need not lie in its folder."""
    elsewhere = (Path(path.read_text(encoding="utf-8")) / RECORD for path in sorted((folder / ELSEWHERE).glob("*")))
    return [*sorted(folder.glob(f"*/{RECORD}")), *(path for path in elsewhere if path.is_file())]


def in_a_job() -> bool:
    """Whether this process is a job that submitit started."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def launcher() -> list[str]:
    """Python, under torchrun where several processes are wanted: NPROC, or one per GPU that SLURM gave."""
    return python(int(os.environ.get("NPROC") or os.environ.get("SLURM_GPUS_ON_NODE") or "1"))


def placement(folder: Path, composed: DictConfig) -> list[str]:
    """Overrides that give a member its folder and its place in W&B, as far as the command line leaves that open."""
    chosen = {"output_dir": str(folder)}
    if "wandb" in composed:
        where = {"group": wandb_group(composed.run_dir, folder.parent), "name": shortened(folder.name, NAME_LENGTH)}
        chosen |= {f"wandb.{name}": value for name, value in where.items() if composed.wandb[name] is None}
    return [f"{name}={quoted(value)}" for name, value in chosen.items()]


def shortened(name: str, length: int) -> str:
    """A name of at most so many characters, which tells as much apart."""
    return name if len(name) <= length else f"{name[: length - 13]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def wandb_group(run_dir: str, folder: Path) -> str:
    """RUN/sweep/COMMAND, of all that belongs to a sweep."""
    return "/".join([Path(run_dir).name, *folder.parts[-2:]])


def follow(command: Sequence[str], environment: dict[str, str], requeue_file: Path) -> int:
    """Run a command to its end; returns its exit status.

    A signal that asks this process to end is passed on as SIGTERM, upon which a training writes a checkpoint; only then
    has it its effect here. In a job, SLURM signals all processes: submitit waits for USR2, a training hears TERM.
    """
    received: list[int] = []
    end_with_this = die_with_parent()

    def begin() -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # which SLURM sends to all of a job, for submitit alone
        end_with_this()

    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, process_group=0, preexec_fn=begin)

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        child.terminate()

    ends = [signal.SIGUSR2] if in_a_job() else [signal.SIGINT, signal.SIGTERM]
    with handled_signals(ends, pass_on):
        status = child.wait()
    if in_a_job():
        if (received or requeue_file.exists()) and still_running():
            signal.raise_signal(signal.SIGUSR2)  # submitit requeues the job
    elif received:
        signal.raise_signal(received[0])
    return status


def still_running() -> bool:
    """Whether SLURM calls the job running: requeuing one that scancel ended would bring it back."""
    command = ["scontrol", "show", "job", "-o", os.environ["SLURM_JOB_ID"]]
    return " JobState=RUNNING " in subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def ending(status: int) -> str:
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def print_members(folder: Path, sweep: str) -> int:
    """Print the members of a sweep, best first, failed last; returns the exit status: 1 if one failed or none ran."""
    members = [record for path in records(folder) if (record := read_object(path)) and record["sweep"] == sweep]
    failed = [record for record in members if record["error"]]
    finished = [record for record in members if not record["error"]]
    print("\nobjective   member")
    for record in sorted(finished, key=lambda record: record["objective"] or 0):
        print(f"{'-' if record['objective'] is None else format(record['objective'], '.6g'):<12}{record['name']}")
    for record in failed:
        print(f"failed      {record['name']}: {record['error']}")
    for line in lost_jobs:
        print(f"lost        {line}")
    sys.stdout.flush()
    return 1 if failed or lost_jobs or not members else 0
