"""Processes: torchrun's command line, signals that ask for an end, locks, CPUs, and children: progress and end."""

import ctypes
import fcntl
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from types import FrameType

SHUTDOWN_S = 600  # that torchrun gives its processes for their checkpoint, before it kills them
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
BUSY_LOOPS = "10000"  # before a waiting thread sleeps, of 20 ns or so each; GNU's own choice is 300,000
PROGRESS_FILE = "PROGRESS_FILE"  # in a child's environment: the file in which it tells how far it is
TELL_EVERY_S = 2.0


def python(processes: int) -> list[str]:
    """The beginning of a command line: python, under torchrun where there are several processes."""
    if processes == 1:
        return [sys.executable]
    # The address: torchrun else asks the name server for this machine's, which may not know it.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return [sys.executable, *torchrun, f"--nproc-per-node={processes}", f"--shutdown-timeout={SHUTDOWN_S}"]


@dataclass(frozen=True, slots=True)
class Told:
    """How far a process is."""

    doing: str  # in words: "training"
    done: int  # of `total`
    total: int  # 0: not known
    at: float  # seconds of the clock that never jumps; all processes of a machine have the same

    @classmethod
    def read(cls, path: Path) -> "Told | None":
        """What the process has told last; None where it has told nothing."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None


class Heartbeat:
    """Tells whoever started this process how far it is, every few seconds; to nobody without $PROGRESS_FILE.

    Of several processes of a training the first one tells. No work ends because the file cannot be written.
    """

    def __init__(self) -> None:
        self.doing, self.at = "", -math.inf

    def __call__(self, doing: str, done: int = 0, total: int = 0) -> None:
        """Tell it if something else began, or if it is time to."""
        path, now = os.environ.get(PROGRESS_FILE), time.monotonic()
        if not path or os.environ.get("RANK", "0") != "0" or (doing == self.doing and now - self.at < TELL_EVERY_S):
            return
        self.doing, self.at = doing, now
        with suppress(OSError):  # not `atomic_write`: what is lost with the machine is of no use after it
            draft = Path(f"{path}.tmp")
            draft.write_text(json.dumps(asdict(Told(doing, done, total, now))))
            draft.replace(path)


tell = Heartbeat()


def die_with_parent() -> Callable[[], None]:
    """What a new process calls before it becomes another program, so that it is asked to end when this one dies.

    The C library is loaded here, since after a fork little is safe. Only Linux knows such a request.
    """
    if sys.platform != "linux":
        return lambda: None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # it was killed before this could be asked
            os._exit(1)

    return ask


def end_with_parent() -> None:
    """End this worker of multiprocessing when the process that started it was killed: nobody else would."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def handled_signals(numbers: Collection[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have signals handled inside the block; only in the main thread."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def collected_signals(numbers: Collection[int]) -> Iterator[list[signal.Signals]]:
    """The signals that came, in their order, instead of dying of them; the list grows. Only in the main thread."""
    received: list[signal.Signals] = []
    with handled_signals(numbers, lambda number, frame: received.append(signal.Signals(number))):
        yield received


def lock(descriptor: int) -> bool:
    """Lock an open file or folder for as long as any process has it open; False where another one holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a network file system without locks: one process at a time is then the user's care
    return True


def wait_for_lock(descriptor: int) -> None:
    """Lock an open file or folder once no other process holds it."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def wait_briefly() -> None:
    """Have OpenMP's threads wait for each other in a busy loop for some 0.2 ms instead of 6; before torch is imported.

    On a machine of their own they wait less than that. Where another process has the core of one of them, the others
    then sleep instead of keeping it from a core of theirs. Who has set one of the variables has chosen.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = BUSY_LOOPS


def usable_cpus(process: int = 0) -> set[int]:
    """Numbers of the CPUs that a process, by default this one, may run on: containers and SLURM may leave it some."""
    return os.sched_getaffinity(process) if sys.platform == "linux" else set(range(os.cpu_count() or 1))


def cores() -> int:
    """CPUs of this process: its share of those that it and the other processes of a machine may use."""
    ours = usable_cpus()
    # torchrun, which started all of them, has the CPUs of all; it may have bound each to some of them.
    theirs = usable_cpus(os.getppid()) if processes_here() > 1 else ours
    return max(1, int(min(len(ours), min(len(theirs), cpu_quota()) / processes_here())))


def processes_here() -> int:
    """Processes of this command on this machine, as torchrun says; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def machines() -> int:
    """Machines that the processes of this command run on, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) // processes_here() or 1


def node_name() -> str:
    """What SLURM calls this machine; without SLURM its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def suspect(nodes: Iterable[str]) -> None:
    """Name the nodes that end this run for its batch script, which requeues the job without them.

    With none named it is requeued as it is, since nobody could tell which one it was.
    """
    if path := os.environ.get("SUSPECTS_FILE"):
        Path(path).write_text("".join(f"{node}\n" for node in nodes))


def cpu_quota(root: Path = Path("/")) -> float:
    """Seconds of CPU time per second that the control groups of this process grant it; infinite without a limit.

    `docker run --cpus=1` sets such a limit: all CPUs are usable then, yet no more than one at a time on average.
    """
    quotas = [math.inf]
    with suppress(OSError):  # another system than Linux
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)  # those of the second version have no controllers named
            if controllers and "cpu" not in controllers.split(","):
                continue
            group = Path(path.lstrip("/"))
            for folder in (group, *group.parents):  # a container may see the group of its own as the uppermost
                quotas.append(_quota(root / "sys/fs/cgroup" / ("cpu" if controllers else "") / folder))
    return min(quotas)


def _quota(group: Path) -> float:
    """The limit of one control group, of either version."""
    with suppress(OSError, ValueError):  # "max" is no number
        quota, period = map(int, (group / "cpu.max").read_text().split())
        return quota / period
    with suppress(OSError):
        quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else math.inf  # -1: no limit
    return math.inf
