"""One network under torch's FSDP2 (Zhao et al. 2023): weights, gradients and AdamW's moments in shards, no DeepSpeed.

Each parameter is cut along its first dimension into one run of rows for each process of a machine, and machines hold
copies (hybrid sharding): what is gathered and scattered for each part of the network stays within a machine, and only
sums of gradients travel between them. The optimiser and the average work on those rows as flat tensors, so a step costs
no exchange but that of the gradients' norm.
"""

from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from conf.process import processes_here
from conf.schema import Offload, OptimConfig, UNetRuntimeConfig
from train.engine.backend.distribute import units_of
from train.engine.backend.layout import Initial, Layout, Members, Piece, cut_over, made_by_all, require_cuttable
from train.engine.optim import Accumulating, make_optimizer, sound_step
from train.engine.precision import AUTOCAST, autocast
from train.engine.runtime import Runtime


class FsdpBackend(Accumulating):
    """Fully sharded data parallelism. Every micro-batch's gradients are reduced: no process ever holds all of them."""

    def __init__(
        self,
        runtime: Runtime,
        module: nn.Module,
        optim: OptimConfig,
        accumulation: int,
        cfg: UNetRuntimeConfig,
        initial: Initial | None,
    ) -> None:
        super().__init__(optim, accumulation, runtime)
        parameters = dict(module.named_parameters())
        require_cuttable(parameters)
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        unmade = {name: shapes[name] for name, parameter in parameters.items() if parameter.is_meta}
        mesh = mesh_of(runtime, cfg.sharing(runtime.world, min(runtime.gather_objects(processes_here()))))
        shard(module, mesh, runtime, cfg)
        # What is on the meta device was cut there: only this process's rows of it are ever allocated.
        place(module, runtime.device, torch.device("cpu") if cfg.offload is Offload.parameters else runtime.device)
        self.runtime, self.module = runtime, module
        self.parameters: dict[str, Any] = dict(module.named_parameters())  # DTensors
        self.masters: list[Tensor] = [_rows(parameter) for parameter in self.parameters.values()]
        self.optimizer = make_optimizer(module, optim)
        masters = dict(zip(self.parameters.values(), self.masters, strict=True))
        for group in self.optimizer.param_groups:
            group["params"] = [masters[parameter] for parameter in group["params"]]
        copies, shards = (Members(mesh.size(i), mesh.get_local_rank(i), mesh.get_group(i)) for i in (0, 1))
        pieces = {
            name: _piece(index, shapes[name], shards, master.numel())
            for index, (name, master) in enumerate(zip(shapes, self.masters, strict=True))
        }
        self.layout: Layout = cut_over(shards, copies, shapes, pieces, runtime.device)
        if initial is not None:
            for name, tensor in made_by_all(initial, unmade, runtime.device, Members(runtime.world, runtime.rank)):
                self.layout.disperse(name, tensor, self.masters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Through the sharded network, in the run's precision; outputs in fp32."""
        with autocast(self.runtime.device, self.runtime.precision):
            return convert_to_fp32(self.module(*args, **kwargs))

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients within each machine; over the machines they are summed in the last pass."""
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_all_reduce(last)
        super().backward(loss, last)

    def step(self) -> Tensor:
        """Clip, update, clear; returns the norm before clipping, []. Not finite: the update was skipped."""
        for parameter, master in zip(self.parameters.values(), self.masters, strict=True):
            master.grad = None if parameter.grad is None else _rows(parameter.grad)
            parameter.grad = None
        self.passes = 0
        return sound_step(self.optimizer, self.masters, self.grad_clip, self.scale, self._over_processes)

    def _over_processes(self, norm: Tensor) -> Tensor:
        own = norm.to(self.runtime.device, torch.float64)  # with offload of the parameters it is on the CPU
        # Each copy has all squares once; copies have the same.
        return (self.runtime.summed(own.square()) / self.layout.copies.size).sqrt()


def place(module: nn.Module, device: torch.device, home: torch.device) -> None:
    """Bring parameters, or memory for those on the meta device, to their home, and buffers to the device."""

    def placed(tensor: Tensor) -> Tensor:
        where = home if isinstance(tensor, nn.Parameter) else device
        return torch.empty_like(tensor, device=where) if tensor.is_meta else tensor.to(where)

    module._apply(placed)


def mesh_of(runtime: Runtime, shards: int) -> DeviceMesh:
    """The processes as [copies, shards]: neighbours cut a network among them."""
    sides = (runtime.world // shards, shards)
    return init_device_mesh(runtime.device.type, sides, mesh_dim_names=("copies", "shards"))


def shard(module: nn.Module, mesh: DeviceMesh, runtime: Runtime, cfg: UNetRuntimeConfig) -> None:
    """Cut the network in place, each of its units by itself."""
    dtype = AUTOCAST.get(runtime.precision)
    on_gpu = runtime.device.type == "cuda"
    options: dict[str, Any] = {
        "mesh": mesh if mesh.size(0) > 1 else mesh["shards"],
        "reshard_after_forward": True,  # the outermost part, too: a step finds no gathered copy that it would outdate
        # Gathered in the type that autocast computes in: half the bytes, and no fp32 copy beside it.
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu) if cfg.offload is Offload.parameters else OffloadPolicy(),
    }
    for part in list(units_of(module)):
        fully_shard(part, **options)


def _rows(tensor: Any) -> Tensor:
    """This process's rows of a DTensor, flat, in the same memory."""
    rows: Tensor = tensor.detach().to_local().view(-1)
    return rows


def _piece(index: int, shape: torch.Size, shards: Members, numel: int) -> Piece:
    """Rows are dealt out in equal runs; the last processes may get fewer, or none."""
    rows = -(-shape[0] // shards.size)
    start = min(shards.rank * rows, shape[0]) * shape[1:].numel()
    return Piece(index, 0, start, numel)
