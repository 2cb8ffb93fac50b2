"""Names the process that hangs: all of them leave their stack traces, and the first says what each is doing.

A process that waits for another in a collective operation looks exactly like one that computes, and the time limit of
the operation (`runtime.timeout_s`) ends it without a word on who did not come. So a thread of each process publishes in
the launcher's store what its process is doing. It runs while the main thread waits, and stands still where the whole
process does; that difference tells the two apart.

Where it may, it also ends the run: at once if a process does not answer, since no step can follow, and the batch script
leaves its node out. While all answer, nobody knows whether something takes long or hangs: then only a step is ended,
shortly before the time limit would, after which the batch script is told that a new start may help.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch.distributed.distributed_c10d as c10d
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from conf.ending import leave
from conf.process import node_name, suspect
from train.engine.runtime import Runtime

BEATS = 8  # published in the time that makes a process suspicious
LOADING, STEP = "waiting for data", "in a training step"
ENDED = "ended"  # what a process that has left the watchdog is doing: it need not answer
END = "end"  # key of the store that ends all processes: SIGTERM asks for a checkpoint, which needs those that hang


class Watchdog:
    """Watches from `__enter__` to `__exit__`; `note` says what the process begins to do.

    Args:
        folder: where the stack traces go, `rank-00000.txt` and so on.
        patience_s: seconds without a `note` that are suspicious; 0: no watching.
        timeout_s: after which a collective operation is an error; the run may be ended then. None: it may not.
    """

    def __init__(self, runtime: Runtime, folder: Path, patience_s: float, timeout_s: float | None = None) -> None:
        self.runtime, self.folder, self.patience_s, self.timeout_s = runtime, folder, patience_s, timeout_s
        self.doing, self.since, self.beats = "starting", time.monotonic(), 0
        self.told = False  # of this silence
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        # A connection of its own: the main thread may wait for a key of the store, as when a group is made.
        self.store = PrefixStore("watchdog", c10d._get_default_store().clone()) if runtime.world > 1 else None

    def note(self, doing: str) -> None:
        """The process is alive and begins to do this."""
        self.doing, self.since, self.told = doing, time.monotonic(), False

    def __enter__(self) -> Self:
        if self.patience_s > 0:
            self._publish()  # who hangs at once is known by its host, too
            self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        if self.patience_s > 0:
            self.thread.join()
            self.note(ENDED)
            with suppress(OSError, RuntimeError):  # the store's process is gone: there is nobody to tell
                self._publish()

    def _watch(self) -> None:
        while not self.over.wait(self.patience_s / BEATS):
            try:
                self._publish()
                if self.store is not None and self.store.check([END]):
                    leave(1)
                if time.monotonic() - self.since > self.patience_s:
                    self._look()
            except (OSError, RuntimeError):  # the store's process is gone: the run is ending
                return

    def _publish(self) -> None:
        self.beats += 1
        if self.store is not None:
            quiet_s = round(time.monotonic() - self.since, 1)
            facts = {"beats": self.beats, "doing": self.doing, "quiet_s": quiet_s}
            self.store.set(str(self.runtime.rank), json.dumps(facts | {"node": node_name(), "pid": os.getpid()}))

    def _look(self) -> None:
        """Leave traces and names, once in a silence; end the run where that is due."""
        since, first, self.told = self.since, not self.told, True
        if first:
            with suppress(OSError):  # a full disk is no reason to watch no longer
                self._leave_traces()
        if not self.runtime.is_main or (self.timeout_s is None and not first):
            return
        before = self._published()
        self.over.wait(2 * self.patience_s / BEATS)
        now = self._published()
        silent = [r for r in range(len(now)) if r != self.runtime.rank and self._is_silent(before[r], now[r])]
        if first:
            print(self._names(now, silent), file=sys.stderr, flush=True)
        if self.since == since and not self.over.is_set():  # still
            self._end_if_due(now, silent)

    def _leave_traces(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank-{self.runtime.rank:05d}.txt").open("w") as file:
            print(f"{self.doing} for {time.monotonic() - self.since:.0f} s", file=file)
            faulthandler.dump_traceback(file, all_threads=True)

    def _is_silent(self, before: dict[str, Any], now: dict[str, Any]) -> bool:
        return before.get("beats") == now.get("beats") and now.get("doing") != ENDED

    def _names(self, now: Sequence[dict[str, Any]], silent: Sequence[int]) -> str:
        """What each process is doing, those that do the same together; those that do not answer first."""
        groups: dict[str, list[str]] = {}
        for rank, facts in enumerate(now):
            state = "DOES NOT ANSWER" if rank in silent else f"{facts.get('doing')} for {facts.get('quiet_s', 0):.0f} s"
            name = f"{rank} ({facts.get('node', 'unknown host')}, pid {facts.get('pid', 'unknown')})"
            groups.setdefault(state, []).append(name)
        told = "; ".join(f"{state}: rank {', '.join(names)}" for state, names in sorted(groups.items()))
        return (
            f"warning: no step for {self.patience_s:.0f} s. {told}. Stack traces of those that answer: '{self.folder}'"
        )

    def _end_if_due(self, now: Sequence[dict[str, Any]], silent: Sequence[int]) -> None:
        if self.timeout_s is None or self.store is None:
            return
        nodes = sorted({now[rank]["node"] for rank in silent if "node" in now[rank]})
        # This look takes two beats, and the next one would come after the time limit.
        late = time.monotonic() - self.since + 3 * self.patience_s / BEATS > self.timeout_s
        if nodes or (late and self.doing in (LOADING, STEP)):
            whose = f"processes on {', '.join(nodes)} do not answer" if nodes else "a step takes longer than can be"
            if len(nodes) > 1 and 2 * len(nodes) >= len({facts.get("node") for facts in now}):
                whose += ", half of all or more, so that this one may be cut off: no node is left out"
                nodes = []
            with suppress(OSError):  # the disk may be what hangs: the run ends all the same
                suspect(nodes)
            print(f"error: {whose}: the run is ended (runtime.watchdog_ends)", file=sys.stderr, flush=True)
            self.store.set(END, "")
            leave(1)

    def _published(self) -> list[dict[str, Any]]:
        if self.store is None:
            return [{"beats": self.beats, "doing": self.doing, "quiet_s": time.monotonic() - self.since}]
        ranks = [str(rank) for rank in range(self.runtime.world)]
        return [json.loads(self.store.get(rank)) if self.store.check([rank]) else {} for rank in ranks]
