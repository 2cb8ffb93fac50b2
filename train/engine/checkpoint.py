"""Checkpoints that are whole or not there: checkpoints/<samples_seen>/, and what a run must keep to continue from one.

    checkpoints/000000012800/
        <trainable>/…   `Trainable.contents`: weights, optimiser state, averages
        state.json      samples seen and digests of what the weights belong to
        COMPLETE        size and sha256 of every other file; written last

A folder is filled under a temporary name and renamed when complete, so a kill leaves the previous one as it was. Each
process writes its part of the files: by default a copy in its memory, in a thread, while training goes on. In that
thread no collective operation may happen: that all have written is found out at a training step, in the exchange that
it has anyway, and then the main process gives the folder its marker and its name.
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, TypeVar

from conf.errors import UserError
from conf.files import TEMPORARY, publish_folder
from conf.schema import LoopConfig
from models.formats.tensor_stream import write_bytes
from train.engine.contents import HostMemory, join_contents
from train.engine.marker import MARKER, Part, damage_of, joined
from train.engine.metric_log import METRICS
from train.engine.posthoc import forget_copies, keep_copies
from train.engine.retention import kept, scores_of
from train.engine.runtime import Runtime
from train.engine.state import State, require_same_run
from train.engine.trainable import Trainable

STATE = "state.json"
CARRIED = ("samples_seen", "seconds", "device_hours", "wandb_run_id", "interval")

Result = TypeVar("Result")


@dataclass
class Write:
    """A checkpoint that is being written."""

    target: Path
    scores: Mapping[int, float]  # that its retention goes by
    parts: Future[dict[str, Part]]  # this process's
    finish: Future[None] | None = None  # the main process's last part, once all have written theirs

    @property
    def staging(self) -> Path:
        """The folder until it is complete."""
        return self.target.with_name(f"{TEMPORARY}{self.target.name}")


class Checkpoints:
    """The checkpoints of one stage folder. All methods are collective.

    As a context manager it waits at the end for what is still being written.
    """

    def __init__(self, output_dir: Path, runtime: Runtime, cfg: LoopConfig) -> None:
        self.output_dir, self.runtime, self.cfg = output_dir, runtime, cfg
        self.root = output_dir / "checkpoints"
        self.broken: list[Path] = []
        self.memory: HostMemory = {}
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.latest: Write | None = None  # the same one on all processes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        # After an exception the others may be gone, who would have to agree that a checkpoint is complete.
        if exception[0] is None or self.runtime.world == 1:
            self.commit()
        self.thread.shutdown()

    def resume(self, trainables: Mapping[str, Trainable], fresh: State) -> State:
        """Load the newest complete checkpoint into the trainables; `fresh` where there is none.

        A broken one is named on stderr and the one before it is used. Raises UserError when all are broken, or when
        the checkpoint belongs to another architecture or to other data than `fresh`.
        """
        # All processes must begin from the same one: names come from the main process, whose look at a network's file
        # system may be ahead of the others', and a file that one of them finds damaged counts as damaged for all.
        for folder in self._folders():
            damage = self._damage(folder)
            if damage is None:
                saved = json.loads((folder / STATE).read_bytes())
                require_same_run(saved, fresh, self.output_dir)
                for trainable in trainables.values():
                    trainable.load(folder)
                self._forget_copies(saved["samples_seen"])
                carried = {name: saved[name] for name in CARRIED if name in saved}  # older ones have fewer
                return State(**carried, architecture=fresh.architecture, data=fresh.data, config=fresh.config)
            self.broken.append(folder)
            if self.runtime.is_main:
                print(f"warning: checkpoint '{folder}' is skipped: {damage}", file=sys.stderr, flush=True)
        if self.broken:
            raise UserError(
                f"no checkpoint in '{self.root}' is readable: restore one, or delete the folder to begin anew"
            )
        self._forget_copies(0)
        return fresh

    def save(self, trainables: Mapping[str, Trainable], state: State, wait: bool = True) -> None:
        """Write a checkpoint of `state.samples_seen` and remove those that the options do not keep.

        Args:
            wait: return when it is complete. Otherwise, with `loop.async_checkpoints`, training may go on as soon as
                each process has a copy of its part in memory; it calls `commit` once nobody is `writing`, and `failed`,
                the next `save` and `wait` tell how it ended.

        Raises OSError, on all processes, when this one or the one before could not be written (full disk): its
        temporary folder is removed and the complete checkpoints are as they were.

        """
        self.wait()  # one write at a time: the next copy goes into the memory that the latest one is written from
        # Read here and not in the thread, beside which the journal may be at half a line.
        scores = self._together(lambda: scores_of(self.output_dir / METRICS, self.cfg) if self.runtime.is_main else {})
        parts = [trainable.contents() for trainable in trainables.values()]
        contents = join_contents(parts, {STATE: asdict(state)})
        write = Write(self.root / f"{state.samples_seen:012d}", scores, Future())
        self._together(lambda: self._empty(write.staging))
        if self.cfg.async_checkpoints and not wait:
            # All collective work happens here, in the copy: NCCL and gloo pair operations by their order, so that one
            # in a thread would be paired with one of the next training step.
            copy = self._together(lambda: contents.held(self.memory))
            write.parts, self.latest = self.thread.submit(copy.write, write.staging, self.runtime.is_main), write
            return
        try:
            write.parts.set_result(contents.write(write.staging, self.runtime.is_main))
        except OSError as error:
            write.parts.set_exception(error)
        self.latest = write
        self.wait()

    def any(self) -> bool:
        """Whether there is a checkpoint to go back to."""
        return bool(self._folders())

    @property
    def failed(self) -> bool:
        """Whether this process knows that its part of the latest write failed."""
        futures = [] if self.latest is None else [self.latest.parts, self.latest.finish]
        return any(future is not None and future.done() and future.exception() is not None for future in futures)

    @property
    def writing(self) -> bool:
        """Whether this process still writes its part."""
        return self.latest is not None and not self.latest.parts.done()

    def commit(self) -> None:
        """Have the main process complete what all have written their parts of, once; does nothing without such.

        Raises what went wrong, on all processes.
        """
        write = self.latest
        if write is None or write.finish is not None:
            return
        try:
            parts = self._together(write.parts.result)
        except Exception:
            self.latest = None
            if self.runtime.is_main:
                shutil.rmtree(write.staging, ignore_errors=True)  # nobody writes to it any more
            raise
        written = self.runtime.gather_objects(parts)
        write.finish = Future()
        if self.runtime.is_main:
            write.finish = self.thread.submit(self._finish, write, written)
        else:
            write.finish.set_result(None)

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong, on all processes."""
        self.commit()
        write, self.latest = self.latest, None
        self._together(lambda: None if write is None or write.finish is None else write.finish.result())

    def _empty(self, staging: Path) -> None:
        """Have the folder there for all, with nothing in it."""
        if self.runtime.is_main:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)

    def _finish(self, write: Write, written: Sequence[Mapping[str, Part]]) -> None:
        """Complete a folder to which all have written, and delete what it makes superfluous."""
        staging, target = write.staging, write.target
        try:
            prints = joined(written)
            keep_copies(staging, self.output_dir, int(target.name), prints)
            write_bytes(staging / MARKER, json.dumps({"schema": 2, "files": prints}, indent=1).encode())
            publish_folder(staging, target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self._prune(target, write.scores)

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

    def _forget_copies(self, samples_seen: int) -> None:
        if self.runtime.is_main:
            forget_copies(self.output_dir, samples_seen)

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, None for nothing; each process reads its share."""
        found = damage_of(folder, slice(self.runtime.rank, None, self.runtime.world), STATE)
        return next((damage for damage in self.runtime.gather_objects(found) if damage), None)

    def _together(self, part: Callable[[], Result]) -> Result:
        """Run a part that may fail on one process alone; then it fails on all, so that none waits for another."""
        failure: Exception | None = None
        try:
            result = part()
        except Exception as error:
            failure = error
            if isinstance(error, OSError):  # a full disk names no file
                error.filename = error.filename or str(self.root)
        # What others raise must survive pickling, which not every library's error does.
        told = failure if isinstance(failure, OSError | UserError) else failure and RuntimeError(str(failure))
        # The exchange stands after the part, whether it failed or not: else who failed would never come to it.
        failures = [other for other in self.runtime.gather_objects(told) if other is not None]
        if failure is not None or failures:
            raise failure or failures[0]
        return result

    def _prune(self, newest: Path, scores: Mapping[int, float]) -> None:
        """Remove what is not kept. A broken one does not count, and goes once a newer one is complete."""
        older = {int(path.name): path for path in self.root.iterdir() if path.name.isdecimal()}
        older = {samples: path for samples, path in older.items() if samples <= int(newest.name)}
        complete = [samples for samples, path in older.items() if path not in self.broken or path == newest]
        for samples in older.keys() - kept(complete, self.cfg, scores):
            path = older[samples]
            doomed = path.rename(path.with_name(f"{TEMPORARY}{path.name}"))  # never half a checkpoint under its name
            shutil.rmtree(doomed, ignore_errors=True)
