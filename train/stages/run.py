"""The chain of stages: runs what is not done, skips the rest, and says at the end what came out.

    run_dir/.lock               held by the pipeline that works here
    run_dir/.stages/STAGE.json  what a stage was made from, what it left, its metrics and seconds; see `StageRecord`
    run_dir/logs/STAGE.log      its output
    run_dir/summary.json        all metrics and seconds, flat; beside it grid.png

This process stays light: it never imports torch.
"""

import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from rich.console import Console

from conf.errors import UserError
from conf.files import atomic_write
from conf.plain_json import dumps, read_object
from conf.process import collected_signals
from conf.schema import PipelineRun
from train.stages.calibration import Calibration
from train.stages.child import POLL_S, Child, alone_in, stop_signals
from train.stages.display import Display, StageRow, print_summary, tail
from train.stages.live_page import live_page
from train.stages.next_steps import print_next_steps
from train.stages.tasks import STAGES, StageCommand, Task, images_of, origin, plan_tasks
from train.stages.terminal_image import newest_image, protocol_of

SAVE_EVERY_S = 10.0  # a SIGKILL of the pipeline loses no more of a stage's time


@dataclass(slots=True)
class StageRecord:
    """What the pipeline keeps of a stage."""

    inputs: str = ""  # digest of its options and of what it read, when it was last finished
    outcome: str = ""  # digest of its proof then
    read: dict[str, str] = field(default_factory=dict)  # see `Task.read`
    seconds: float = 0.0  # over all its starts
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Self:
        """What is there; an empty one where there is none."""
        try:
            return cls(**read_object(path))
        except TypeError:  # of another version
            return cls()

    def holds(self) -> bool:
        """Whether the stage is finished and what it read is still the same."""
        return self.outcome != "" and all(origin(value) == digest for value, digest in self.read.items())

    def is_of(self, task: Task, inputs: str) -> bool:
        """Whether it is of a finished stage of these inputs, which has lost nothing since."""
        return self.inputs == inputs and self.outcome == task.outcome() and not task.outdated()

    def save(self, path: Path) -> None:
        """Write it, atomically."""
        atomic_write(path, dumps(asdict(self), indent=1).encode())


def run_stages(
    cfg: PipelineRun, overrides: Mapping[str, Sequence[str]], stages: Sequence[StageCommand] = STAGES
) -> int:
    """Bring all chosen stages to their ends; returns the exit status: 0, or 128 + the signal that asked for a stop.

    Args:
        cfg: options of the pipeline.
        overrides: of each stage, from the command line; they come after those in `cfg`.
        stages: what there is to choose from.

    Raises:
        UserError: an impossible option, another pipeline in the folder, or a stage that failed.

    """
    tasks, run_dir = plan_tasks(cfg, overrides, stages), Path(cfg.run_dir)
    rows = [StageRow(task.stage.name, task.samples) for task in tasks]
    console = Console(highlight=False)
    with collected_signals(stop_signals()) as received, alone_in(run_dir, received) as lock:
        calibration = Calibration(run_dir, tasks, cfg.calibrate and cfg.processes == 1)
        with (
            live_page(cfg, tasks, console, lock),
            closing(calibration),
            Display(rows, console, protocol_of(cfg.terminal_images, console)) as display,
        ):
            chain = _Chain(run_dir, cfg.processes, lock, received, display, calibration)
            chain.look_ahead(tasks)
            for task, row in zip(tasks, rows, strict=True):
                if not received:
                    chain.finish(task, row)
                    set_work(tasks, rows)
        if received:
            print(f"{received[0].name}: start the same line again to continue", file=sys.stderr, flush=True)
            return 128 + received[0]
        conclude(run_dir, tasks, stages, console)
        print_next_steps(console, tasks)
    return 0


@dataclass(frozen=True, slots=True)
class _Chain:
    """One start of the pipeline."""

    run_dir: Path
    processes: int
    lock: int  # descriptor that stages inherit
    received: list[signal.Signals]  # grows
    display: Display
    calibration: Calibration

    def look_ahead(self, tasks: Sequence[Task]) -> None:
        """Find out what earlier starts have left to do; what a stage finds when its turn comes counts more."""
        set_work(tasks, self.display.rows)
        for task, row in zip(tasks, self.display.rows, strict=True):
            record = StageRecord.load(record_path(self.run_dir, task.stage))
            row.finished = record.outcome != "" and record.is_of(task, task.inputs())
            if task.samples:
                row.begun = max((known["samples_seen"] for known in tail(task.output_dir / "metrics.jsonl")), default=0)
        self.display.expect(self.calibration.known())

    def finish(self, task: Task, row: StageRow) -> None:
        """Run a stage to its end unless it is there already; returns early after a signal."""
        path = record_path(self.run_dir, task.stage)
        record, inputs = StageRecord.load(path), task.inputs()
        if not task.output_dir.exists():
            record.seconds = 0.0  # of work that somebody deleted
        row.elapsed_s = record.seconds
        if record.is_of(task, inputs):
            self._show(row, "skipped")
            return
        row.begin()
        self.display.update()
        log, progress = self.run_dir / "logs" / f"{task.stage.name}.log", path.with_suffix(".progress")
        child = Child(task.stage.command(task.arguments, self.processes), log, self.lock, progress)
        self.calibration.start(self.lock)
        try:
            status = self._follow(child, task, row, record)
        except BaseException:
            child.stop()  # say, a full disk: nothing would look after it any more
            raise
        outcome = task.outcome() if status == 0 else ""
        if outcome:
            record.inputs, record.outcome, record.read = inputs, outcome, task.read()
            record.metrics = task.metrics()
            row.seen = row.seen if task.samples else row.total or row.seen  # it tells its progress only now and then
        record.save(path)
        self._show(row, "done" if outcome else "stopped" if self.received else "failed")
        if row.state == "failed":
            why = child.reason() if status else "somebody stopped it before its end; start the same line again"
            raise UserError(f"stage {task.stage.name}: {why} (log: {log})")

    def _follow(self, child: Child, task: Task, row: StageRow, record: StageRecord) -> int:
        """Wait for the child's end, which is its exit status; meanwhile show, count, and pass signals on."""
        before, began, since = record.seconds, time.monotonic(), time.time()
        status, saved = None, began
        while status is None:
            status = child.wait(POLL_S)
            if len(self.received) > child.stops:
                child.stop()
            row.elapsed_s = record.seconds = before + time.monotonic() - began
            if time.monotonic() - saved > SAVE_EVERY_S:
                saved = time.monotonic()
                record.save(record_path(self.run_dir, task.stage))
            row.read(task.output_dir, child.text(), since, child.told())
            self.display.expect(self.calibration.known())
            self.display.show(row.name, newest_image(task.output_dir), since)
            self.display.update()
        return status

    def _show(self, row: StageRow, state: str) -> None:
        row.state = state
        self.display.update()


def set_work(tasks: Sequence[Task], rows: Sequence[StageRow]) -> None:
    """Tell rows how much their stages have to do; a build that is finished tells those after it."""
    images = images_of(tasks)
    for task, row in zip(tasks, rows, strict=True):
        row.work = task.work(images)


def record_path(run_dir: Path, stage: StageCommand) -> Path:
    """Where the record of a stage is kept."""
    return run_dir / ".stages" / f"{stage.name}.json"


def conclude(run_dir: Path, tasks: Sequence[Task], stages: Sequence[StageCommand], console: Console) -> None:
    """Leave summary.json and grid.png, and print what is in them and where things are.

    What an earlier start with other `stages=` finished is in the summary, too, unless it is of other inputs.
    """
    metrics: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for stage in stages:
        record = StageRecord.load(record_path(run_dir, stage))
        if record.holds():
            metrics |= record.metrics
            seconds[f"seconds/{stage.name}"] = round(record.seconds, 1)
    summary = metrics | seconds | {"seconds/total": round(sum(seconds.values()), 1)}
    paths = {task.stage.name: task.output_dir for task in tasks} | {"summary": run_dir / "summary.json"}
    atomic_write(paths["summary"], dumps(summary, indent=1).encode())
    grids = [paths[name] / "grid.png" for name in ("evaluate", "sample") if name in paths]
    grid = next((path for path in grids if path.is_file()), None)
    if grid is not None:
        paths["grid"] = run_dir / "grid.png"
        atomic_write(paths["grid"], grid.read_bytes())
    print_summary(console, paths, summary)
