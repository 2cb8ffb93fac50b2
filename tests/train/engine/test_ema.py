"""The average of the weights: its decay counts samples, not steps."""

import pytest
import torch

from conf.schema import EmaConfig
from train.engine.ema import Ema, decay_at


def test_weight_of_old_weights_halves_every_half_life() -> None:
    cfg = EmaConfig(half_life_samples=1000.0, warmup_ratio=0.0)
    ema = Ema(cfg, [torch.zeros(3)])
    for step in range(1, 11):
        ema.update([torch.ones(3)], 200 * step, 200)
    assert ema.shards[0].tolist() == pytest.approx([1 - 0.5**2] * 3)


@pytest.mark.parametrize("batch_size", [1, 10, 250])
def test_batch_size_moves_no_decay(batch_size: int) -> None:
    cfg = EmaConfig(half_life_samples=500.0, warmup_ratio=0.0)
    product = 1.0
    for seen in range(batch_size, 1001, batch_size):
        product *= decay_at(seen, batch_size, cfg)
    assert product == pytest.approx(0.25)


def test_half_life_grows_with_the_run_up_to_its_bound() -> None:
    cfg = EmaConfig(half_life_samples=1000.0, warmup_ratio=0.05)
    assert decay_at(2_000, 100, cfg) == pytest.approx(0.5)  # half-life 0.05 x 2,000
    assert decay_at(20_000, 100, cfg) == pytest.approx(0.5**0.1)
    assert decay_at(10**9, 100, cfg) == pytest.approx(0.5**0.1)
    assert decay_at(100, 100, cfg) < 1e-5  # the first weights are noise


def test_average_is_fp32_and_its_own_memory() -> None:
    master = torch.full((4,), 0.1, dtype=torch.bfloat16)
    ema = Ema(EmaConfig(), [master])
    assert ema.shards[0].dtype is torch.float32
    master.zero_()
    assert ema.shards[0].min() > 0
