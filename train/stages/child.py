"""A stage as a child process: its log, the signals that reach it, and why it failed."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from conf.errors import UserError
from conf.process import PROGRESS_FILE, Told, die_with_parent, lock
from train.stages.display import tail_text

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_S = 0.5
RAISED = re.compile(r"([\w.]*(Error|Exception|Interrupt)\b.*|Signal \d+ \(SIG\w+\) received by PID \d+.*)")
RANK = re.compile(r"^(\[(default|rank)?\d+\]: ?)+|^\s*traceback : ")  # what torchrun and torch put before a line


class Child:
    """Runs a command; its output is appended to a log.

    It does not outlive this process: when this one is killed, the system sends it SIGTERM. It is a process group of
    its own, so that Ctrl-C reaches it once, as SIGTERM and through `stop`.

    Args:
        command: program and arguments.
        log: file for its output.
        keep: a descriptor that it inherits, and with it the lock.
        progress: file in which it tells how far it is; what an earlier start told is removed.

    """

    def __init__(self, command: Sequence[str], log: Path, keep: int, progress: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        progress.unlink(missing_ok=True)
        self.log, self.progress, self.stops = log, progress.absolute(), 0
        with log.open("ab") as file:
            file.write(f"--- {time.strftime('%F %T')} {shlex.join(command)}\n".encode())
            file.flush()
            self.start = file.tell()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1", PROGRESS_FILE: str(self.progress)},
                process_group=0,
                pass_fds=[keep],
                preexec_fn=die_with_parent(),
            )

    def wait(self, seconds: float) -> int | None:
        """The exit status of the child, or None when it still runs after a while."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """Ask it to write its checkpoint and end; a second time: end it, and what it started, at once."""
        self.stops += 1
        if self.stops == 1:
            self.process.terminate()
        else:
            for pid in [*_descendants(self.process.pid), self.process.pid]:
                _kill(pid)

    def told(self) -> Told | None:
        """How far it says that it is."""
        return Told.read(self.progress)

    def text(self) -> str:
        """The end of what it has put out so far."""
        return tail_text(self.log, self.start)

    def reason(self) -> str:
        """Why it failed, in one line."""
        text = [RANK.sub("", line).strip() for line in self.text().split("\n")]
        lines = [line for line in text if line]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raised = [line for line in lines if RAISED.match(line) and "ChildFailedError" not in line]
        status = self.process.returncode
        if errors or raised:
            return (errors or raised)[-1]
        if status < 0:
            hint = ": out of memory?" if status == -signal.SIGKILL else ""
            return f"ended by {signal.Signals(-status).name}{hint}"
        return lines[-1] if lines else f"exit status {status}"


def _descendants(pid: int) -> list[int]:
    """Children and theirs, as far as the system tells; torchrun puts each of its own into another session."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def stop_signals() -> list[signal.Signals]:
    """The signals that ask for an end, but for those that nohup, or a shell's background, had this process ignore."""
    return [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def alone_in(run_dir: Path, received: Sequence[signal.Signals]) -> Iterator[int]:
    """Hold a run folder; yields the descriptor that its stages inherit.

    Two locks: one for the pipeline, and one that lives as long as any stage, which after a kill of the pipeline may
    still be writing its last checkpoint.

    Raises:
        UserError: another pipeline works in the folder.

    """
    (run_dir / ".stages").mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("a") as ours, (run_dir / ".stages" / ".lock").open("a") as of_stages:
        if not lock(ours.fileno()):
            raise UserError(f"run_dir={run_dir}: another pipeline works there; wait for its end or set another run_dir")
        if not lock(of_stages.fileno()):
            print("waiting for a stage that an earlier pipeline left behind", file=sys.stderr, flush=True)
            while not received and not lock(of_stages.fileno()):
                time.sleep(POLL_S)
        yield of_stages.fileno()
