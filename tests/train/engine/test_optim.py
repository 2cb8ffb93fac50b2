"""Learning rate as a function of samples, the decayed group, and gradient clipping."""

import math

import pytest
import torch
from torch import nn

from conf.schema import LrDecay, OptimConfig
from train.engine.optim import adamw, lr_at, unscale_and_clip

TOTAL = 1000


@pytest.mark.parametrize("decay", list(LrDecay))
def test_warmup_rises_linearly_to_the_peak(decay: LrDecay) -> None:
    cfg = OptimConfig(lr=2.0, warmup_samples=100, decay=decay, hold_fraction=0.5)
    assert [lr_at(n, cfg, TOTAL) for n in (0, 25, 50, 100, 500)] == [0.0, 0.5, 1.0, 2.0, 2.0]


def test_decays_end_at_the_final_ratio_and_stay_there() -> None:
    for decay in (LrDecay.linear, LrDecay.cosine):
        cfg = OptimConfig(lr=2.0, decay=decay, hold_fraction=0.2, final_lr_ratio=0.1)
        assert lr_at(200, cfg, TOTAL) == 2.0
        assert lr_at(600, cfg, TOTAL) == pytest.approx(1.1)  # half-way, both are in the middle
        assert lr_at(TOTAL, cfg, TOTAL) == pytest.approx(0.2)
        assert lr_at(2 * TOTAL, cfg, TOTAL) == pytest.approx(0.2)
    quarter = lr_at(400, OptimConfig(lr=1.0, decay=LrDecay.cosine, hold_fraction=0.2), TOTAL)
    assert quarter == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))


def test_decay_begins_at_the_peak_however_long_the_warmup() -> None:
    cfg = OptimConfig(lr=1.0, warmup_samples=400, decay=LrDecay.linear)
    assert lr_at(400, cfg, TOTAL) == 1.0
    assert lr_at(700, cfg, TOTAL) == pytest.approx(0.5)
    assert lr_at(TOTAL, OptimConfig(lr=1.0, warmup_samples=2 * TOTAL, decay=LrDecay.linear), TOTAL) == 0.5


def test_only_matrices_and_kernels_decay() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8, 2))
    network[0].weight.requires_grad_(False)
    groups = adamw(network, OptimConfig(weight_decay=0.3)).param_groups
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    expected = {name: 0.3 if name.endswith("3.weight") else 0.0 for name, _ in network.named_parameters()}
    del expected["0.weight"]  # frozen
    assert {n: decay_of[id(p)] for n, p in network.named_parameters() if id(p) in decay_of} == expected


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
def test_clipping_of_scaled_gradients_equals_torchs_of_plain_ones(limit: float) -> None:
    torch.manual_seed(0)
    plain = [torch.zeros(5, 3, requires_grad=True), torch.zeros(7, requires_grad=True), torch.zeros(2)]
    scaled = [p.clone().detach() for p in plain]
    for p, q in zip(plain[:2], scaled[:2], strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad * 1024
    norm = nn.utils.clip_grad_norm_(plain, limit or math.inf)
    assert unscale_and_clip(scaled, limit, 1024.0) == pytest.approx(norm.item(), rel=1e-6)
    for p, q in zip(plain[:2], scaled[:2], strict=True):
        torch.testing.assert_close(q.grad, p.grad)
