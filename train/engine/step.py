"""One optimiser step: micro-batches in, weights moved, or left as they were where a number was not finite."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from conf.errors import UserError
from conf.schema import AutoencoderRun, ClipRun, UNetRun
from train.engine.meter import Meter, left_out
from train.engine.metric_log import say
from train.engine.runtime import Runtime
from train.engine.state import Stage
from train.engine.watchdog import Watchdog

Cfg = AutoencoderRun | ClipRun | UNetRun
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


@dataclass(slots=True)
class Stepper:
    """Takes the steps of a stage; remembers how many in a row were left out."""

    stage: Stage
    cfg: Cfg
    runtime: Runtime
    source: Iterator[dict[str, Any]]  # this process's micro-batches
    watchdog: Watchdog
    in_a_row: int = 0
    suspects: list[str] = field(default_factory=list)  # samples of this process whose loss was not finite

    def forward_backward(self, meter: Meter, samples_seen: int) -> bool:
        """The micro-batches of the step that begins at `samples_seen`; whether all losses were finite here."""
        wait_s, sound, metrics = 0.0, True, list[dict[str, Any]]()
        begin = time.perf_counter()
        micro, accumulation = self.cfg.batch.split(self.runtime.world)
        for index in range(accumulation):
            self.watchdog.note("waiting for data")
            asked = time.perf_counter()
            batch = next(self.source)
            wait_s += time.perf_counter() - asked
            self.watchdog.note("in a training step")
            meter.add(left_out(self.stage.name, batch, micro))
            metrics.append(self.stage.micro_step(batch, index == accumulation - 1, samples_seen))
            losses = [value for name, value in metrics[-1].items() if name.endswith("loss")]
            if not all(bool(loss.isfinite().all()) for loss in losses):
                sound = False
                self.suspects += list(batch.get("key", map(str, batch["position"].tolist())))
        for values in metrics if sound else ():
            meter.add(values)
        meter.tick(self.cfg.batch.global_batch_size, time.perf_counter() - begin, wait_s)
        return sound

    def update(self, meter: Meter, sound: bool, samples_seen: int) -> None:
        """The optimiser's part; `samples_seen` includes this step. Gradients that are not finite change nothing.

        Raises:
            Diverged: this was the last of so many steps in a row that `loop.most_skipped_steps` allows.
        """
        begin = time.perf_counter()
        values = self.stage.finish_step(samples_seen)
        meter.step_s[-1] += time.perf_counter() - begin
        meter.add({name: value for name, value in values.items() if math.isfinite(value)})
        if sound and all(map(math.isfinite, values.values())):
            self.in_a_row = 0
            self.suspects.clear()
            return
        self.in_a_row += 1
        if self.runtime.is_main:
            say(self.stage.name, f"{samples_seen:>11,}  step left out, it was not finite ({self.in_a_row} in a row)")
        if self.in_a_row >= self.cfg.loop.most_skipped_steps:
            named = [key for part in self.runtime.gather_objects(self.suspects[: NAMED + 1]) for key in part]
            began = samples_seen - self.in_a_row * self.cfg.batch.global_batch_size
            raise Diverged(self.stage.name, self.in_a_row, began, samples_seen, named)


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


def own_seconds(stage: Stage) -> float:
    """Time in forward passes since the last call, in which a process waits for no other."""
    return sum(trainable.clock.read() for trainable in stage.trainables.values())


def gauges(stage: Stage) -> dict[str, float]:
    """Metrics that have a value now instead of a mean: steps left out so far and, in fp16, the loss scale."""
    skipped = sum(trainable.skipped_steps for trainable in stage.trainables.values())
    scales = {name: trainable.backend.scale for name, trainable in stage.trainables.items()}
    found = {f"train/loss_scale/{name}": scale.value for name, scale in scales.items() if scale.enabled}
    return found | {"train/skipped_steps": float(skipped)}
