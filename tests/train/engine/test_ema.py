"""The average of the weights: its decay counts samples, not steps."""

from typing import Any

import pytest
import torch

from conf.errors import UserError
from conf.schema import EmaConfig
from train.engine.ema import Ema, decays, half_life_decay


def test_weight_of_old_weights_halves_every_half_life() -> None:
    cfg = EmaConfig(half_life_samples=1000.0, warmup_ratio=0.0)
    ema = Ema(cfg, [torch.zeros(3)])
    for step in range(1, 11):
        ema.update([torch.ones(3)], 200 * step, 200)
    assert ema.shards[0].tolist() == pytest.approx([1 - 0.5**2] * 3)


@pytest.mark.parametrize("batch_size", [1, 10, 250])
def test_batch_size_moves_no_decay(batch_size: int) -> None:
    product = 1.0
    for seen in range(batch_size, 1001, batch_size):
        product *= half_life_decay(seen, batch_size, 500.0, warmup_ratio=0.0)
    assert product == pytest.approx(0.25)


def test_half_life_grows_with_the_run_up_to_its_bound() -> None:
    def decay(samples_seen: int) -> float:
        return half_life_decay(samples_seen, 100, half_life=1000.0, warmup_ratio=0.05)

    assert decay(2_000) == pytest.approx(0.5)  # half-life 0.05 x 2,000
    assert decay(20_000) == pytest.approx(0.5**0.1)
    assert decay(10**9) == pytest.approx(0.5**0.1)
    assert decay(100) < 1e-5  # the first weights are noise


def trained(cfg: EmaConfig) -> dict[str, list[float]]:
    """The averages of a number that climbs by one a step."""
    ema = Ema(cfg, [torch.zeros(2)])
    for step in range(1, 21):
        ema.update([torch.full((2,), float(step))], 10 * step, 10)
    return {name: shards[0].tolist() for name, shards in ema.averages.items()}


def test_several_averages_are_each_what_it_would_be_alone() -> None:
    several = trained(EmaConfig(half_life_samples=50.0, more_half_lives=[20.0, 1000.0], posthoc=[0.05, 0.1]))
    assert list(several) == ["ema", "ema-20", "ema-1000", "posthoc-0.05", "posthoc-0.1"]
    assert several["ema"] == trained(EmaConfig(half_life_samples=50.0))["ema"]
    assert several["ema-20"] == trained(EmaConfig(half_life_samples=20.0))["ema"]
    assert several["ema-1000"] == trained(EmaConfig(half_life_samples=1000.0))["ema"]


def test_host_memory_changes_no_average() -> None:
    assert trained(EmaConfig(half_life_samples=50.0, on_cpu=True)) == trained(EmaConfig(half_life_samples=50.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"half_life_samples": 0, "more_half_lives": [5]}, "need an ema.half_life_samples above 0"),
        ({"half_life_samples": 0, "posthoc": [0.05, 0.1]}, "need an ema.half_life_samples above 0"),
        ({"half_life_samples": 50, "more_half_lives": [50]}, "all different"),
        ({"more_half_lives": [-1]}, "positive"),
        ({"posthoc": [0.05]}, "two or more"),
        ({"posthoc": [0.05, 0.3]}, r"in \(0, 0.28\)"),
    ],
)
def test_averages_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EmaConfig(**options)
    assert decays(EmaConfig(half_life_samples=0)) == {}


def test_average_is_fp32_and_its_own_memory() -> None:
    master = torch.full((4,), 0.1, dtype=torch.bfloat16)
    ema = Ema(EmaConfig(), [master])
    assert ema.shards[0].dtype is torch.float32
    master.zero_()
    assert ema.shards[0].min() > 0
