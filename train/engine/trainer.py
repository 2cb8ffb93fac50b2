"""The training loop of all networks: micro-batches, optimiser step, log, checkpoint, evaluation; then export and DONE.

`fit` finds where a run begins and gives one that diverged a second chance; `train` is the loop itself, in one piece.

All processes run it in step, since backward passes, logs, checkpoints and evaluations are collective. What decides
about one of these is therefore either a function of `samples_seen`, the same everywhere, or exchanged first.
"""

import math
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from conf.entry import to_plain
from conf.errors import UserError
from conf.files import atomic_folder
from conf.process import collected_signals, tell
from conf.schema import AutoencoderRun, ClipRun, DistillRun, LoopConfig, UNetRun
from data.loader import batches
from data.order import micro_batch_weights
from train.engine.checkpoint import Checkpoints
from train.engine.meter import Meter, StepProfile, left_out, peak_memory_gib
from train.engine.metric_log import MetricLog, say
from train.engine.runtime import Late, Runtime
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
from train.engine.watchdog import LOADING, STEP, Watchdog

Cfg = AutoencoderRun | ClipRun | DistillRun | UNetRun
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # preemption, `scancel` and torchrun; `sbatch --signal=B:USR1@t`
NAMED = 5  # samples that an error names


class Diverged(UserError):
    """Steps in a row whose loss or gradients were not finite; the weights are those before the first of them."""

    def __init__(self, stage: str, steps: int, began: int, samples_seen: int, samples: list[str]) -> None:
        self.began, self.samples_seen = began, samples_seen  # before the first of them, and after the last
        more = " and more" if len(samples) > NAMED else ""
        where = f"the losses of {', '.join(samples[:NAMED])}{more}" if samples else "the gradients"
        super().__init__(
            f"{stage}: {where} were not finite in {steps} steps in a row up to samples_seen={samples_seen}: lower "
            "optim.lr, set optim.grad_clip or runtime.precision=fp32, or leave these samples out; a new start "
            "continues from the last checkpoint"
        )


NOW_AND_THEN = ("log", "evaluate", "checkpoint")


class Intervals:
    """When to log, to evaluate and to write a checkpoint: every so many samples, but not before so many seconds.

    The main process's clock decides: what it calls ripe goes with the flags of a step, and all know it a step later.

    Args:
        batch_size: samples of a step.
    """

    def __init__(self, loop: LoopConfig, batch_size: int) -> None:
        self.batch_size, self.keep_best = batch_size, loop.keep_best is not None
        self.every = {"log": loop.log_every, "evaluate": loop.evaluate_every, "checkpoint": loop.checkpoint_every}
        evaluate_s, checkpoint_s = loop.evaluate_every_s, loop.checkpoint_every_s
        self.floors_s = {"log": loop.log_every_s, "evaluate": evaluate_s, "checkpoint": checkpoint_s}
        now = time.monotonic()
        self.done_at = {"log": -math.inf, "evaluate": now, "checkpoint": now}
        # At the last step that is known.
        self.ripe = {name: name == "log" or floor == 0 for name, floor in self.floors_s.items()}

    def due(self, samples_seen: int) -> set[str]:
        """Of what the step that ended at `samples_seen` passed a multiple of samples; nothing before the first."""
        before = max(0, samples_seen - self.batch_size)
        return {name for name, every in self.every.items() if samples_seen // every > before // every}

    def wanted(self, samples_seen: int) -> set[str]:
        """What is due and ripe then; a checkpoint also for an evaluation that may be the best."""
        wanted = {name for name in self.due(samples_seen) if self.ripe[name]}
        return wanted | {"checkpoint"} if self.keep_best and "evaluate" in wanted else wanted

    def ripe_now(self) -> list[bool]:
        """Whether each was long enough ago, by this process's clock."""
        return [time.monotonic() - self.done_at[name] >= self.floors_s[name] for name in NOW_AND_THEN]

    def done(self, name: str) -> None:
        """It was, this moment."""
        self.done_at[name] = time.monotonic()


class Verdict(NamedTuple):
    """How a step went, on all processes but for `finite`."""

    asked: bool  # whether a signal asked for a stop
    failed: bool  # whether a checkpoint could not be written
    writing: bool  # whether a process still writes its part of one
    unsound: bool  # whether a loss was not finite
    ripe: dict[str, bool]  # by the name of what is done now and then, whether it was long enough ago
    finite: list[bool]  # whether those of this process's micro-batches were
    metrics: dict[str, float]  # of the optimiser's step

    @property
    def taken(self) -> bool:
        """Whether it changed the weights."""
        return not self.unsound and all(map(math.isfinite, self.metrics.values()))


class Begun:
    """A step that was launched; one step later the device has told how it went, and nobody waits for it.

    Args:
        samples_seen: with it.
        measured: metrics of each micro-batch.
        keys: samples of each micro-batch.
        finite: of each micro-batch, whether its losses are, [accumulation].
        raised: the first four of a verdict, and what is ripe, [4 + 3].
        metrics: of the optimiser's step.
    """

    def __init__(
        self,
        samples_seen: int,
        measured: list[dict[str, Tensor]],
        keys: list[list[str]],
        finite: Tensor,
        raised: Tensor,
        metrics: Mapping[str, Tensor | float],
    ) -> None:
        self.samples_seen, self.measured, self.keys, self.metrics = samples_seen, measured, keys, metrics
        self.names = [name for name, value in metrics.items() if isinstance(value, Tensor)]
        told = [metrics[name].double().view(1) for name in self.names]  # type: ignore[union-attr]
        self.numbers = Late(torch.cat([raised.double(), finite.double(), *told]))

    def verdict(self) -> Verdict:
        """How it went; waits until that is known."""
        asked, failed, writing, unsound, *rest = self.numbers.read()
        clocks, rest = rest[: len(NOW_AND_THEN)], rest[len(NOW_AND_THEN) :]
        ripe = dict(zip(NOW_AND_THEN, map(bool, clocks), strict=True))
        finite, told = rest[: len(self.keys)], dict(zip(self.names, rest[len(self.keys) :], strict=True))
        metrics = {name: told[name] if name in told else float(value) for name, value in self.metrics.items()}
        flags = {"asked": asked, "failed": failed, "writing": writing, "unsound": unsound}
        sound = [bool(one) for one in finite]
        return Verdict(**{n: bool(flag) for n, flag in flags.items()}, ripe=ripe, finite=sound, metrics=metrics)


def fit(stage: Stage, cfg: Cfg, runtime: Runtime) -> Outcome:
    """Train a stage to `loop.samples`, from its newest checkpoint if there is one.

    Raises:
        UserError: batch or data set too small, the folder holds another run, or too many steps were not finite.
        OSError: a checkpoint could not be written; the previous ones are as they were.
    """
    output_dir, config = Path(cfg.output_dir), to_plain(cfg)
    architecture = architecture_of(config, stage.trainables) | stage.bound_to
    fresh = State(architecture=architecture, data=stage.dataset.digest, config=config_digest(config))
    record = config | {"hardware": runtime.hardware()}  # which may be another one at the next start
    done = read_done(output_dir, cfg.loop.samples)
    if done is not None:
        require_same_run(done, fresh, output_dir)
        if runtime.is_main:
            say(stage.name, f"already done at {done['samples_seen']:,} samples: {output_dir / 'DONE'}")
        return Outcome(finished=True, samples_seen=done["samples_seen"], metrics=done["metrics"])
    end_after_s = cfg.runtime.timeout_s if cfg.runtime.watchdog_ends else None
    diverged_at, watchdog = 0, Watchdog(runtime, output_dir / "hang", cfg.runtime.watchdog_s, end_after_s)
    with Checkpoints(output_dir, runtime, cfg.loop) as checkpoints, collected_signals(STOP_SIGNALS) as asked, watchdog:
        while True:
            state = checkpoints.resume(stage.trainables, fresh)
            journal = MetricLog(output_dir, cfg.wandb, stage.name, record, runtime.is_main, state.samples_seen)
            try:
                with journal:
                    return train(stage, cfg, runtime, state, checkpoints, journal, asked, watchdog)
            except torch.OutOfMemoryError as error:
                raise UserError(out_of_memory(stage, cfg, runtime, error)) from None
            except Diverged as error:
                # Once more from the last checkpoint: a machine's fault does not come again, one of the data does, and
                # what no sound step has interrupted is the same one, however many checkpoints were made meanwhile.
                checkpoints.wait()
                if error.began < diverged_at or not checkpoints.any():
                    raise
                diverged_at = error.samples_seen
                if runtime.is_main:
                    say(stage.name, f"{diverged_at:>11,}  back to the last checkpoint, once")


def train(
    stage: Stage,  # what a micro-batch teaches
    cfg: Cfg,
    runtime: Runtime,
    state: State,  # where to begin; follows the run
    checkpoints: Checkpoints,
    journal: MetricLog,
    asked: Sequence[signal.Signals],  # signals that asked this process to stop, as they come
    watchdog: Watchdog,  # is told what begins, so that it can say where a process hangs
) -> Outcome:
    """From `state` to the end of the run, or to a signal."""
    loop, batch_size = cfg.loop, cfg.batch.global_batch_size
    micro_batch_size, accumulation = cfg.batch.split(runtime.world)
    weights = micro_batch_weights(batch_size, runtime.rank, runtime.world, micro_batch_size)
    place = (runtime.rank, runtime.world, state.samples_seen, runtime.loaders(cfg.batch.workers))
    # Refuses too few samples.
    source = batches(stage.dataset, batch_size, micro_batch_size, *place, extend=stage.extend)
    profile = StepProfile(runtime, Path(cfg.output_dir) / "profile" if cfg.runtime.profile else None)
    meter = Meter(state.interval)  # the log line that the last checkpoint fell into goes on
    begun: Begun | None = None  # the step before, until it is known how that went
    skipped_in_a_row, suspects = 0, list[str]()  # suspects: samples of this process whose loss was not finite
    state.wandb_run_id, clock = journal.run_id, time.monotonic()
    stood_s = dict[str, float]()  # seconds that the training stood still for its latest checkpoint, until they are told
    intervals = Intervals(loop, batch_size)
    if runtime.is_main and state.samples_seen:
        say(stage.name, f"continues from the checkpoint at {state.samples_seen:,} samples")

    def settle(step: Begun) -> bool:
        """Count a step by how it went, the same on all processes; returns whether one of them was asked to stop."""
        nonlocal skipped_in_a_row, suspects
        verdict = step.verdict()
        intervals.ripe = verdict.ripe
        if verdict.failed:
            checkpoints.wait()  # raises on all processes what went wrong in a thread of one
        if not verdict.writing:
            checkpoints.commit()
        if not verdict.unsound:  # by all or none: the meter sums over them by name
            for values, weight in zip(step.measured, weights, strict=True):
                meter.add(values, weight)  # so that the curve is that of the samples, however a step is cut
        meter.add({name: value for name, value in verdict.metrics.items() if math.isfinite(value)})
        if verdict.taken:
            skipped_in_a_row, suspects = 0, []
            return verdict.asked
        skipped_in_a_row += 1
        suspects += [key for keys, finite in zip(step.keys, verdict.finite, strict=True) if not finite for key in keys]
        if runtime.is_main:
            left = f"step left out, it was not finite ({skipped_in_a_row} in a row)"
            say(stage.name, f"{step.samples_seen:>11,}  {left}")
        if skipped_in_a_row >= loop.most_skipped_steps:
            named = [key for part in runtime.gather_objects(suspects[: NAMED + 1]) for key in part]
            began = step.samples_seen - skipped_in_a_row * batch_size
            raise Diverged(stage.name, skipped_in_a_row, began, step.samples_seen, named)
        return verdict.asked

    wanted = intervals.due(state.samples_seen)
    while state.samples_seen < loop.samples:
        # -------------------- evaluate
        # Before the step and after the checkpoint of the one before: a kill during an evaluation costs only that.
        if "evaluate" in wanted:
            evaluate(stage, runtime, state, journal, watchdog)
            intervals.done("evaluate")

        runtime.threads.adjust()
        profile.step()
        step_began, wait_s = time.perf_counter(), 0.0
        measured, finite, keys = list[dict[str, Tensor]](), list[Tensor](), list[list[str]]()
        for index in range(accumulation):
            # -------------------- data
            watchdog.note(LOADING)
            wait_began = time.perf_counter()
            batch = next(source)
            wait_s += time.perf_counter() - wait_began
            watchdog.note(STEP)
            meter.add(left_out(stage.name, batch, batch_size / (runtime.world * accumulation)))

            # -------------------- forward and backward
            values = stage.micro_step(runtime.batch(batch), index == accumulation - 1, state.samples_seen)
            measured.append(values)
            found = [loss.isfinite().all() for name, loss in values.items() if name.endswith("loss")]
            finite.append(torch.stack(found).all())
            keys.append(list(batch.get("key", map(str, batch["position"].tolist()))))
        state.samples_seen += batch_size  # of a step that is left out, too: the order of the data goes on

        # -------------------- agree, and the optimiser's step
        # A signal, a loss or a full disk may be one process's alone: one exchange tells all of them, who read it one
        # step later. A process whose loss is not finite goes on all the same, as the others wait for it in the backward
        # pass of the last micro-batch and in the norm; that is not finite either, and every backend then leaves its
        # weights as they are.
        losses = torch.stack(finite)  # [accumulation]
        ripe = intervals.ripe_now() if runtime.is_main else [False] * len(NOW_AND_THEN)
        raised = runtime.raised([bool(asked), checkpoints.failed, checkpoints.writing, ~losses.all(), *ripe])
        stepped = stage.finish_step(state.samples_seen)
        before, begun = begun, Begun(state.samples_seen, measured, keys, losses, raised, stepped)
        over = state.samples_seen >= loop.samples
        stopping = before is not None and settle(before)
        if wanted and intervals.due(state.samples_seen) and any(intervals.floors_s.values()):
            stopping, begun = settle(begun) or stopping, None  # what is ripe was said before something was done
        wanted = intervals.wanted(state.samples_seen)
        if begun is not None and (over or stopping or wanted):
            stopping, begun = settle(begun) or stopping, None
        meter.tick(batch_size, time.perf_counter() - step_began, wait_s)
        tell("training", state.samples_seen, loop.samples)
        now = time.monotonic()
        state.pass_time(now - clock, runtime.world)
        clock = now

        # -------------------- log
        if over or "log" in wanted:
            own_s = sum(trainable.clock.read() for trainable in stage.trainables.values())
            samples_left = max(0, loop.samples - state.samples_seen)
            # Means over the processes: all of them take part in a line that the main process alone writes.
            line = meter.report(runtime, samples_left, own_s, stage.flops_per_sample) | gauges(stage)
            journal.log(state.samples_seen, line | stood_s | {"perf/device_hours": state.device_hours})
            stood_s = {}
            intervals.done("log")

        # -------------------- checkpoint
        # After the log, so that what it holds of the interval is what the next line lacks.
        if over or stopping or "checkpoint" in wanted:
            watchdog.note("at a checkpoint")
            state.interval = meter.state(runtime)
            began = time.monotonic()
            checkpoints.save(stage.trainables, state, wait=over or stopping)
            intervals.done("checkpoint")
            stood_s = {"perf/checkpoint_s": time.monotonic() - began}

        # -------------------- stop on a signal
        if stopping:
            if runtime.is_main:
                name, seconds = asked[-1].name if asked else "a signal", stood_s["perf/checkpoint_s"]
                say(stage.name, f"{name}: stopped at {state.samples_seen:,} samples, checkpoint in {seconds:.1f} s")
                if marker := os.environ.get("REQUEUE_FILE"):  # the batch script that set it submits the job again
                    Path(marker).touch()
            runtime.barrier()  # whoever returns finds the marker
            return Outcome(finished=False, samples_seen=state.samples_seen)

    metrics = evaluate(stage, runtime, state, journal, watchdog)
    require_learned(stage, metrics)
    watchdog.note("exporting")
    finish(stage, Path(cfg.output_dir), runtime, state, metrics)
    return Outcome(finished=True, samples_seen=state.samples_seen, metrics=metrics)


def finish(stage: Stage, output_dir: Path, runtime: Runtime, state: State, metrics: dict[str, float]) -> None:
    """Write `export/` and `DONE`."""
    export = output_dir / "export"
    with atomic_folder(export) if runtime.is_main else nullcontext(export) as folder:
        stage.export(folder)  # all make the weights together, the main process writes them
        runtime.barrier()  # an error of one process ends the export before it has its name
    if runtime.is_main:
        write_done(output_dir, state, metrics)
    runtime.barrier()  # whoever returns finds the export and DONE


def evaluate(stage: Stage, runtime: Runtime, state: State, journal: MetricLog, watchdog: Watchdog) -> dict[str, float]:
    """Metrics of this moment: from the journal when an earlier start got as far."""
    # Only the main process has a journal; the others must not begin an evaluation that it leaves out.
    recorded: dict[str, float] = runtime.gather_objects(journal.recorded(state.samples_seen))[0]
    if recorded:
        return recorded
    watchdog.note("evaluating")
    tell("evaluating")
    metrics = stage.evaluate(state.samples_seen, journal)
    journal.log(state.samples_seen, metrics)
    return metrics


def require_learned(stage: Stage, metrics: Mapping[str, float]) -> None:
    """Refuse to call a training finished that moved no weight, or whose last evaluation gives no number at all."""
    if not any(trainable.steps for trainable in stage.trainables.values()):
        raise UserError(
            f"{stage.name}: nothing was learned, no step was finite: lower optim.lr, set runtime.precision=fp32, or "
            "look for values in the data that are not; then delete output_dir and begin anew"
        )
    if metrics and not any(map(math.isfinite, metrics.values())):
        raise UserError(
            f"{stage.name}: no value of the last evaluation is finite ({', '.join(metrics)}), so nothing is exported: "
            "lower optim.lr or set runtime.precision=fp32, and begin anew in another output_dir"
        )


def out_of_memory(stage: Stage, cfg: Cfg, runtime: Runtime, error: torch.OutOfMemoryError) -> str:
    """What was asked of the GPU, what it has, and which options need less."""
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    most, micro = peak_memory_gib(runtime.device), cfg.batch.split(runtime.world)[0]
    less = [f"batch.micro_batch_size={micro // 2}, which changes no step"] if micro > 1 else []
    if stage.name == "clip":  # whose negatives are those of one pass
        less = ["a lower batch.global_batch_size"]
    less += [] if cfg.runtime.gradient_checkpointing else ["runtime.gradient_checkpointing=true"]
    less += ["on several GPUs runtime.backend=fsdp"] if stage.name == "unet" else []
    return (
        f"{stage.name}: batch.micro_batch_size={micro} is too much for the GPU: it held {most:.1f} GiB at most, and "
        f"{asked[1] if asked else 'more'} was asked for; set {' or '.join(less) or 'a smaller model'}; "
        "`python train/plan.py` says what a network needs"
    )


def gauges(stage: Stage) -> dict[str, float]:
    """Metrics that have a value now instead of a mean: steps left out so far and, in fp16, the loss scale."""
    skipped = sum(trainable.skipped_steps for trainable in stage.trainables.values())
    scales = {name: trainable.backend.scale for name, trainable in stage.trainables.items()}
    found = {f"train/loss_scale/{name}": scale.value for name, scale in scales.items() if scale.enabled}
    return found | {"train/skipped_steps": float(skipped)}
