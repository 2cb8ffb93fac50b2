"""How far a command is that takes a while: a line that is rewritten on a terminal, else one now and then."""

import time
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from conf.process import tell

LINE_EVERY_S = 10.0  # where there is no terminal


class Progress:
    """Counts what is done, with the speed since the start and the time left.

    Args:
        stage: begins each line, as those of the journal.
        total: how much there is to do.
        unit: what is counted, in the plural.
        console: where to write; None: the standard output.
        shown: False writes nothing, on all but the main process.
        doing: what a pipeline is told that it does.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        unit: str,
        console: Console | None = None,
        *,
        shown: bool = True,
        doing: str = "drawing",
    ) -> None:
        self.stage, self.total, self.unit, self.shown, self.doing = stage, total, unit, shown, doing
        self.console = console or Console(highlight=False)
        self.live = live_on(self.console, transient=True)
        self.began = self.told_at = time.monotonic()
        self.told = 0

    def __enter__(self) -> Self:
        if self.live is not None and self.shown:
            self.live.start()
        self.update(0)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live is not None and self.shown:
            self.live.stop()

    def update(self, done: int) -> None:
        """Tell it if it is time to."""
        if not self.shown:
            return
        tell(self.doing, done, self.total)
        now = time.monotonic()
        if self.live is not None:
            self.live.update(self.line(done, now - self.began), refresh=True)
        elif done != self.told and now - self.told_at > LINE_EVERY_S:
            self.told, self.told_at = done, now
            self.console.print(self.line(done, now - self.began), soft_wrap=True)

    def line(self, done: int, seconds: float) -> Text:
        """What is known after so many seconds."""
        known = [f"{done:,}/{self.total:,} {self.unit}"]
        if done and seconds > 0:
            left = duration((self.total - done) * seconds / done)
            known += [f"{done / seconds:.3g} {self.unit}/s", f"{left} left"]
        return Text.assemble((f"{self.stage:<12}", "bold cyan"), "  ".join(known))


def live_on(console: Console, transient: bool = False) -> Live | None:
    """Lines that are drawn again at each update, and at the end left or removed; None where there is no terminal."""
    # No thread that draws by itself: a process with threads should not fork.
    return Live(console=console, auto_refresh=False, transient=transient) if console.is_terminal else None


def duration(seconds: float) -> str:
    """`m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
