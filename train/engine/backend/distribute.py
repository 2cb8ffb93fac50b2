"""The ways of distributing one network over the processes, and the choice among them."""

import os
import shutil
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema import BackendName, BatchConfig, OptimConfig, UNetRuntimeConfig
from train.engine.backend.ddp import DdpBackend
from train.engine.backend.layout import Initial, Layout
from train.engine.precision import LossScale
from train.engine.runtime import Runtime

MOST_SHAPES = 64  # of images that one training compiles for: buckets of several aspects
SMALLEST = 64  # parts of a network that have less than a 64th of it travel with the part that holds them
LARGE = 16_000_000  # but not those of so many parameters: their travel takes longer than its beginning


class Backend(Protocol):
    """What a way of distributing a network offers to `Trainable`."""

    optimizer: torch.optim.AdamW
    masters: list[Tensor]  # fp32 tensors that the optimiser updates: whole parameters or this process's shards
    layout: Layout  # of the masters
    scale: LossScale

    def forward(self, *args: Any, **kwargs: Any) -> Any: ...
    def backward(self, loss: Tensor, last: bool) -> None: ...
    def step(self) -> Tensor: ...
    def publish(self) -> None: ...


def distribute(
    runtime: Runtime,
    module: nn.Module,
    optim: OptimConfig,
    batch: BatchConfig,
    cfg: UNetRuntimeConfig,
    initial: Initial | None = None,
) -> Backend:
    """The backend that `cfg` asks for; those that are not asked for are not imported.

    Args:
        initial: makes the parameters that the module has on the meta device.

    Raises:
        UserError: it needs something that this machine lacks.

    """
    micro, accumulation = batch.split(runtime.world)
    if cfg.compile:
        require_compiler()
        compile_blocks(module, runtime.device)
    if cfg.backend is BackendName.fsdp:
        from train.engine.backend.fsdp import FsdpBackend

        return FsdpBackend(runtime, module, optim, accumulation, cfg, initial)
    if cfg.backend is BackendName.ddp:
        return DdpBackend(runtime, module, optim, accumulation, initial)
    try:
        from train.engine.backend.zero import ZeroBackend
    except ModuleNotFoundError as error:
        raise UserError(
            f"runtime.backend=deepspeed: no module '{error.name}'; pip install deepspeed, or set runtime.backend=fsdp"
        ) from error
    return ZeroBackend(runtime, module, optim, micro, accumulation, cfg, initial)


def compile_blocks(module: nn.Module, device: torch.device) -> None:
    """Compile the innermost parts of a network one at a time, in place: the parameters keep their names.

    A graph of the whole network would have all gradients ready at its end, so that none could travel before, and
    gathering between two parts would break it. Each part has a graph for each shape that it meets, and no other part's
    count against the most that it may have. A part that holds compiled ones names what it computes `around` them.
    """
    torch._dynamo.config.recompile_limit = MOST_SHAPES
    # A group norm on CUDA gives its channels one after the other, and inductor keeps to that in every graph backward,
    # and in those forward that halve the channels: cuDNN would transpose in and out of each convolution.
    torch._inductor.config.force_layout_optimization = device.type == "cuda"
    compiled = set[nn.Module]()
    for part in parts_of(module):
        whole = compiled.isdisjoint(part.modules())
        for name in ("forward",) if whole else getattr(part, "around", ()):
            call = torch.compile(getattr(part, name), dynamic=False, isolate_recompiles=True)  # type: ignore[call-overload]
            setattr(part, name, call)
        if whole:
            compiled.add(part)


def parts_of(module: nn.Module) -> Iterator[nn.Module]:
    """Members of module lists that are more than one layer, inner ones before those that hold them; then the whole."""
    lists = (part for part in module.modules() if isinstance(part, nn.ModuleList))
    members = {member for part in lists for member in part if any(member.children())}
    yield from (part for part in reversed(list(module.modules())) if part in members)
    yield module


def units_of(module: nn.Module) -> dict[nn.Module, list[nn.Parameter]]:
    """Parts of a network that FSDP gathers one at a time, inner ones first, and what each has that no inner one has.

    Small ones are none: an exchange takes some time however little it moves.
    """
    least = min(LARGE, sum(parameter.numel() for parameter in module.parameters()) / SMALLEST)
    units, taken = dict[nn.Module, list[nn.Parameter]](), set[nn.Parameter]()
    for part in parts_of(module):
        left = [parameter for parameter in part.parameters() if parameter not in taken]
        if sum(parameter.numel() for parameter in left) >= least or part is module:
            units[part] = left
            taken.update(left)
    return units


def require_compiler() -> None:
    """Refuse at the start what would fail at the first step: inductor and Triton call a C++ compiler."""
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "g++"), "clang++")):
        raise UserError("runtime.compile=true: no C++ compiler here; install g++, or set runtime.compile=false")
