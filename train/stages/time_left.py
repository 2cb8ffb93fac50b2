"""How long the rest of a run takes: first from a calibration of the machine, then from what its stages really took."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from conf.process import Told

WINDOW_S = 30.0  # of work whose speed counts: another program that begins to compute shows soon
TRUSTED_S = 5.0  # expected seconds of work, from which on true ones correct what is expected of the rest
MAIN = {  # what most of the time of a stage goes to, as it tells it itself; of the others, "training"
    "build": "building",
    "latents": "encoding",
    "sample": "drawing",
    "evaluate": "measuring images",
}


@dataclass(frozen=True, slots=True)
class Work:
    """How much there is to do in a stage."""

    samples: int | None = None  # that are trained on, encoded or drawn; None: not known yet
    evaluate_every: int = 0  # samples between two evaluations; 0: it is no training

    def evaluations_after(self, seen: int) -> int:
        """Evaluations that begin after so many samples, the one at the end included."""
        if not self.evaluate_every or self.samples is None or seen >= self.samples:
            return 0
        return math.ceil(self.samples / self.evaluate_every) - seen // self.evaluate_every


@dataclass(frozen=True, slots=True)
class StageCost:
    """Seconds that the parts of a stage are expected to take on this machine."""

    fixed_s: float  # imports, and what does not grow with the samples
    sample_s: float
    evaluation_s: float = 0.0  # of a training

    def times(self, factor: float) -> Self:
        """What a slower machine takes."""
        return type(self)(factor * self.fixed_s, factor * self.sample_s, factor * self.evaluation_s)

    def seconds(self, work: Work, seen: int = 0) -> float | None:
        """What is left of a stage after so many samples; None where nobody knows how many there are."""
        if work.samples is None:
            return None
        samples = max(0, work.samples - seen)
        return self.fixed_s + samples * self.sample_s + work.evaluations_after(seen) * self.evaluation_s


@dataclass(slots=True)
class Pace:
    """What a stage has told of itself since this start."""

    main: str = "training"  # what most of its time goes to
    told: Told | None = None  # last
    work: Told | None = None  # last of the main part
    paused: Told | None = None  # first after it: of an evaluation
    seconds: float = 0.0  # of the main part
    samples: int = 0  # in them
    recent: deque[tuple[float, int]] = field(default_factory=deque)  # seconds and samples of some moments ago
    evaluations: int = 0  # that are over
    evaluation_s: float = 0.0  # that they took

    def hear(self, told: Told | None) -> None:
        """Take in what the stage tells; the same once more changes nothing."""
        if told is None or told == self.told:
            return
        self.told = told
        if told.doing != self.main:
            self.paused = self.paused or told
            return
        if self.work is not None and self.paused is not None:
            self.evaluations += 1
            self.evaluation_s += told.at - self.paused.at
        elif self.work is not None and told.done >= self.work.done:
            self.seconds += told.at - self.work.at
            self.samples += told.done - self.work.done
        self.work, self.paused = told, None
        self.recent.append((self.seconds, self.samples))
        while len(self.recent) > 2 and self.seconds - self.recent[1][0] >= WINDOW_S:
            self.recent.popleft()

    @property
    def sample_s(self) -> float | None:
        """Seconds that a sample takes now; None before the first ones."""
        if not self.recent or self.samples == self.recent[0][1]:
            return None
        return (self.seconds - self.recent[0][0]) / (self.samples - self.recent[0][1])

    def left(self, now: float, work: Work, cost: StageCost | None, elapsed_s: float, begun: int = 0) -> float | None:
        """Seconds until the stage ends, at a moment of the clock of `Told`; None where nobody can know yet.

        Args:
            cost: as far as anything is expected.
            elapsed_s: seconds since this start.
            begun: samples that earlier starts have seen.

        """
        if self.work is None:
            expected = cost.seconds(work, begun) if cost else None
            return None if expected is None else max(0.0, expected - elapsed_s)
        sample_s = self.sample_s or (cost.sample_s if cost else None)
        if sample_s is None:
            return None
        seen, total = self.work.done, self.work.total  # of a side of the data, or what an earlier start has left
        each = self.evaluation_s / self.evaluations if self.evaluations else cost.evaluation_s if cost else 0.0
        left = max(0, total - seen) * sample_s + work.evaluations_after(seen) * each
        if self.paused is not None and work.evaluate_every:
            left += max(0.0, each - (now - self.paused.at))
        elif self.told is not None:
            left -= min(left, now - self.told.at)  # it has gone on since
        return left


def correction(paces: Mapping[str, Pace], costs: Mapping[str, StageCost]) -> float:
    """True seconds over expected ones, of all work so far; 1 while there is little of it."""
    true_s = expected_s = 0.0
    for name, cost in costs.items():
        if pace := paces.get(name):
            true_s += pace.seconds + pace.evaluation_s
            expected_s += pace.samples * cost.sample_s + pace.evaluations * cost.evaluation_s
    return true_s / expected_s if expected_s >= TRUSTED_S else 1.0
