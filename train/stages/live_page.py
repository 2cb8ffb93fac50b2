"""The page of a run, served beside the pipeline as long as it runs; it computes nothing until somebody looks."""

import shlex
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.text import Text

from conf.overrides import argument
from conf.schema import PipelineRun, ReportRun
from train.stages.child import Child
from train.stages.next_steps import line
from train.stages.tasks import ROOT, Task

SCRIPT = "train/report.py"
HOST = "127.0.0.1"


@contextmanager
def live_page(cfg: PipelineRun, tasks: Sequence[Task], console: Console, keep: int) -> Iterator[None]:
    """Serve the page inside the block and say where; without a terminal say what would serve it.

    Args:
        cfg: says whether it is wanted.
        tasks: say where the images are.
        console: gets the line.
        keep: as of `Child`.

    """
    what = page_of(cfg, tasks)
    if not cfg.live:
        yield
        return
    if not console.is_terminal:
        console.print(Text(f"live page: {line(SCRIPT, *what, 'live=true')}"), soft_wrap=True)
        yield
        return
    port, folder = free_port(), Path(cfg.run_dir)
    command = [sys.executable, str(ROOT / SCRIPT), *shlex.split(" ".join(what)), "live=true", f"port={port}"]
    child = Child(command, folder / "logs" / "live_page.log", keep, folder / ".stages" / "live_page.progress")
    address = f"http://{HOST}:{port}"
    console.print(Text("live page: ").append(address, style=f"link {address}"))
    try:
        yield
    finally:
        child.stop()
        child.process.wait()


def page_of(cfg: PipelineRun, tasks: Sequence[Task]) -> list[str]:
    """Arguments of `train/report.py`, for a shell: the run, and its images where they are another one's."""
    found = {shards for task in tasks if (shards := getattr(task.cfg, "shards", None))} - {f"{cfg.run_dir}/shards"}
    return [argument("run_dir", cfg.run_dir), *(argument("shards", shards) for shards in sorted(found)[:1])]


def free_port() -> int:
    """The usual port of the page, or another one where that is taken."""
    usual = next(option.default for option in fields(ReportRun) if option.name == "port")
    for port in (usual, 0):
        with suppress(OSError), socket.create_server((HOST, port)) as listening:
            found: int = listening.getsockname()[1]
            return found
    raise OSError("no free port")
