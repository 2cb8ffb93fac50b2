"""Exponential moving average of the weights, kept in fp32 wherever the weights' own master copy is."""

import torch
from torch import Tensor

from conf.schema import EmaConfig


def decay_at(samples_seen: int, batch_size: int, cfg: EmaConfig) -> float:
    """Factor on the average at the step that brings the run to `samples_seen`, for steps of `batch_size` samples.

    Karras et al. 2024 (EDM2), section 3: a half-life in samples that never exceeds `cfg.warmup_ratio` of the run so
    far, so that the first weights, which are noise, are soon forgotten. `warmup_ratio=0` means no such bound.
    """
    half_life = cfg.half_life_samples
    if cfg.warmup_ratio > 0:
        half_life = min(half_life, cfg.warmup_ratio * samples_seen)
    return float(0.5 ** (batch_size / half_life)) if half_life > 0 else 0.0


class Ema:
    """The average of a list of fp32 tensors (whole weights, or one process's shards of them)."""

    def __init__(self, cfg: EmaConfig, masters: list[Tensor]) -> None:
        self.cfg = cfg
        self.shards = [master.detach().float().clone() for master in masters]

    @torch.no_grad()
    def update(self, masters: list[Tensor], samples_seen: int, batch_size: int) -> None:
        """Move towards `masters` (same order and shapes as at construction)."""
        weight = 1.0 - decay_at(samples_seen, batch_size, self.cfg)
        torch._foreach_lerp_(self.shards, [master.detach() for master in masters], weight)
