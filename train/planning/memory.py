"""Memory of each process in training, on paper: what `zero.py` and DeepSpeed hold, by stage (Rajbhandari et al. 2020).

Everything that is kept is fp32, under autocast too: weights, gradients, AdamW's two moments, and from stage 1 on a
master copy of the weights.
"""

from dataclasses import dataclass

from train.engine.backend.layout import BUCKET
from train.planning.activations import Activations

FLATTENED = 500_000_000  # likewise at stage 0, where DeepSpeed copies the gradients to add them up
GATHERED = 500_000_000  # elements that stage 3 keeps whole from the forward to the backward pass, about
FP32 = 4  # bytes


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one process at the moment when it holds most."""

    weights: int
    optimizer: int  # moments, and the master copy from stage 1 on
    average: int
    step: int  # gradients and activations
    buffers: int  # through which gradients, and at stage 3 weights, travel
    host: int = 0  # in the machine's memory, not the accelerator's
    teacher: int = 0  # frozen weights, whole in every process

    @property
    def total(self) -> int:
        """Bytes on the accelerator."""
        return self.weights + self.optimizer + self.average + self.step + self.buffers + self.teacher


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a network of so many trainable elements is spread over the processes."""

    elements: int
    processes: int
    stage: int  # of ZeRO, 0-3
    offload: bool = False  # optimiser and average in the machine's memory; stages 1-3
    average: bool = True  # whether there is one
    accumulate: bool = False  # several forward passes per step
    low_precision: bool = True  # autocast: stage 3 then has a second bucket
    teacher: int = 0  # bytes of its weights, which no stage shards

    def footprint(self, activations: Activations) -> Footprint:
        """Bytes of a process, given the activations of a micro-batch."""
        whole = FP32 * self.elements
        share = whole // self.processes
        state = share if self.stage else whole
        optimizer, average = (3 if self.stage else 2) * state, state if self.average else 0
        host = 0
        if self.offload:
            host, optimizer, average = optimizer + average + share, 0, 0
        weights = whole if self.stage < 3 else share + FP32 * min(self.elements, GATHERED)
        step = self._step(activations, whole, share)
        return Footprint(weights, optimizer, average, step, self._buffers(), host, self.teacher)

    def _step(self, activations: Activations, whole: int, share: int) -> int:
        """Gradients and activations: the first come while the second go, unless an earlier pass left them."""
        alone, bucket = activations.alone, FP32 * min(self.elements, BUCKET)
        backward = whole + alone if self.accumulate else activations.with_gradients
        if self.stage == 0:
            return max(backward, whole + (FP32 * min(self.elements, FLATTENED) if self.processes > 1 else 0))
        if self.stage == 1:  # the share is copied out of the whole, bucket by bucket
            return max(backward, whole + share - bucket)
        if self.stage == 2 and self.accumulate:  # of earlier passes, of this one, and of both as AdamW will see them
            return share + max(alone, 2 * share)
        if self.stage == 2 and whole <= bucket:  # nothing travels before the pass is over
            return max(alone, 2 * share)
        return share + max(alone, share)

    def _buffers(self) -> int:
        bucket, precisions = min(self.elements, BUCKET), 2 if self.low_precision else 1
        if self.stage == 0:
            return 0
        if self.stage < 3:
            return FP32 * 2 * bucket  # one is filled while the other travels
        return (FP32 + 2 * (precisions - 1)) * bucket + FP32 * bucket
