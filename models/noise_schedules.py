"""Noise schedules of the discrete process: which share of the picture is left at each timestep."""

import numpy as np
from numpy.typing import NDArray

from conf.schema import BetaSchedule, ProcessConfig

Levels = NDArray[np.float64]


def betas(cfg: ProcessConfig) -> Levels:
    """Variances [T] that the forward process adds per timestep, before shift and rescaling."""
    total = cfg.train_timesteps
    if cfg.schedule is BetaSchedule.linear:
        return np.linspace(cfg.beta_start, cfg.beta_end, total)
    if cfg.schedule is BetaSchedule.scaled_linear:
        return np.linspace(cfg.beta_start**0.5, cfg.beta_end**0.5, total) ** 2
    if cfg.schedule is BetaSchedule.sigmoid:  # as "GeoDiff" (Xu et al. 2022) has it
        return cfg.beta_start + (cfg.beta_end - cfg.beta_start) / (1.0 + np.exp(-np.linspace(-6, 6, total)))
    t = np.arange(total + 1) / total  # Nichol & Dhariwal 2021, eq. 17
    alphas_cumprod = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    steps: Levels = np.minimum(1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)
    return steps


def shifted_betas(cfg: ProcessConfig) -> Levels:
    """`betas` [T] of the schedule whose sigmas are `shift` times larger (Hoogeboom et al. 2023)."""
    if cfg.shift == 1:
        return betas(cfg)
    alphas_cumprod = np.cumprod(1.0 - betas(cfg))
    shifted = alphas_cumprod / (alphas_cumprod + cfg.shift**2 * (1.0 - alphas_cumprod))
    return 1.0 - shifted / np.append(1.0, shifted[:-1])


def alphas_cumprod(cfg: ProcessConfig) -> Levels:
    """alpha^2 [T] at each timestep, with shift and rescaling; the last one is 0 with `zero_terminal_snr`."""
    alpha = np.sqrt(np.cumprod(1.0 - shifted_betas(cfg)))
    if cfg.zero_terminal_snr:  # Lin et al. 2024, algorithm 1: alpha moves and stretches, its first value stays
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return np.asarray(alpha**2, np.float64)
