"""Noise levels: those of the discrete process, and those at which a sampler stops, descending, without a final 0."""

import numpy as np
from numpy.typing import NDArray

from conf.schema import BetaSchedule, ProcessConfig, Spacing

# -------------------- of the discrete process: which share of the image is left at each timestep ----------------------

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


# -------------------- of a sampler: where it stops between noise and image --------------------------------------------

RHO = 7.0  # Karras et al. 2022, section 3


def spaced_timesteps(spacing: Spacing, steps: int, total: int) -> NDArray[np.int64]:
    """Timesteps [steps] of a process with `total` (Lin et al. 2024, table 2).

    trailing begins at the last timestep, linspace at the last and ends at the first, leading ends near the first: the
    timestep after it, as Stable Diffusion does, where there is room.
    """
    if spacing is Spacing.trailing:
        return np.round(total - np.arange(steps) * (total / steps)).astype(np.int64) - 1
    if spacing is Spacing.linspace:
        return np.round(np.linspace(total - 1, 0, steps)).astype(np.int64)
    ratio = total // steps
    return np.arange(steps)[::-1] * ratio + min(1, ratio - 1)


def spaced_sigmas(spacing: Spacing, steps: int, highest: float, lowest: float) -> Levels:
    """Noise levels [steps] between two of them, whatever the timesteps: evenly in log sigma, or as Karras et al. 2022.

    Karras: evenly in the 7th root (eq. 5), so that most steps are spent near the image.
    """
    if spacing is Spacing.exponential:
        return np.exp(np.linspace(np.log(highest), np.log(lowest), steps))
    levels: Levels = np.linspace(highest ** (1 / RHO), lowest ** (1 / RHO), steps) ** RHO
    return levels
