"""Learning rate as a function of samples, the decayed group, and gradient clipping."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from conf.schema import LrDecay, OptimConfig, OptimizerName, Precision
from train.engine.backend.layout import Members, whole
from train.engine.optim import Muon, adamw, judge_gradients, lr_at, make_optimizer, sound_step
from train.engine.precision import GROWTH_STEPS, LossScale

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


def test_what_the_fused_step_reads_lies_where_its_parameters_do() -> None:
    """Offloaded ones have it on the CPU, arrived: torch reads it there at once. The meta device stands for another."""
    network = nn.Linear(2, 2, device="meta")
    optimizer: Any = adamw(network, OptimConfig())
    gradients = [torch.empty_like(parameter) for parameter in network.parameters()]
    scale = LossScale(Precision.fp32, torch.device("cpu"))
    norm = judge_gradients(optimizer, gradients, 1.0, scale, lambda norm: torch.tensor(2.0))
    assert float(norm) == 2.0 and {optimizer.grad_scale.device.type, optimizer.found_inf.device.type} == {"meta"}


def filled(network: nn.Module, factor: float) -> None:
    """Gradients that are always the same, times a factor."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter) * factor


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
def test_a_step_of_scaled_gradients_equals_torchs_of_plain_and_clipped_ones(limit: float) -> None:
    plain, scaled = nn.Linear(5, 3), nn.Linear(5, 3)
    scaled.load_state_dict(plain.state_dict())
    cfg, scale = OptimConfig(lr=0.1, grad_clip=limit), LossScale(Precision.fp16, torch.device("cpu"))
    theirs, ours = adamw(plain, cfg), adamw(scaled, cfg)
    for _ in range(3):
        filled(plain, 1.0)
        filled(scaled, scale.value)
        norm = nn.utils.clip_grad_norm_(plain.parameters(), limit or math.inf)
        theirs.step()
        assert float(sound_step(ours, scaled.parameters(), limit, scale)) == pytest.approx(norm.item(), rel=1e-6)
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(q, p)
        assert q.grad is None


@pytest.mark.parametrize("name", list(OptimizerName))
def test_a_step_that_is_not_finite_changes_nothing(name: OptimizerName) -> None:
    network = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4))
    optimizer = make_optimizer(network, OptimConfig(name=name, lr=0.1, weight_decay=0.1, grad_clip=1.0))
    if isinstance(optimizer, Muon):
        parameters = dict(network.named_parameters())
        optimizer.place(whole(parameters, torch.device("cpu"), Members()), list(parameters.values()))
    scale = LossScale(Precision.fp32, torch.device("cpu"))
    filled(network, 1.0)
    assert sound_step(optimizer, network.parameters(), 1.0, scale).isfinite()
    before = copy.deepcopy((network.state_dict(), optimizer.state_dict()["state"]))
    filled(network, 1.0)
    network[1].weight.grad[0, 0] = math.nan  # type: ignore[union-attr, index]
    assert not sound_step(optimizer, network.parameters(), 1.0, scale).isfinite()
    after = (network.state_dict(), optimizer.state_dict()["state"])
    assert all(torch.equal(a, b) for a, b in zip(tensors(before), tensors(after), strict=True))
    filled(network, 1.0)
    assert sound_step(optimizer, network.parameters(), 1.0, scale).isfinite()
    assert not torch.equal(before[0]["1.weight"], network[1].weight)


def tensors(states: object) -> list[torch.Tensor]:
    if isinstance(states, torch.Tensor):
        return [states]
    parts = states.values() if isinstance(states, dict) else states if isinstance(states, tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def test_the_loss_scale_halves_at_an_overflow_and_doubles_after_many_sound_steps() -> None:
    scale = LossScale(Precision.fp16, torch.device("cpu"))
    yes, no = torch.tensor(True), torch.tensor(False)
    for finite in (no, no, *[yes] * (GROWTH_STEPS - 1)):
        scale.update(finite)
    assert scale.value == 2.0**14
    again = LossScale(Precision.fp16, torch.device("cpu"))
    again.load(scale.state())
    for one in (scale, again):
        one.update(yes)
        assert one.value == 2.0**15
        one.update(no)
        one.update(yes)
        assert one.state() == {"value": 2.0**14, "sound_steps": 1}
    off = LossScale(Precision.bf16, torch.device("cpu"))
    off.load(scale.state())
    off.update(no)
    assert off.state() == {"value": 1.0, "sound_steps": 0}
