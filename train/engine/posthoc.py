"""Averages of any width after the training (Karras et al. 2024, EDM2, section 3 and appendix C).

Two averages with power function profiles are tracked, and copies of them kept: averages/<samples_seen>/<trainable>/.
A profile of another width is, as a function of time, close to a weighted sum of the copies' profiles; the same sum of
the copies is then close to the average that nobody tracked. Time is counted in samples, widths (sigma_rel) are relative
to it.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from conf.errors import UserError
from conf.files import atomic_folder, sync
from models.formats.tensor_stream import write_bytes
from train.engine.marker import MARKER, Print, damage_of

FOLDER, PREFIX = "averages", "posthoc-"

Profile = tuple[float, float]  # samples seen at its end, gamma


def gamma_of(sigma_rel: float) -> float:
    """Exponent of the profile whose standard deviation is `sigma_rel` of the time so far.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)): the largest root of a polynomial.
    """
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def power_decay(samples_seen: int, batch_size: int, gamma: float) -> float:
    """Factor on the average at the step that brings the run to `samples_seen`: (1 - 1/t)^(gamma + 1)."""
    return float((1.0 - batch_size / samples_seen) ** (gamma + 1.0))


def inner_products(profiles: Sequence[Profile], others: Sequence[Profile]) -> NDArray[np.float64]:
    """Integrals over time [len(profiles), len(others)] of the products of two profiles each.

    A profile that ends at t weights the past by p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1), and the product is
    there up to the earlier of both ends.
    """
    (t_a, gamma_a), (t_b, gamma_b) = (np.asarray(part, dtype=np.float64).T for part in (profiles, others))
    t_a, gamma_a = t_a[:, None], gamma_a[:, None]
    # With t the earlier end, the integral of tau^(gamma_a + gamma_b) up to t leaves (t / later)^(gamma of the later).
    power = np.where(t_a < t_b, gamma_b, -gamma_a)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return np.asarray(scale * (t_a / t_b) ** power / np.maximum(t_a, t_b), dtype=np.float64)


def mixture(copies: Sequence[Profile], wanted: Profile) -> NDArray[np.float64]:
    """Weights [len(copies)] of the sum that is nearest, in least squares, to the profile that is wanted."""
    weights = np.linalg.solve(inner_products(copies, copies), inner_products(copies, [wanted]))
    return np.asarray(weights[:, 0], dtype=np.float64)


def name_of(sigma_rel: float) -> str:
    """Of a tracked average, and of its file without the ending."""
    return f"{PREFIX}{sigma_rel:g}"


def keep_copies(checkpoint: Path, output_dir: Path, samples_seen: int, prints: Mapping[str, Print]) -> None:
    """Let a checkpoint's power function averages outlive it: the same files, without being written again."""
    names = [name for name in prints if Path(name).name.startswith(PREFIX)]
    if not names:
        return
    with atomic_folder(output_dir / FOLDER / f"{samples_seen:012d}") as folder:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            try:
                os.link(checkpoint / name, folder / name)
            except OSError:  # a file system without hard links
                shutil.copyfile(checkpoint / name, folder / name)
                sync(folder / name)
        write_bytes(folder / MARKER, json.dumps({"files": {name: prints[name] for name in names}}).encode())


def forget_copies(output_dir: Path, samples_seen: int) -> None:
    """Remove those of a later time, when a run goes on from an earlier one."""
    for path in (output_dir / FOLDER).glob("*"):
        if not path.name.isdecimal() or int(path.name) > samples_seen:
            shutil.rmtree(path)


def reconstructed(
    output_dir: Path, trainable: str, sigma_rel: float, samples_seen: int | None = None
) -> dict[str, Tensor]:
    """The average of width `sigma_rel` at the last copy, or at `samples_seen`, from the copies up to then.

    Raises UserError when there are none, or when one of them is damaged.
    """
    files: dict[Profile, Path] = {}
    for folder in sorted((output_dir / FOLDER).glob("[0-9]*")):
        if samples_seen is not None and int(folder.name) > samples_seen:
            continue
        damage = damage_of(folder)
        if damage is not None:
            raise UserError(f"'{folder}' cannot be used ({damage}): delete it and go on without this copy")
        for path in (folder / trainable).glob(f"{PREFIX}*.safetensors"):
            width = float(path.stem.removeprefix(PREFIX))
            files[int(folder.name), gamma_of(width)] = path
    if not files:
        raise UserError(f"no averages in '{output_dir / FOLDER}': train with ema.posthoc=[0.05,0.1] to keep some")
    last = max(seen for seen, _ in files)
    weights = mixture(list(files), (samples_seen or last, gamma_of(sigma_rel)))
    return _sum(list(files.values()), weights)


def _sum(paths: Sequence[Path], weights: NDArray[np.float64]) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    for path, weight in zip(paths, weights, strict=True):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                total = totals.setdefault(name, torch.zeros_like(tensor, dtype=torch.float64))
                total.add_(tensor, alpha=float(weight))
    return {name: total.float() for name, total in totals.items()}
