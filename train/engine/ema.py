"""Moving averages of the weights, in fp32 and cut over the processes as the weights' own master copies are."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from conf.schema import EmaConfig
from train.engine.posthoc import gamma_of, name_of, power_decay

MAIN = "ema"  # the average that is evaluated and exported
Decay = Callable[[int, int], float]  # (samples seen, batch size) -> factor on the average at that step


def half_life_decay(samples_seen: int, batch_size: int, half_life: float, warmup_ratio: float) -> float:
    """Factor on the average at the step that brings the run to `samples_seen`, for steps of `batch_size` samples.

    Karras et al. 2024 (EDM2), section 3: a half-life in samples that never exceeds `warmup_ratio` of the run so far,
    so that the first weights, which are noise, are soon forgotten. `warmup_ratio=0` means no such bound.
    """
    if warmup_ratio > 0:
        half_life = min(half_life, warmup_ratio * samples_seen)
    return float(0.5 ** (batch_size / half_life)) if half_life > 0 else 0.0


def further(half_life: float) -> str:
    """Name of an average beside the main one."""
    return f"{MAIN}-{half_life:.0f}"


def decays(cfg: EmaConfig) -> dict[str, Decay]:
    """All averages that a configuration asks for, by name; empty with a half-life of 0."""
    if cfg.half_life_samples == 0:
        return {}
    half_lives = {MAIN: cfg.half_life_samples} | {further(value): value for value in cfg.more_half_lives}
    named: dict[str, Decay] = {
        name: partial(half_life_decay, half_life=value, warmup_ratio=cfg.warmup_ratio)
        for name, value in half_lives.items()
    }
    return named | {name_of(value): partial(power_decay, gamma=gamma_of(value)) for value in cfg.posthoc}


class Ema:
    """The averages of a list of fp32 tensors (whole weights, or one process's shards of them).

    With `on_cpu` they lie in host memory: a step then copies the tensors there, which costs a transfer of 4 bytes per
    parameter of this process and the work of its CPU cores.
    """

    def __init__(self, cfg: EmaConfig, masters: list[Tensor]) -> None:
        self.decays = decays(cfg)
        self.on_cpu = cfg.on_cpu and any(master.is_cuda for master in masters)
        self.averages = {name: [self._copy(master) for master in masters] for name in self.decays}
        self.staging = [self._copy(master) for master in masters] if self.on_cpu else []  # the latest weights

    @property
    def shards(self) -> list[Tensor]:
        """The average that is evaluated and exported."""
        return self.averages[MAIN]

    @torch.no_grad()
    def update(self, masters: list[Tensor], samples_seen: int, batch_size: int) -> None:
        """Move towards `masters` (same order and shapes as at construction)."""
        latest = [master.detach() for master in masters]
        if self.on_cpu:
            for copy, master in zip(self.staging, latest, strict=True):
                copy.copy_(master, non_blocking=True)
            torch.cuda.current_stream().synchronize()
            latest = self.staging
        for name, decay in self.decays.items():
            torch._foreach_lerp_(self.averages[name], latest, 1.0 - decay(samples_seen, batch_size))

    def _copy(self, master: Tensor) -> Tensor:
        whole = master.detach().float()
        if not self.on_cpu:
            return whole.clone()
        return torch.empty_like(whole, device="cpu", pin_memory=True).copy_(whole)
