"""What `auto` comes to, and that records name it."""

import pytest
import torch

from conf.entry import compose
from conf.schema import PlanRun, Precision, RuntimeConfig, UNetRun
from models.unet import UNet
from train.engine.precision import autocast, resolved, round_weights
from train.engine.runtime import start

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("known", "expected"), [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({}, "fp32")]
)
def test_auto_is_bf16_where_the_cpu_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, known: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert resolved(Precision.auto, CPU).value == expected
    assert resolved(Precision.fp16, CPU) is Precision.fp16
    cfg = RuntimeConfig(precision=Precision.auto)
    assert start(cfg).precision.value == cfg.precision.value == expected


@pytest.mark.parametrize("fast", [True, False])
def test_auto_asks_the_gpu_without_its_emulation(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast and not including_emulation)
    assert resolved(Precision.auto, torch.device("cuda")) is (Precision.bf16 if fast else Precision.fp32)


def test_a_plan_takes_it_for_its_accelerator() -> None:
    def precision(accelerator: str) -> Precision:
        options = ["experiment=smoke", "runtime.precision=auto", f"accelerator={accelerator}"]
        return compose("plan", PlanRun, options).runtime.precision

    assert (precision("h100"), precision("v100")) == (Precision.bf16, Precision.fp32)


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp16, Precision.fp32])
def test_rounded_weights_are_those_that_autocast_computes_with(precision: Precision) -> None:
    torch.manual_seed(0)
    network = UNet(compose("train_unet", UNetRun, ["experiment=smoke", "run_dir=unused"]).model).requires_grad_(False)
    for parameter in network.parameters():  # branches start at zero
        parameter.add_(0.05 * torch.randn_like(parameter))
    given = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0]), torch.randn(2, 7, 16)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    with torch.no_grad(), autocast(CPU, precision):
        expected = network(*given)
        round_weights(network, precision)
        found = network(*given)
    error = 0.0 if precision is Precision.fp32 else 0.02  # a sum in another order, rounded; the output is of size 1
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=error)
    low = {name: tensor for name, tensor in network.named_parameters() if tensor.dtype is not torch.float32}
    assert bool(low) is (precision is not Precision.fp32)
    assert all(torch.equal(tensor, before[name].to(tensor.dtype)) for name, tensor in low.items())
    # Autocast computes norms in fp32, and adds up weights of this convolution before it rounds.
    assert not any("norm" in name or "upsamplers" in name for name in low)
