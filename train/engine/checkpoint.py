"""Checkpoints that are whole or not there: checkpoints/<samples_seen>/, and what a run must keep to continue from one.

    checkpoints/000000012800/
        <trainable>/…   what `Trainable.save` wrote: weights, optimiser state, average
        state.json      samples seen and digests of what the weights belong to
        COMPLETE        size and sha256 of every other file; written last

A folder is filled under a temporary name and renamed when complete, so a kill leaves the previous one as it was.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from conf.errors import UserError
from data.shards import atomic_write, sync
from train.engine.runtime import Runtime
from train.engine.state import State, require_same_run
from train.engine.trainable import Trainable

MARKER = "COMPLETE"
STATE = "state.json"
TEMPORARY = ".tmp-"

Result = TypeVar("Result")


@contextmanager
def staged(target: Path, runtime: Runtime) -> Iterator[Path]:
    """A new folder for all processes to fill, which becomes `target` when all are through; collective."""
    staging = target.with_name(f"{TEMPORARY}{target.name}")
    if runtime.is_main:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    runtime.barrier()
    try:
        yield staging
        runtime.barrier()
        if runtime.is_main:
            _publish(staging, target)
        runtime.barrier()
    except BaseException:
        if runtime.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _publish(staging: Path, target: Path) -> None:
    sync(staging)
    old = target.with_name(f"{TEMPORARY}old-{target.name}")
    if target.exists():
        target.rename(old)
    staging.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fingerprint(path: Path) -> list[Any]:
    """[bytes, sha256] of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


class Checkpoints:
    """The checkpoints of one stage folder. All methods are collective."""

    def __init__(self, output_dir: Path, runtime: Runtime, keep: int) -> None:
        self.output_dir, self.runtime, self.keep = output_dir, runtime, keep
        self.root = output_dir / "checkpoints"
        self.broken: list[Path] = []

    def resume(self, trainables: Mapping[str, Trainable], fresh: State) -> State:
        """Load the newest complete checkpoint into the trainables; `fresh` where there is none.

        A broken one is named on stderr and the one before it is used. Raises UserError when all are broken, or when
        the checkpoint belongs to another architecture or to other data than `fresh`.
        """
        for folder in self._folders():
            damage = self._damage(folder)
            if damage is None:
                saved = json.loads((folder / STATE).read_bytes())
                require_same_run(saved, fresh, self.output_dir)
                for trainable in trainables.values():
                    trainable.load(folder)
                carried = {name: saved[name] for name in ("samples_seen", "seconds", "wandb_run_id", "interval")}
                return State(**carried, architecture=fresh.architecture, data=fresh.data, config=fresh.config)
            self.broken.append(folder)
            if self.runtime.is_main:
                print(f"warning: checkpoint '{folder}' is skipped: {damage}", file=sys.stderr, flush=True)
        if self.broken:
            raise UserError(
                f"no checkpoint in '{self.root}' is readable: restore one, or delete the folder to begin anew"
            )
        return fresh

    def save(self, trainables: Mapping[str, Trainable], state: State) -> Path:
        """Write a checkpoint of `state.samples_seen` and remove those beyond `keep`.

        Raises OSError, on all processes, when one of them could not write (full disk): the temporary folder is removed
        and the previous checkpoints are as they were.
        """
        target = self.root / f"{state.samples_seen:012d}"
        with staged(target, self.runtime) as staging:
            for trainable in trainables.values():
                self._together(partial(trainable.save, staging))
            self._together(lambda: self._on_main(staging / STATE, lambda: asdict(state)))
            prints: dict[str, list[Any]] = {}
            for share in self.runtime.gather_objects(self._together(lambda: self._fingerprints(staging))):
                prints |= share
            self._together(lambda: self._on_main(staging / MARKER, lambda: {"schema": 1, "files": prints}))
        if self.runtime.is_main:
            self._prune(target)
        self.runtime.barrier()
        return target

    def _folders(self) -> list[Path]:
        """Checkpoints by name, newest first, as the main process sees them; it clears what a kill left behind."""
        names: list[str] = []
        if self.runtime.is_main and self.root.is_dir():
            for entry in self.root.iterdir():
                if entry.name.startswith(TEMPORARY):
                    shutil.rmtree(entry, ignore_errors=True)
                elif entry.name.isdecimal():
                    names.append(entry.name)
        return [self.root / name for name in sorted(self.runtime.gather_objects(names)[0], reverse=True)]

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, None for nothing; each process reads its share of the files."""
        found: str | None = None
        try:
            files = json.loads((folder / MARKER).read_bytes())["files"]
            if STATE not in files:
                found = f"its {MARKER} does not list {STATE}"
            for name in sorted(files)[self.runtime.rank :: self.runtime.world]:
                if _fingerprint(folder / name) != files[name]:
                    found = f"{name} is not what was written (size or sha256 differs)"
        except FileNotFoundError as error:
            found = f"{Path(error.filename).relative_to(folder)} is missing"
        except OSError as error:
            found = f"it cannot be read ({error.strerror})"
        except (ValueError, KeyError, TypeError):
            found = f"its {MARKER} is damaged"
        return next((damage for damage in self.runtime.gather_objects(found) if damage), None)

    def _fingerprints(self, folder: Path) -> dict[str, list[Any]]:
        """Of this process's share of the files, which also reach the disk here."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())[self.runtime.rank :: self.runtime.world]
        for path in files:
            sync(path)
        return {path.relative_to(folder).as_posix(): _fingerprint(path) for path in files}

    def _on_main(self, path: Path, content: Callable[[], Any]) -> None:
        if self.runtime.is_main:
            atomic_write(path, json.dumps(content(), indent=1).encode())

    def _together(self, part: Callable[[], Result]) -> Result:
        """Run a part that may fail on one process alone; then it fails on all, so that none waits for another."""
        failure: Exception | None = None
        try:
            result = part()
        except Exception as error:
            failure = _as_os_error(error, self.root)
        described = (
            (failure.errno, failure.strerror, failure.filename) if isinstance(failure, OSError) else str(failure)
        )
        others = [d for d in self.runtime.gather_objects(failure and described) if d]
        if failure is not None:
            raise failure
        if others:
            raise OSError(*others[0]) if isinstance(others[0], tuple) else RuntimeError(others[0])
        return result

    def _prune(self, newest: Path) -> None:
        """Remove what `keep` leaves out. A broken one does not count as kept, and goes once a newer one is complete."""
        older = [path for path in self.root.iterdir() if path.name.isdecimal() and path.name <= newest.name]
        complete = sorted((path for path in older if path not in self.broken or path == newest), reverse=True)
        for path in set(older) - set(complete[: self.keep]):
            doomed = path.rename(path.with_name(f"{TEMPORARY}{path.name}"))  # never half a checkpoint under its name
            shutil.rmtree(doomed, ignore_errors=True)


def _as_os_error(error: Exception, folder: Path) -> Exception:
    """Safetensors reports a full disk as an error of its own, with the system's number in its text."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    if isinstance(error, OSError) or number is None:
        return error
    return OSError(int(number[1]), os.strerror(int(number[1])), str(folder))
