"""Memory of each process in training, on paper: what DDP, DeepSpeed by stage (Rajbhandari et al. 2020) and FSDP hold.

Everything that is kept is fp32, under autocast too: weights, gradients, AdamW's two moments, and of DeepSpeed from
stage 1 on a master copy of the weights.
"""

from dataclasses import dataclass

from train.engine.backend.layout import BUCKET
from train.planning.activations import Activations

FLATTENED = 500_000_000  # elements of gradients that DeepSpeed copies at once to add them up, at stage 0
GATHERED = 1_000_000_000  # elements that stage 3 keeps whole from the forward to the backward pass, at the most
FP32 = 4  # bytes
HALF = 2  # of a number that travels under autocast


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
    units: tuple[int, ...] = ()  # elements of each part that FSDP gathers, the outermost last; (): not FSDP
    machine: int = 1  # processes of one, over which stage 3 has a second copy of the weights; 1: it has none

    def footprint(self, activations: Activations) -> Footprint:
        """Bytes of a process, given the activations of a micro-batch."""
        whole = FP32 * self.elements
        share = whole // self.processes
        if self.units:
            return self._fully_sharded(activations, share)
        state = share if self.stage else whole
        optimizer, average = (3 if self.stage else 2) * state, state if self.average else 0
        host = 0
        if self.offload:
            host, optimizer, average = optimizer + average + share, 0, 0
        weights = whole if self.stage < 3 else share + FP32 * min(self.elements, GATHERED)
        if self.stage == 3 and self.machine > 1:  # of what is let go of between the passes
            weights += FP32 * max(0, self.elements - GATHERED) // self.machine
        step = self._step(activations, whole, share)
        return Footprint(weights, optimizer, average, step, self._buffers(), host, self.teacher)

    def _fully_sharded(self, activations: Activations, share: int) -> Footprint:
        """FSDP updates its rows of the weights themselves; gradients travel unit by unit, so that none is ever whole.

        Beside the outermost unit, which holds the others, two are there: one computes, one is on its way.
        """
        *inner, outermost = self.units
        buffers = (HALF if self.low_precision else FP32) * (outermost + 2 * max(inner, default=0))
        step = share + activations.alone if self.accumulate else max(share, activations.alone)
        average = share if self.average else 0
        if self.offload:
            return Footprint(0, 0, 0, step - share * self.accumulate, buffers, 4 * share + average, self.teacher)
        return Footprint(share, 2 * share, average, step, buffers, 0, self.teacher)

    def _step(self, activations: Activations, whole: int, share: int) -> int:
        """Gradients and activations: the first come while the second go, unless an earlier pass left them."""
        alone, bucket = activations.alone, FP32 * min(self.elements, BUCKET)
        backward = whole + alone if self.accumulate else activations.with_gradients
        if self.stage == 0:
            return max(backward, whole + (FP32 * min(self.elements, FLATTENED) if self.processes > 1 else 0))
        if self.stage == 1 and (self.accumulate or whole <= bucket):  # the share is copied out of the whole
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
