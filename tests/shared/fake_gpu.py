"""A GPU that only keeps count: tensors on it have shapes and no values, and copies to it are noted.

Whatever asks for a value of such a tensor, or puts one together with a tensor that was left on the CPU, ends with
torch's own error. Torch knows the device for the rest of the process.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from conf.schema import Precision
from train.engine.runtime import Late, Runtime

ATEN, ROOT = torch.ops.aten, str(Path(__file__).parents[2])


class Copies(TorchDispatchMode):
    """Lines that copy between the devices and wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is ATEN._to_copy.default:
            pair, late = (args[0].device, kwargs.get("device") or args[0].device), kwargs.get("non_blocking", False)
        elif func is ATEN.copy_.default:
            pair, late = (args[1].device, args[0].device), (*args[2:], kwargs.get("non_blocking", False))[0]
        else:
            return func(*args, **kwargs)
        if pair[0].type != pair[1].type and not late:
            lines = [line for line in traceback.extract_stack() if ROOT in line.filename and __file__ != line.filename]
            self.waited.append(f"{lines[-1].filename}:{lines[-1].lineno} {lines[-1].line}")
        return func(*args, **kwargs)


class Event:
    """An event of the fake GPU, which has always done everything."""

    def __init__(self, *of: Any, **named: Any) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...


@contextmanager
def fake_gpu(precision: Precision) -> Iterator[tuple[Runtime, Copies]]:
    """The runtime of a process on the device, and the copies to come; tensors made in here are without values."""
    if torch._C._get_privateuse1_backend_name() != "gpu":
        _setup_privateuseone_for_python_backend("gpu")
        module: Any = torch.gpu  # type: ignore[attr-defined]
        module.is_initialized, module.current_device = lambda: True, lambda: 0
        module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    accelerator: Any = SimpleNamespace(prepare_model=moved, no_sync=nullcontext)
    copies, make = Copies(), torch.tensor

    def made(values: Any, *, device: Any = None, **named: Any) -> torch.Tensor:
        tensor = make(values, **named)  # whose values torch would want to copy for real
        return tensor if device is None else torch.empty(tensor.shape, dtype=tensor.dtype).to(device)

    made_here, arrives = patch.object(torch, "tensor", made), patch.object(torch, "Event", Event)
    read = patch.object(Late, "read", lambda late: [1.0] * late.values.numel())
    alone = torch.autograd.set_multithreading_enabled(
        False
    )  # its threads are of the devices known at the first backward
    with alone, FakeTensorMode(allow_non_fake_inputs=True), made_here, arrives, read, copies:
        yield Runtime(0, 1, 0, torch.device("gpu", 0), precision, accelerator), copies


def without_values(batch: dict[str, Any]) -> dict[str, Any]:
    """A loaded batch, but for the positions: torch would want to copy the values for real."""

    def emptied(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: emptied(key, part) for key, part in value.items()}
        kept = not isinstance(value, torch.Tensor) or name == "position"
        return value if kept else torch.empty(value.shape, dtype=value.dtype)

    return {name: emptied(name, value) for name, value in batch.items()}


def moved(network: nn.Module) -> nn.Module:
    """The network on the device, as `Module.to` cannot do it there."""
    for part in network.modules():
        for kept in (part._parameters, part._buffers):
            for name, tensor in kept.items():
                if tensor is None:
                    continue
                there = tensor.detach().to("gpu", non_blocking=True)
                kept[name] = nn.Parameter(there, tensor.requires_grad) if kept is part._parameters else there
    return network
