"""Muon against torch's own, which takes matrices only, and what its steps are made of."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from conf.schema import OptimConfig, OptimizerName
from train.engine.backend.layout import Members, whole
from train.engine.optim import LENGTH, MOMENTUM, Muon, hidden_matrices, make_optimizer, orthogonal, step_of


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(3, 8, 3)
        self.tall, self.wide = nn.Linear(8, 24), nn.Linear(24, 8)
        self.kernel = nn.Conv2d(8, 8, 3)
        self.words = nn.Embedding(5, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.place = nn.Parameter(torch.randn(4, 8))
        self.conv_out = nn.Conv2d(8, 3, 3)


def placed(network: nn.Module, cfg: OptimConfig) -> Muon:
    optimizer = make_optimizer(network, cfg)
    assert isinstance(optimizer, Muon)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    optimizer.place(whole(parameters, torch.device("cpu"), Members()), list(parameters.values()))
    return optimizer


def gradients(network: nn.Module, steps: int) -> Iterator[None]:
    """Sets another random gradient for each step."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        yield


def test_hidden_matrices_are_those_between_the_first_and_last_layer() -> None:
    assert hidden_matrices(Network()) == ["tall.weight", "wide.weight", "kernel.weight"]


def test_matrices_step_as_torchs_muon_and_the_rest_as_adamw() -> None:
    cfg = OptimConfig(name=OptimizerName.muon, lr=0.02, weight_decay=0.1)
    ours, theirs = Network(), Network()
    hidden = [theirs.tall.weight, theirs.wide.weight]
    rest = [p for name, p in theirs.named_parameters() if not name.startswith(("tall.w", "wide.w", "kernel.w"))]
    decay = [{"params": [p for p in rest if p.ndim >= 2]}, {"params": [p for p in rest if p.ndim < 2]}]
    decay = [group | {"weight_decay": w} for group, w in zip(decay, (0.1, 0.0), strict=True)]
    muon = torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(decay, lr=0.02)
    optimizer, before = placed(ours, cfg), {n: p.detach().clone() for n, p in ours.named_parameters()}
    for _ in zip(gradients(ours, 5), gradients(theirs, 5), strict=True):
        optimizer.step()
        muon.step()
        adamw.step()
    for name, parameter in ours.named_parameters():
        if name == "kernel.weight":
            continue
        bound = 1e-2 if name in ("tall.weight", "wide.weight") else 1e-6  # torch's iterates in bf16
        moved = (theirs.get_parameter(name) - before[name]).norm()
        assert (parameter - theirs.get_parameter(name)).norm() <= bound * moved, name
    assert torch.equal(ours.frozen.weight, before["frozen.weight"])


def test_kernel_steps_as_the_matrix_that_it_is() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    torch.testing.assert_close(step_of(kernel), step_of(kernel.reshape(8, 36)).view(8, 4, 3, 3))
    assert math.isclose(step_of(kernel).square().mean().sqrt(), LENGTH, rel_tol=0.3)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8)])
def test_orthogonal_matrix_keeps_directions_and_forgets_lengths(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    left, lengths, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)

    def turned(values: Tensor) -> Tensor:
        return left.T @ orthogonal(left * values @ right) @ right.T

    result = turned(lengths)
    torch.testing.assert_close(result, result.diagonal().diag(), atol=1e-5, rtol=0)
    assert result.diagonal().min() > 0.6 and result.diagonal().max() < 1.25
    torch.testing.assert_close(turned(1000 * lengths), result)
    assert orthogonal(torch.zeros(shape)).eq(0).all()


def test_moments_have_the_names_of_adamws() -> None:
    network = Network()
    optimizer = placed(network, OptimConfig(name=OptimizerName.muon))
    for _ in gradients(network, 2):
        optimizer.step()
    states = [optimizer.state[p] for p in network.parameters() if p.requires_grad]
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} and state["step"] == 2 for state in states)
    assert optimizer.state[network.kernel.weight]["exp_avg_sq"].eq(0).all()


def test_network_without_hidden_matrices_learns_by_adamw_alone() -> None:
    network = nn.Sequential(nn.Embedding(5, 8), nn.LayerNorm(8))
    optimizer = placed(network, OptimConfig(name=OptimizerName.muon))
    assert not any(group.get("hidden") for group in optimizer.param_groups)
    before = network[0].weight.detach().clone()
    for _ in gradients(network, 1):
        optimizer.step()
    assert not torch.equal(network[0].weight, before)
