"""The one loop of all trainings: step, log, checkpoint, evaluate, stop on a signal; then export and DONE."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from conf.entry import to_plain
from data.loader import batches
from train.engine.checkpoint import Checkpoints
from train.engine.files import staged
from train.engine.meter import Meter
from train.engine.metric_log import MetricLog, say
from train.engine.runtime import Runtime
from train.engine.signals import StopFlag, stop_on_signal
from train.engine.state import (
    Outcome,
    Stage,
    State,
    architecture_of,
    config_digest,
    read_done,
    require_same_run,
    write_done,
)
from train.engine.step import Cfg, Diverged, Stepper, gauges, own_seconds, require_learned
from train.engine.watchdog import Watchdog


def fit(stage: Stage, cfg: Cfg, runtime: Runtime) -> Outcome:
    """Train a stage to `loop.samples`, from its newest checkpoint if there is one.

    Raises:
        UserError: batch or data set too small, the folder holds another run, or too many steps were not finite.
        OSError: a checkpoint could not be written; the previous ones are as they were.
    """
    output_dir, config = Path(cfg.output_dir), to_plain(cfg)
    architecture = architecture_of(config, stage.trainables)
    fresh = State(architecture=architecture, data=stage.dataset.digest, config=config_digest(config))
    record = config | {"hardware": runtime.hardware()}  # which may be another one at the next start
    done = read_done(output_dir, cfg.loop.samples)
    if done is not None:
        require_same_run(done, fresh, output_dir)
        if runtime.is_main:
            say(stage.name, f"already done at {done['samples_seen']:,} samples: {output_dir / 'DONE'}")
        return Outcome(finished=True, samples_seen=done["samples_seen"], metrics=done["metrics"])
    diverged_at, watchdog = 0, Watchdog(runtime, output_dir / "hang", cfg.runtime.watchdog_s)
    with Checkpoints(output_dir, runtime, cfg.loop) as checkpoints, stop_on_signal() as stop, watchdog:
        while True:
            state = checkpoints.resume(stage.trainables, fresh)
            journal = MetricLog(output_dir, cfg.wandb, stage.name, record, runtime.is_main, state.samples_seen)
            try:
                return _Training(stage, cfg, runtime, checkpoints, state, journal, stop, watchdog).run()
            except Diverged as error:
                # Once more from the last checkpoint: a machine's fault does not come again, one of the data does, and
                # what no sound step has interrupted is the same one, however many checkpoints were made meanwhile.
                checkpoints.wait()
                if error.began < diverged_at or not checkpoints.any():
                    raise
                diverged_at = error.samples_seen
                if runtime.is_main:
                    say(stage.name, f"{diverged_at:>11,}  back to the last checkpoint, once")


@dataclass(slots=True)
class _Training:
    stage: Stage
    cfg: Cfg
    runtime: Runtime
    checkpoints: Checkpoints
    state: State  # where to begin; follows the run
    journal: MetricLog
    stop: StopFlag
    watchdog: Watchdog
    clock: float = 0.0  # when the state's times were brought up to date

    def run(self) -> Outcome:
        """From `state` to the end of the run or to a signal, with the journal closed after it."""
        state, batch, exit_code = self.state, self.cfg.batch, 1
        try:
            place = (self.runtime.rank, self.runtime.world, state.samples_seen, batch.workers)
            micro, _ = batch.split(self.runtime.world)
            source = batches(self.stage.dataset, batch.global_batch_size, micro, *place)  # refuses too few samples
            state.wandb_run_id, self.clock = self.journal.run_id, time.monotonic()
            if self.runtime.is_main and state.samples_seen:
                say(self.stage.name, f"continues from the checkpoint at {state.samples_seen:,} samples")
            outcome = self._steps(Stepper(self.stage, self.cfg, self.runtime, source, self.watchdog))
            exit_code = 0
        finally:
            self.journal.finish(exit_code)
        return outcome

    def _steps(self, stepper: Stepper) -> Outcome:
        state, loop, meter = self.state, self.cfg.loop, Meter(self.state.interval)
        while state.samples_seen < loop.samples:
            if self._due(loop.evaluate_every):  # before the step: a kill during an evaluation costs only that
                self._evaluate()
            stopping = self._step(stepper, meter)
            over = state.samples_seen >= loop.samples
            if over or self._due(loop.log_every):
                self._log(meter)
            if over or stopping or self._due(loop.checkpoint_every):
                self.watchdog.note("at a checkpoint")
                state.interval = meter.state(self.runtime)
                self.checkpoints.save(self.stage.trainables, state, wait=over or stopping)
            if stopping:
                return self._stopped()
        metrics = self._evaluate()
        require_learned(self.stage, metrics)
        self.watchdog.note("exporting")
        with staged(Path(self.cfg.output_dir) / "export", self.runtime) as folder:
            self.stage.export(folder)
        if self.runtime.is_main:
            write_done(Path(self.cfg.output_dir), state, metrics)
        self.runtime.barrier()
        return Outcome(finished=True, samples_seen=state.samples_seen, metrics=metrics)

    def _step(self, stepper: Stepper, meter: Meter) -> bool:
        """One optimiser step; True when a process was asked to stop."""
        sound, stopping = stepper.forward_backward(meter, self.state.samples_seen), False
        # One exchange in an ordinary step, so that all processes decide alike.
        if self.runtime.any(bool(self.stop) or not sound or self.checkpoints.failed):
            self.checkpoints.wait()
            stopping = self.runtime.any(bool(self.stop))
            sound = not self.runtime.any(not sound)
        self.state.samples_seen += self.cfg.batch.global_batch_size
        stepper.update(meter, sound, self.state.samples_seen)
        self.state.pass_time(time.monotonic() - self.clock, self.runtime.world)
        self.clock = time.monotonic()
        return stopping

    def _log(self, meter: Meter) -> None:
        state, stage = self.state, self.stage
        left, own_s = max(0, self.cfg.loop.samples - state.samples_seen), own_seconds(stage)
        metrics = meter.report(self.runtime, left, own_s, stage.flops_per_sample) | gauges(stage)
        self.journal.log(state.samples_seen, metrics | {"perf/device_hours": state.device_hours})

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
        self.watchdog.note("evaluating")
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
