"""Low precision, alike under every way of distributing a network: autocast, and the loss scale that fp16 needs."""

import math

import torch

from conf.schema import Precision

AUTOCAST = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}  # fp32 has no entry
INITIAL_SCALE = 2.0**16
GROWTH_STEPS = 2000


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which networks compute in `precision`."""
    return torch.autocast(device.type, dtype=AUTOCAST.get(precision), enabled=precision in AUTOCAST)


def resolved(precision: Precision, device: torch.device) -> Precision:
    """What `auto` is on a device: bf16 where that has instructions for it; without them it is slower than fp32."""
    if precision is not Precision.auto:
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known = torch.cpu.get_capabilities()
        fast = known.get("avx512_bf16", False) or known.get("amx_bf16", False)
    return Precision.bf16 if fast else Precision.fp32


class LossScale:
    """Dynamic loss scale of fp16 (Micikevicius et al. 2018, section 3.2); stays 1 in the other precisions.

    Halved after a step whose gradients overflowed, doubled after `GROWTH_STEPS` sound ones in a row.
    """

    def __init__(self, precision: Precision) -> None:
        self.enabled = precision is Precision.fp16
        self.value = INITIAL_SCALE if self.enabled else 1.0
        self.sound_steps = 0

    def update(self, norm: float) -> None:
        """Learn from the gradient norm of a step."""
        if not self.enabled:
            return
        if not math.isfinite(norm):
            self.value, self.sound_steps = self.value / 2, 0
            return
        self.sound_steps += 1
        if self.sound_steps == GROWTH_STEPS:
            self.value, self.sound_steps = self.value * 2, 0

    def state(self) -> dict[str, float]:
        """For the checkpoint."""
        return {"value": self.value, "sound_steps": self.sound_steps}

    def load(self, state: dict[str, float]) -> None:
        """Counterpart of `state`; what another precision left is not taken over."""
        if self.enabled and state["value"] != 1.0:
            self.value, self.sound_steps = state["value"], int(state["sound_steps"])
