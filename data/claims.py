"""Work on numbered items shared by processes that know nothing of each other but a folder.

`NUMBER.GENERATION.claim` says who works on an item; its time of change, that they are alive. Of a worker that died the
claim stays, and the next one makes the next generation: creating a name that must not exist is all that is asked of the
file system, so that it may be a network's. What marks an item as finished is not this room's business.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

BEAT_S = 5.0  # seconds between two signs of life
POLL_S = 0.5  # seconds until those who wait for others look again


@dataclass(frozen=True, slots=True)
class Claims:
    """Claims on items, in a folder.

    Args:
        lease_s: seconds without a sign of life after which a claim from another machine is void. On the same machine
            the claim of a process that has ended is void at once.
    """

    folder: Path
    lease_s: float = 120.0

    def work(
        self, items: int, finished: Callable[[int], bool], start: int = 0, poll_s: float = POLL_S
    ) -> Iterator[int]:
        """Yield items to work on until all are finished, whoever does them; each is claimed while it is out.

        An item whose worker died is yielded again. Workers that `start` at different items seldom meet.
        """
        missing = [(start + i) % items for i in range(items)]
        while missing := [item for item in missing if not finished(item)]:
            with suppress(FileNotFoundError):  # all is done, and another worker removes it with what lies above it
                self.folder.mkdir(parents=True, exist_ok=True)
            idle = True
            for item in missing:
                if finished(item):
                    continue
                with self.claim(item) as ours:
                    if ours and not finished(item):
                        idle = False
                        yield item
            if idle:
                time.sleep(poll_s)

    @contextmanager
    def claim(self, item: int) -> Iterator[bool]:
        """Whether the item is ours now; if so it stays ours inside the block."""
        path = self._take(item)
        if path is None:
            yield False
            return
        ended = threading.Event()
        beat = threading.Thread(target=_beat, args=(path, ended), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            ended.set()
            beat.join()
            for claim in self._claims(item):  # ours, and those of the dead before us
                claim.unlink(missing_ok=True)

    def _take(self, item: int) -> Path | None:
        """Our claim, or None when a living worker has the item."""
        claims = self._claims(item)
        generation = int(claims[-1].name.split(".")[1]) + 1 if claims else 0
        path = self.folder / f"{item:05d}.{generation}.claim"
        draft = self.folder / f".{path.name}.{socket.gethostname()}.{os.getpid()}"
        try:
            draft.write_text(json.dumps({"machine": _machine(), "pid": os.getpid(), "born": _born(os.getpid())}))
            if claims and not self._void(claims[-1], now=draft.stat().st_mtime):
                return None
            os.link(draft, path)  # with its content at once, and for one of several only
        except (FileExistsError, FileNotFoundError):  # not found: all is done, and the folder was removed
            return None
        finally:
            draft.unlink(missing_ok=True)
        return path

    def _claims(self, item: int) -> list[Path]:
        """All claims on an item, the one that counts last."""
        return sorted(self.folder.glob(f"{item:05d}.*.claim"), key=lambda path: int(path.name.split(".")[1]))

    def _void(self, path: Path, now: float) -> bool:
        """Whether the worker of a claim is no more; `now` by the clock of the file system, which all share."""
        try:
            age, owner = now - path.stat().st_mtime, json.loads(path.read_text())
        except FileNotFoundError:
            return False  # given back this moment: the next round will see
        if owner["machine"] == _machine() and owner["born"]:
            return _born(owner["pid"]) != owner["born"]
        return age > self.lease_s


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with suppress(OSError):  # the disk hiccups: the worker goes on
            os.utime(path)


def _machine() -> str:
    """Name of the place where process numbers mean the same: a machine, or a container of it."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{os.readlink(namespace) if namespace.is_symlink() else ''}"


def _born(pid: int) -> str:
    """When a living process was started, in the kernel's ticks; empty when there is none, or no way to know."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # ended, but its parent has not asked yet
