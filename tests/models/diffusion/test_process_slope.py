"""Forward-mode derivatives of a network against closed forms, finite differences and the backward pass."""

import pytest
import torch
from torch import Tensor

from conf.schema.networks import UNetConfig
from models.diffusion.process import slope
from models.unet import UNet

TEXT = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "cross_attention_dim": 8}
TEXT["up_block_types"] = ["UpBlock2D", "CrossAttnUpBlock2D"]
PIXELS = {"down_block_types": ["AttnDownBlock2D", "ResnetDownsampleBlock2D"], "cross_attention_dim": None}
PIXELS |= {"up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"], "downsample_type": "resnet"}
PIXELS |= {"upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift"}
KINDS = {"text": TEXT, "pixels": PIXELS, "few pixels": TEXT | {"block_out_channels": [32, 64]}}


def network_of(kind: str, dtype: torch.dtype = torch.float64) -> UNet:
    """Two levels, each weight moved: no branch that begins at zero may hide its derivative."""
    torch.manual_seed(0)
    options = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": [2]}
    network = UNet(UNetConfig(**(options | {"time_cond_proj_dim": 16} | KINDS[kind])))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.to(dtype)


class Told:
    """Such a network with its other inputs; it is told how far t is from r."""

    def __init__(self, network: UNet) -> None:
        self.network = network
        width, dtype = network.cfg.cross_attention_dim, network.conv_in.weight.dtype
        self.context = None if width is None else torch.randn(3, 5, width, dtype=dtype)

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.network(x, timesteps, self.context, guidance=1 + (timesteps - 2) / 1000)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, timesteps, and where they move; small timesteps, whose waves float32 knows to many digits."""
    x, dx = torch.randn(2, 3, 4, 8, 8, dtype=dtype)
    return x, torch.tensor([2.0, 5.0, 9.0], dtype=dtype), dx, torch.tensor([1.0, 0.5, -2.0], dtype=dtype)


@pytest.mark.parametrize("kind", list(KINDS))
def test_slope_is_that_of_finite_differences(kind: str) -> None:
    network, (x, t, dx, dt) = Told(network_of(kind)), inputs()
    prediction, derivative = slope(network, x, t, dx, dt)
    h = 2.0**-7
    with torch.no_grad():
        difference = (network(x + h * dx, t + h * dt) - network(x - h * dx, t - h * dt)) / (2 * h)
        torch.testing.assert_close(prediction, network(x, t))
    assert (derivative - difference).norm() < 1e-3 * difference.norm()


@pytest.mark.parametrize("kind", list(KINDS))
def test_slope_is_that_of_the_backward_pass(kind: str) -> None:
    """w · (J v) = (J^T w) · v, where the layers that compute again going back take part."""
    network, (x, t, dx, dt) = Told(network_of(kind)), inputs()
    network.network.checkpoint_gradients(True)
    _, derivative = slope(network, x, t, dx, dt)
    x.requires_grad_(), t.requires_grad_()
    weights = torch.randn_like(derivative)
    grad_x, grad_t = torch.autograd.grad((weights * network(x, t)).sum(), [x, t])
    torch.testing.assert_close((weights * derivative).sum(), (grad_x * dx).sum() + (grad_t * dt).sum())


def test_slope_of_a_closed_form() -> None:
    x, t, dx, dt = inputs()
    shaped = t.view(-1, 1, 1, 1)
    prediction, derivative = slope(lambda x, t: torch.sin(x) * t.view(-1, 1, 1, 1), x, t, dx, dt)
    assert torch.equal(prediction, x.sin() * shaped)
    torch.testing.assert_close(derivative, x.cos() * dx * shaped + x.sin() * dt.view(-1, 1, 1, 1))
    constant = slope(lambda x, t: torch.ones(3, dtype=torch.float64), x, t, dx, dt)
    assert torch.equal(constant[1], torch.zeros(3, dtype=torch.float64))


def test_slope_leaves_no_trace() -> None:
    """No gradients, nothing changed in its inputs or the weights; the next pass trains as ever."""
    network, arguments = Told(network_of("text")), inputs()
    before = [tensor.clone() for tensor in (*arguments, *network.network.parameters())]
    found = slope(network, *arguments)
    assert not any(tensor.requires_grad for tensor in found)
    assert all(map(torch.equal, before, (*arguments, *network.network.parameters())))
    network(*arguments[:2]).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.network.parameters())


def test_autocast_of_the_cpu_does_not_round_a_slope() -> None:
    network, arguments = Told(network_of("text", torch.float32)), inputs(torch.float32)
    exact = slope(network, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, slope(network, *arguments), exact))


def test_compiled_parts_have_a_slope() -> None:
    network, arguments = Told(network_of("text", torch.float32)), inputs(torch.float32)
    expected = slope(network, *arguments)
    for level in network.network.down_blocks:
        level.forward = torch.compile(level.forward, dynamic=False, backend="aot_eager")  # type: ignore[method-assign]
    with torch.no_grad():
        assert network(*arguments[:2]).isfinite().all()  # compiled before
    for found, wanted in zip(slope(network, *arguments), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
