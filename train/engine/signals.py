"""SIGTERM and SIGUSR1 become a wish to stop after the current step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # preemption, `scancel` and torchrun; `sbatch --signal=B:USR1@t`


@dataclass(slots=True)
class StopFlag:
    """What this process was told; other processes may have been told nothing, so ranks must agree on it."""

    name: str = ""  # of the last signal; empty: none came

    def __bool__(self) -> bool:
        return bool(self.name)


@contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Collect the signals that ask for a stop instead of dying of them; only in the main thread."""
    flag = StopFlag()

    def note(number: int, frame: FrameType | None) -> None:
        flag.name = signal.Signals(number).name

    previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
