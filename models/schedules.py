"""Where a sampler stops between noise and picture: timesteps or noise levels, descending, without the final 0."""

import numpy as np
from numpy.typing import NDArray

from conf.schema import Spacing

Levels = NDArray[np.float64]
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

    Karras: evenly in the 7th root (eq. 5), so that most steps are spent near the picture.
    """
    if spacing is Spacing.exponential:
        return np.exp(np.linspace(np.log(highest), np.log(lowest), steps))
    levels: Levels = np.linspace(highest ** (1 / RHO), lowest ** (1 / RHO), steps) ** RHO
    return levels
