"""Names the process that hangs: all of them leave their stack traces, and the first says what each is doing.

A process that waits for another in a collective operation looks exactly like one that computes, and the time limit of
the operation (`runtime.timeout_s`) ends it without a word on who did not come. So a thread of each process publishes in
the launcher's store what its process is doing. It runs while the main thread waits, and stands still where the whole
process does; that difference tells the two apart.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import torch.distributed.distributed_c10d as c10d
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from train.engine.runtime import Runtime

BEATS = 8  # published in the time that makes a process suspicious


class Watchdog:
    """Watches from `__enter__` to `__exit__`; `note` says what the process begins to do.

    Args:
        folder: where the stack traces go, `rank-00000.txt` and so on.
        patience_s: seconds without a `note` that are suspicious; 0: no watching.
    """

    def __init__(self, runtime: Runtime, folder: Path, patience_s: float) -> None:
        self.runtime, self.folder, self.patience_s = runtime, folder, patience_s
        self.doing, self.since, self.beats = "starting", time.monotonic(), 0
        self.told = False  # of this silence
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.store = PrefixStore("watchdog", c10d._get_default_store()) if runtime.world > 1 else None

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

    def _watch(self) -> None:
        while not self.over.wait(self.patience_s / BEATS):
            try:
                self._publish()
                if not self.told and time.monotonic() - self.since > self.patience_s:
                    self.told = True
                    self._report()
            except (OSError, RuntimeError):  # the store's process is gone: the run is ending
                return

    def _publish(self) -> None:
        self.beats += 1
        if self.store is not None:
            quiet_s = round(time.monotonic() - self.since, 1)
            facts = {"beats": self.beats, "doing": self.doing, "quiet_s": quiet_s}
            where = {"host": socket.gethostname(), "pid": os.getpid()}
            self.store.set(str(self.runtime.rank), json.dumps(facts | where))

    def _report(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank-{self.runtime.rank:05d}.txt").open("w") as file:
            print(f"{self.doing} for {time.monotonic() - self.since:.0f} s", file=file)
            faulthandler.dump_traceback(file, all_threads=True)
        if self.runtime.is_main:
            print(self._names(), file=sys.stderr, flush=True)

    def _names(self) -> str:
        """What each process is doing, those that do the same together; those that do not answer first."""
        before = self._published()
        self.over.wait(2 * self.patience_s / BEATS)
        groups: dict[str, list[str]] = {}
        for rank, now in enumerate(self._published()):
            silent = self.runtime.rank != rank and now.get("beats") == before[rank].get("beats")
            state = "DOES NOT ANSWER" if silent else f"{now.get('doing')} for {now.get('quiet_s', 0):.0f} s"
            name = f"{rank} ({now.get('host', 'unknown host')}, pid {now.get('pid', 'unknown')})"
            groups.setdefault(state, []).append(name)
        told = "; ".join(f"{state}: rank {', '.join(names)}" for state, names in sorted(groups.items()))
        return (
            f"warning: no step for {self.patience_s:.0f} s. {told}. Stack traces of those that answer: '{self.folder}'"
        )

    def _published(self) -> list[dict[str, Any]]:
        if self.store is None:
            return [{"beats": self.beats, "doing": self.doing, "quiet_s": time.monotonic() - self.since}]
        ranks = [str(rank) for rank in range(self.runtime.world)]
        return [json.loads(self.store.get(rank)) if self.store.check([rank]) else {} for rank in ranks]
