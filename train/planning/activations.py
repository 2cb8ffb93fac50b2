"""How much memory a training step of a U-Net takes beside its weights: the real network, run on the meta device.

Nothing is computed there and nothing is stored; every tensor that comes to life is counted until it dies. A meta tensor
has no autocast and no fused attention, so a mode stands in for both, as they are on the device in question.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward as run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from conf.schema import Precision
from conf.schema.networks import UNetConfig
from models.unet import UNet
from train.engine.precision import AUTOCAST, round_weights

NARROW = {F.conv2d, F.linear, F.scaled_dot_product_attention}  # autocast computes these in low precision
WIDE: Mapping[str, set[Callable]] = {"cuda": {F.group_norm, F.layer_norm}, "cpu": set()}  # and these in fp32


@dataclass(frozen=True, slots=True)
class Activations:
    """Most bytes beside the weights that a forward and backward pass holds at once."""

    alone: int  # where the gradients of the weights are taken away as they come, or have their place already
    with_gradients: int  # where these come to life while the activations die
    operators: int = 0  # that made a new tensor


def unet_activations(
    cfg: UNetConfig,
    batch: int,
    height: int,
    width: int,
    tokens: int,
    low_precision: torch.dtype | None = None,
    checkpointing: bool = False,
    device: str = "cuda",
    rounded: tuple[type[nn.Module], ...] = (),
) -> Activations:
    """Activations of a training step on `batch` latents of height x width, with a text of so many tokens.

    Args:
        cfg: the network.
        batch: B.
        height: h.
        width: w.
        tokens: L.
        low_precision: what autocast casts to; None for fp32.
        checkpointing: whether activations are computed again in the backward pass.
        device: whose autocast is meant, "cuda" or "cpu"; the first keeps what it normalises in fp32.
        rounded: layers whose weights are in low precision, as FSDP gathers them: autocast keeps no copies of them.
    """
    with torch.device("meta"):
        network = UNet(cfg)
    for part in network.modules():
        if isinstance(part, rounded) and low_precision is not None:
            part.to(low_precision)
    network.checkpoint_gradients(checkpointing)
    arguments = _arguments(cfg, batch, height, width, tokens)
    stand_in = _StandIn(low_precision, WIDE[device])
    with _StepCounter(network) as counter, stand_in:
        loss = network(**arguments).float().square().mean()
        stand_in.end_forward()
        # `loss.backward()` steps out of the mode, in which checkpointing computes once more.
        run_backward((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)
    return Activations(counter.most, counter.most_with_gradients, counter.made)


@torch.no_grad()
def frozen_activations(
    cfg: UNetConfig, batch: int, height: int, width: int, tokens: int, precision: Precision, device: str = "cuda"
) -> Activations:
    """Activations of a forward pass of a network that is trained no more; arguments as of `unet_activations`."""
    network = frozen_unet(cfg, precision)
    arguments = _arguments(cfg, batch, height, width, tokens)
    with _StepCounter(network) as counter, _StandIn(AUTOCAST.get(precision), WIDE[device]):
        network(**arguments)
    return Activations(counter.most, counter.most_with_gradients, counter.made)


def frozen_unet(cfg: UNetConfig, precision: Precision) -> UNet:
    """A network as a teacher is held, its weights rounded, on the meta device."""
    with torch.device("meta"):
        network = UNet(cfg)
    round_weights(network, precision)
    return network.requires_grad_(False)


def _arguments(cfg: UNetConfig, batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
    """What the forward pass of a U-Net takes, on the meta device."""
    with torch.device("meta"):
        arguments = {"sample": torch.empty(batch, cfg.in_channels, height, width), "timesteps": torch.empty(batch)}
        if cfg.cross_attention_dim is not None:
            arguments["context"] = torch.empty(batch, tokens, cfg.cross_attention_dim)
        if cfg.num_class_embeds is not None:
            arguments["class_labels"] = torch.empty(batch, dtype=torch.long)
        elif cfg.class_embed_type == "timestep":
            arguments["class_labels"] = torch.empty(batch)
        elif cfg.class_embed_type == "projection":
            arguments["class_labels"] = torch.empty(batch, cfg.projected_width)
        if cfg.addition_time_embed_dim is not None:
            arguments["pooled"] = torch.empty(batch, cfg.projected_width - 6 * cfg.addition_time_embed_dim)
            arguments["sizes"] = torch.empty(batch, 6)
    return arguments


class StorageCounter(TorchDispatchMode):
    """Bytes of the storages of a device that come to life under it and still live, and the most that lived at once."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.live, self.most, self.made = 0, 0, 0  # bytes, bytes, and storages so far
        self.known: dict[int, int] = {}  # bytes by storage

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else (made,):
            # One that wraps another, as a part of a cut weight, has no bytes of its own.
            held = isinstance(tensor, Tensor) and not is_traceable_wrapper_subclass(tensor)
            if held and tensor.device.type == self.device:
                self.note(tensor.untyped_storage())
        return made

    def note(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it dies; one that is known as it is now, where it was resized."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.made += 1
            weakref.finalize(storage, self._forget, key)
        self.live += size - self.known.get(key, 0)
        self.known[key] = size
        self.most = max(self.most, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self.known.pop(key)


class _StepCounter(StorageCounter):
    """Counts in a training step: the network's weights do not count, and their gradients are dropped as they come."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__("meta")
        self.gradients, self.most_with_gradients = 0, 0
        for parameter in network.parameters():
            self.known[parameter.untyped_storage()._cdata] = parameter.nbytes
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._take)

    def note(self, storage: torch.UntypedStorage) -> None:
        super().note(storage)
        self.most_with_gradients = max(self.most_with_gradients, self.live + self.gradients)

    def _take(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.gradients += parameter.grad.nbytes
        parameter.grad = None


class _StandIn(TorchFunctionMode):
    """Autocast, and attention that keeps no probabilities."""

    def __init__(self, low: torch.dtype | None, wide: set[Callable]) -> None:
        super().__init__()
        self.low, self.wide = low, wide
        # Autocast casts each that is trained once and keeps it until the forward pass ends.
        self.weights: dict[int, Tensor] | None = {}

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.low is not None and (func in NARROW or func in self.wide):
            dtype = self.low if func in NARROW else torch.float32
            args, kwargs = tree_map(lambda value: self._cast(value, dtype), (args, kwargs or {}))
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args)
        return func(*args, **(kwargs or {}))

    def end_forward(self) -> None:
        self.weights = None

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or value.dtype == dtype:
            return value
        if self.weights is None or not (isinstance(value, nn.Parameter) and value.requires_grad):
            return value.to(dtype)
        return self.weights.setdefault(id(value), value.to(dtype))


class _Attention(torch.autograd.Function):
    """What fused attention allocates (Dao et al. 2022): its result and one number per query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
