"""What `auto` comes to, and that records name it."""

import pytest
import torch

from conf.entry import compose
from conf.schema import PlanRun, Precision, RuntimeConfig
from train.engine.precision import resolved
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
