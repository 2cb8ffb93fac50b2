"""Gradients that plain torch accumulates, as under DDP and FSDP: so many backward passes, then one step."""

from torch import Tensor

from conf.schema import OptimConfig, Precision
from train.engine.precision import LossScale


class Accumulating:
    """The part of a backend that counts its passes. `accumulation`: of them per step."""

    def __init__(self, optim: OptimConfig, accumulation: int, precision: Precision) -> None:
        self.grad_clip, self.accumulation = optim.grad_clip, accumulation
        self.passes = 0  # backward passes since the latest step
        self.scale = LossScale(precision)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients of the mean over the micro-batches."""
        self.passes += 1
        # A count that is off by one exchanges gradients in the wrong pass, or in none, and nothing else would tell.
        if last != (self.passes == self.accumulation):
            raise ValueError(f"pass {self.passes} of {self.accumulation} with last={last}: one of them is wrong")
        (loss * (self.scale.value / self.accumulation)).backward()

    def publish(self) -> None:
        """Nothing to do: the masters are the weights."""
