"""The one loop of all trainings: fetch, step, log, checkpoint, evaluate, stop on a signal; then export and DONE."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from conf.errors import UserError
from conf.schema import AutoencoderRun, ClipRun, UNetRun
from data.loader import batches
from train.engine.checkpoint import Checkpoints, staged
from train.engine.journal import Journal, say
from train.engine.meter import Meter, left_out
from train.engine.runtime import Runtime
from train.engine.signals import StopFlag, stop_on_signal
from train.engine.state import Outcome, Stage, State, architecture_of, digest, read_done, require_same_run, write_done

Cfg = AutoencoderRun | ClipRun | UNetRun


def run(stage: Stage, cfg: Cfg, runtime: Runtime) -> Outcome:
    """Train a stage to `loop.samples`, from its newest checkpoint if there is one.

    Raises:
        UserError: batch or data set too small, the folder holds another run, or the loss is not finite.
        OSError: a checkpoint could not be written; the previous ones are as they were.

    """
    output_dir = Path(cfg.output_dir)
    config: Any = OmegaConf.to_container(OmegaConf.structured(cfg), resolve=True, enum_to_str=True)
    state = State(
        architecture=architecture_of(config, stage.trainables),
        data=stage.dataset.digest,
        config=digest(config),
    )
    done = read_done(output_dir, cfg.loop.samples)
    if done is not None:
        require_same_run(done, state, output_dir)
        if runtime.is_main:
            say(stage.name, f"already done at {done['samples_seen']:,} samples: {output_dir / 'DONE'}")
        return Outcome(finished=True, samples_seen=done["samples_seen"], metrics=done["metrics"])
    checkpoints = Checkpoints(output_dir, runtime, cfg.loop)
    state = checkpoints.resume(stage.trainables, state)
    batch, (micro, _) = cfg.batch, cfg.batch.split(runtime.world)
    place = (runtime.rank, runtime.world, state.samples_seen, batch.workers)
    source = batches(stage.dataset, batch.global_batch_size, micro, *place)  # refuses too few samples
    journal = Journal(output_dir, cfg.wandb, stage.name, config, runtime.is_main, state.samples_seen)
    state.wandb_run_id = journal.run_id
    if runtime.is_main and state.samples_seen:
        say(stage.name, f"continues from the checkpoint at {state.samples_seen:,} samples")
    exit_code = 1
    try:
        with stop_on_signal() as stop, checkpoints:
            outcome = _Training(stage, cfg, runtime, source, checkpoints, state, journal, stop).run()
        exit_code = 0
    finally:
        journal.finish(exit_code)
    return outcome


@dataclass(slots=True)
class _Training:
    stage: Stage
    cfg: Cfg
    runtime: Runtime
    source: Iterator[dict[str, Any]]  # this process's micro-batches from `state` on
    checkpoints: Checkpoints
    state: State  # where to begin; follows the run
    journal: Journal
    stop: StopFlag

    def run(self) -> Outcome:
        """Steps from `state` to the end of the run or to a signal."""
        state, loop, runtime = self.state, self.cfg.loop, self.runtime
        meter, began = Meter(state.interval), time.monotonic() - state.seconds
        while state.samples_seen < loop.samples:
            if self._due(loop.evaluate_every):  # before the step: a kill during an evaluation costs only that
                self._evaluate()
            stopping = self._step(meter)
            over = state.samples_seen >= loop.samples
            if over or self._due(loop.log_every):
                self.journal.log(state.samples_seen, meter.report(runtime, max(0, loop.samples - state.samples_seen)))
            if over or stopping or self._due(loop.checkpoint_every):
                state.seconds, state.interval = time.monotonic() - began, meter.state(runtime)
                self.checkpoints.save(self.stage.trainables, state, wait=over or stopping)
            if stopping:
                return self._stopped()
        metrics = self._evaluate()
        state.seconds = time.monotonic() - began
        with staged(Path(self.cfg.output_dir) / "export", runtime) as folder:
            self.stage.export(folder)
        if runtime.is_main:
            write_done(Path(self.cfg.output_dir), state, metrics)
        runtime.barrier()
        return Outcome(finished=True, samples_seen=state.samples_seen, metrics=metrics)

    def _step(self, meter: Meter) -> bool:
        """One optimiser step; True when a process was asked to stop."""
        begin, wait_s, sound, seen = time.perf_counter(), 0.0, True, self.state.samples_seen
        micro, accumulation = self.cfg.batch.split(self.runtime.world)
        for index in range(accumulation):
            asked = time.perf_counter()
            batch = next(self.source)
            wait_s += time.perf_counter() - asked
            meter.add(left_out(self.stage.name, batch, micro))
            metrics = self.stage.micro_step(batch, index == accumulation - 1, seen)
            sound &= all(bool(v.isfinite().all()) for name, v in metrics.items() if name.endswith("loss"))
            meter.add(metrics)
        stopping = False
        if self.runtime.any(bool(self.stop) or not sound or self.checkpoints.failed):  # all processes decide alike
            self.checkpoints.wait()
            stopping = self.runtime.any(bool(self.stop))
            if self.runtime.any(not sound):
                raise UserError(
                    f"{self.stage.name}: the loss is not finite at samples_seen={seen}: lower optim.lr, set "
                    "optim.grad_clip or runtime.precision=fp32; a new start continues from the last checkpoint"
                )
        size = self.cfg.batch.global_batch_size
        meter.add(self.stage.finish_step(seen + size))
        meter.tick(size, time.perf_counter() - begin, wait_s)
        self.state.samples_seen += size
        return stopping

    def _due(self, every: int) -> bool:
        """Whether the step before this moment passed a multiple of `every` samples."""
        seen = self.state.samples_seen
        return seen > 0 and seen // every > (seen - self.cfg.batch.global_batch_size) // every

    def _evaluate(self) -> dict[str, float]:
        """Metrics of this moment: from the journal when an earlier start got as far."""
        seen = self.state.samples_seen
        recorded: dict[str, float] = self.runtime.gather_objects(self.journal.recorded(seen))[0]
        if recorded:
            return recorded
        metrics = self.stage.evaluate(seen, self.journal)
        self.journal.log(seen, metrics)
        return metrics

    def _stopped(self) -> Outcome:
        marker = os.environ.get("REQUEUE_FILE")  # the batch script that set it submits the job again
        if self.runtime.is_main:
            say(self.stage.name, f"{self.stop.name or 'a signal'}: stopped at {self.state.samples_seen:,} samples")
            if marker:
                Path(marker).touch()
        self.runtime.barrier()
        return Outcome(finished=False, samples_seen=self.state.samples_seen)
