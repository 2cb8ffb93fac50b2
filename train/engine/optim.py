"""AdamW and the learning rate, a pure function of the samples seen; gradients that add up to a step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import LrDecay, OptimConfig, Precision
from train.engine.precision import LossScale


def lr_at(samples_seen: int, cfg: OptimConfig, total_samples: int) -> float:
    """Learning rate of the step that brings the run to `samples_seen` samples.

    Linear warm-up from 0 over `cfg.warmup_samples`, the peak held until `cfg.hold_fraction` of the run, then the decay
    of `cfg.decay` down to `cfg.final_lr_ratio` of the peak at `total_samples`. Past the end it stays there.
    """
    warmup = min(1.0, samples_seen / cfg.warmup_samples) if cfg.warmup_samples > 0 else 1.0
    if cfg.decay is LrDecay.constant:
        return cfg.lr * warmup
    start = min(max(float(cfg.warmup_samples), cfg.hold_fraction * total_samples), float(total_samples))
    progress = min(1.0, max(0.0, (samples_seen - start) / max(1.0, total_samples - start)))
    remaining = 1 - progress if cfg.decay is LrDecay.linear else 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.lr * warmup * (cfg.final_lr_ratio + (1 - cfg.final_lr_ratio) * remaining)


def adamw(module: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters.

    The fused implementation exists on CPU and GPU and needs no compiler, unlike DeepSpeed's.
    """
    groups = parameter_groups(module.parameters(), cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """The trainable ones in two groups: only matrices and kernels decay, not biases, gains and scalars."""
    trainable = [p for p in parameters if p.requires_grad]
    kinds = [([p for p in trainable if p.ndim >= 2], weight_decay), ([p for p in trainable if p.ndim < 2], 0.0)]
    return [{"params": members, "weight_decay": decay} for members, decay in kinds if members]


@torch.no_grad()
def unscale_and_clip(
    parameters: Iterable[Tensor], limit: float, scale: float, over_processes: Callable[[Tensor], float] = float
) -> float:
    """Divide the gradients by the loss scale and bound their global norm; returns that norm before clipping.

    Args:
        limit: largest norm; 0 for no clipping.
        scale: what the loss was multiplied by.
        over_processes: from the norm of this process's gradients to that of all, where each has a part of them.

    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = over_processes(nn.utils.get_total_norm(gradients)) / scale
    factor = (min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0) / scale
    if factor != 1.0:
        torch._foreach_mul_(gradients, factor)
    return norm


def sound_step(
    optimizer: torch.optim.AdamW,
    parameters: Iterable[Tensor],
    limit: float,
    scale: LossScale,
    over_processes: Callable[[Tensor], float] = float,
) -> float:
    """Clip as `unscale_and_clip`, update, clear; returns the norm. Not finite: the update was skipped."""
    norm = unscale_and_clip(parameters, limit, scale.value, over_processes)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    scale.update(norm)
    return norm


class Accumulating:
    """Gradients that plain torch accumulates, under DDP and FSDP: `accumulation` backward passes, then one step."""

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
