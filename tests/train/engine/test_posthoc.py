"""Averages put together after the training are those that a tracked one would have been (EDM2, section 3)."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.errors import UserError
from conf.schema import EmaConfig
from models.formats.tensor_stream import stream_of, write_stream
from train.engine.ema import Ema
from train.engine.posthoc import (
    forget_copies,
    gamma_of,
    inner_products,
    keep_copies,
    mixture,
    power_decay,
    reconstructed,
)

BATCH, STEPS, EVERY = 8, 2000, 100
TRACKED, WANTED = [0.05, 0.1], [0.075, 0.15]


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_of_the_paper(sigma_rel: float, gamma: float) -> None:
    found = gamma_of(sigma_rel)
    assert found == pytest.approx(gamma, abs=0.005)
    assert np.sqrt((found + 1) / ((found + 2) ** 2 * (found + 3))) == pytest.approx(sigma_rel)


def test_inner_products_are_the_integrals() -> None:
    profiles = [(100.0, 16.97), (70.0, 6.94), (70.0, 2.0), (31.0, 0.0)]
    width = 100 / 200_000
    tau = (np.arange(200_000) + 0.5) * width
    curves = np.stack([np.where(tau < t, (gamma + 1) * (tau / t) ** gamma / t, 0.0) for t, gamma in profiles])
    np.testing.assert_allclose(inner_products(profiles, profiles), curves @ curves.T * width, rtol=2e-4)


@pytest.mark.parametrize("batch_size", [1, 20, 250])
def test_batch_size_moves_no_decay(batch_size: int) -> None:
    steps = range(500 + batch_size, 2001, batch_size)
    product = np.prod([power_decay(seen, batch_size, 7.0) for seen in steps])
    assert product == pytest.approx(0.25**8)
    assert power_decay(batch_size, batch_size, 7.0) == 0.0  # the weights before the first step have no part


def test_copy_itself_is_found_again() -> None:
    copies = [(float(t), gamma_of(width)) for t in (100, 200, 300) for width in TRACKED]
    np.testing.assert_allclose(mixture(copies, copies[4]), np.eye(6)[4], atol=1e-9)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with the copies of a random walk, and the averages of it that were tracked to the end."""
    folder = tmp_path_factory.mktemp("run")
    generator = torch.Generator().manual_seed(0)
    weights = torch.zeros(64)
    ema = Ema(EmaConfig(posthoc=[*TRACKED, *WANTED]), [weights])
    for step in range(1, STEPS + 1):
        weights = weights + torch.randn(64, generator=generator)
        ema.update([weights], BATCH * step, BATCH)
        if step % EVERY == 0:
            checkpoint = folder / "checkpoint"
            (checkpoint / "net").mkdir(parents=True, exist_ok=True)
            prints = {}
            for width in TRACKED:
                name = f"net/posthoc-{width:g}.safetensors"
                (checkpoint / name).unlink(missing_ok=True)
                prints[name] = write_stream(checkpoint / name, stream_of({"w": ema.averages[f"posthoc-{width:g}"][0]}))
            keep_copies(checkpoint, folder, BATCH * step, prints)
    return folder, {name: shards[0] for name, shards in ema.averages.items()}


@pytest.mark.parametrize("sigma_rel", [*TRACKED, *WANTED])
def test_width_that_was_not_tracked_is_put_together(
    run: tuple[Path, dict[str, torch.Tensor]], sigma_rel: float
) -> None:
    folder, tracked = run
    expected = tracked[f"posthoc-{sigma_rel:g}"]
    error = (reconstructed(folder, "net", sigma_rel)["w"] - expected).norm()
    other = min((tracked[f"posthoc-{width:g}"] - expected).norm() for width in TRACKED if width != sigma_rel)
    assert error < 0.02 * other  # than which it is nearer to no copy


def test_moment_before_the_end_needs_no_later_copies(run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, _ = run
    half = BATCH * STEPS // 2
    early = reconstructed(folder, "net", 0.075, half)["w"]
    shutil.copytree(folder / "averages", tmp_path / "averages")
    (tmp_path / "averages" / ".tmp-000000008800").mkdir()
    forget_copies(tmp_path, half)
    left = sorted(path.name for path in (tmp_path / "averages").iterdir())
    assert left == [f"{seen:012d}" for seen in range(BATCH * EVERY, half + 1, BATCH * EVERY)]
    assert torch.equal(early, reconstructed(tmp_path, "net", 0.075)["w"])


def test_damaged_or_missing_copies_are_named(run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no averages in .*: train with ema\.posthoc=\[0\.05,0\.1\]"):
        reconstructed(tmp_path, "net", 0.075)
    shutil.copytree(run[0] / "averages", tmp_path / "averages")
    (tmp_path / "averages" / "000000001600" / "net" / "posthoc-0.1.safetensors").unlink()
    with pytest.raises(UserError, match=r"000000001600' cannot be used \(net/posthoc-0\.1\.safetensors is missing\)"):
        reconstructed(tmp_path, "net", 0.075)
