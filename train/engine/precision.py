"""Low precision, alike under every way of distributing a network: autocast, and the loss scale that fp16 needs."""

import torch
from torch import Tensor, nn

from conf.schema import Precision
from models.attention import GatedLinear, PixelLinear
from models.layers import SiluConv2d

AUTOCAST = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}  # fp32 has no entry
ROUNDED = {nn.Linear, nn.Conv2d, GatedLinear, PixelLinear, SiluConv2d}  # they compute with their weights as they are
INITIAL_SCALE = 2.0**16
GROWTH_STEPS = 2000


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which networks compute in `precision`."""
    return torch.autocast(device.type, dtype=AUTOCAST.get(precision), enabled=precision in AUTOCAST)


def round_weights(network: nn.Module, precision: Precision) -> None:
    """Keep weights that are trained no more as autocast would round them at every call.

    The same computation, from half of the memory, and no call casts all weights before it. Autocast itself remembers
    only what it casts of weights that have gradients.
    """
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = rounded(parameter.data, module, precision)


def rounded(tensor: Tensor, layer: nn.Module, precision: Precision) -> Tensor:
    """A parameter of a layer as `round_weights` keeps it."""
    low = AUTOCAST.get(precision)
    return tensor if low is None or type(layer) not in ROUNDED else tensor.to(low)


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

    Halved after a step whose gradients overflowed, doubled after `GROWTH_STEPS` sound ones in a row. It lies on the
    device, so that a step need not wait for what became of the one before.
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self.enabled = precision is Precision.fp16
        self.factor = torch.tensor(INITIAL_SCALE if self.enabled else 1.0, device=device)  # []
        self.sound_steps = torch.zeros((), dtype=torch.int32, device=device)

    @property
    def value(self) -> float:
        """The scale now; waits for the device."""
        return float(self.factor)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss that is to be differentiated."""
        return loss * self.factor if self.enabled else loss

    def update(self, finite: Tensor) -> None:
        """Learn from a step whether its gradients were finite, bool []."""
        if not self.enabled:
            return
        sound = torch.where(finite, self.sound_steps + 1, 0)
        grown = torch.where(sound == GROWTH_STEPS, self.factor * 2, self.factor)
        self.factor = torch.where(finite, grown, self.factor / 2)
        self.sound_steps = torch.where(sound == GROWTH_STEPS, 0, sound)

    def state(self) -> dict[str, float]:
        """For the checkpoint."""
        return {"value": self.value, "sound_steps": int(self.sound_steps)}

    def load(self, state: dict[str, float]) -> None:
        """Counterpart of `state`; what another precision left is not taken over."""
        if self.enabled and state["value"] != 1.0:
            self.factor.fill_(state["value"])
            self.sound_steps.fill_(int(state["sound_steps"]))
