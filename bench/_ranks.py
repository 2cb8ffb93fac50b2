"""One of many ranks, simulated: what it holds and exchanges in a training step of a U-Net.

The backend is the real one, DeepSpeed's and FSDP's code included; the tensors are torch's fake ones, which have a size
and no content, and the process group is one that does nothing. Both are global, so a process simulates one case. DDP's
own code takes no fake tensors, so that it has real ones, of a narrow network.

Usage: _ranks.py NETWORK/WAY/RANKS with the names of `NETWORKS` and `WAYS`; prints as JSON
what was planned and what was found, both as `Facts` has them.
"""

import json
import logging
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).parents[1]))  # works where the project is not installed, too

from conf.ending import leave
from conf.entry import compose
from conf.schema import BackendName, PlanRun
from models.unet import UNet
from train.engine.backend import layout
from train.engine.precision import AUTOCAST
from train.engine.runtime import Runtime
from train.engine.trainable import Trainable
from train.planning.activations import StorageCounter, unet_activations
from train.planning.estimate import flows, parameters, rounded_layers, sharding, stage_of

PER_MACHINE, STEPS = 8, 2
TWO_LEVELS = [
    "model.sample_size=16",
    "model.layers_per_block=1",
    "model.down_block_types=[DownBlock2D,CrossAttnDownBlock2D]",
    "model.up_block_types=[CrossAttnUpBlock2D,UpBlock2D]",
]
NETWORKS: dict[str, list[str]] = {  # options of train/plan.py
    "narrow": [*TWO_LEVELS, "model.block_out_channels=[160,320]"],
    "wide": [*TWO_LEVELS, "model.block_out_channels=[640,1280]"],
    "sd1": ["model=sd1"],
    "sdxl": ["model=sdxl"],
    # SDXL twice as wide, with three layers more in its deepest transformers
    "12b": [
        "model=sdxl",
        "model.block_out_channels=[640,1280,2560]",
        "model.attention_head_dim=[10,20,40]",
        "model.transformer_layers_per_block=[1,2,13]",
    ],
}
WAYS: dict[str, list[str]] = {
    "ddp": ["runtime.backend=ddp"],
    "fsdp": ["runtime.backend=fsdp"],
    "fsdp_all": ["runtime.backend=fsdp", "runtime.shard_processes={ranks}"],
    "zero1": ["runtime.zero_stage=1"],
    "zero2": ["runtime.zero_stage=2"],
    "zero3": ["runtime.zero_stage=3"],
    "zero3_all": ["runtime.zero_stage=3", "runtime.shard_processes={ranks}"],
}
SENT = {  # by each rank of a ring, times the bytes of the whole; kinds by the names of torch's operators
    "_allgather_base_": ("gather", 1),
    "allgather_into_tensor_coalesced_": ("gather", 1),
    "_reduce_scatter_base_": ("scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("scatter", 1),
    "allreduce_": ("sum", 2),
    "broadcast_": ("broadcast", 1),
    "allgather_": ("gather", 1),
}
SMALL = 1024  # bytes: what moves no more is a norm or a flag


@dataclass(slots=True)
class Facts:
    """What a rank held, in bytes, and what it exchanged in its last step."""

    built_s: float = 0.0
    weights: int = 0
    optimizer: int = 0
    average: int = 0
    most: int = 0  # from the beginning of the first step on
    operations: dict[str, int] = field(default_factory=dict)  # by "KIND over GROUP SIZE"
    sent: dict[str, int] = field(default_factory=dict)  # bytes by each rank, likewise


def config(case: str) -> PlanRun:
    """The training that is planned and simulated: one sample per rank and step."""
    network, way, ranks = case.split("/")
    options = ["runtime.compile=false", *(option.format(ranks=ranks) for option in WAYS[way])]
    sizes = [f"gpus={ranks}", f"gpus_per_machine={PER_MACHINE}", f"batch.global_batch_size={ranks}"]
    return compose("plan", PlanRun, ["run_dir=unused", *NETWORKS[network], *options, *sizes])


class Observer(StorageCounter):
    """Counts storages and collective operations."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.operations, self.sent = Counter[str](), Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name in SENT:
            kind, times = SENT[name]
            groups = [argument for argument in args if isinstance(argument, torch.ScriptObject)]
            size = times * max(bytes_of(args[0]), bytes_of(args[1]))
            if size > SMALL:
                key = f"{kind} over {dist.ProcessGroup.unbox(groups[0]).size()}"
                self.operations[key] += 1
                self.sent[key] += size
        return super().__torch_dispatch__(func, types, args, kwargs)


def bytes_of(tensors: Any) -> int:
    """Bytes of all tensors in an argument of a collective operation."""
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    return sum(map(bytes_of, tensors)) if isinstance(tensors, list | tuple) else 0


class Alone(Runtime):
    """A rank whose others are pretended: they would say the same."""

    def gather_objects(self, value: Any) -> list[Any]:
        return [value] * self.world


def really(function: Callable) -> Callable:
    """The function with tensors that have content: where it reads what a collective operation left."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return call


def told(observer: Observer, resize: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """The function, of which the observer hears."""

    def call(tensor: Tensor) -> None:
        resize(tensor)
        observer.note(tensor.untyped_storage())

    return call


def pretend(observer: Observer) -> None:
    """Replace what would need content, or hides what it allocates."""
    nn.Module.to = lambda self, *_, **__: self  # type: ignore[method-assign]  # fakes cannot be swapped
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    from train.engine.backend import fsdp, zero

    for backend in (fsdp, zero):
        backend.cut_over = really(layout.cut_over)  # type: ignore[attr-defined]
    fsdp.mesh_of = really(fsdp.mesh_of)
    # FSDP empties and fills the storages of gathered weights, which no operator tells.
    for name in ("alloc_storage", "free_storage"):
        setattr(_fsdp_param, name, told(observer, getattr(_fsdp_param, name)))
    from deepspeed.runtime.zero import stage3, utils

    utils.get_lst_from_rank0 = lambda numbers: numbers
    stage3.is_invalid_grad_norm = lambda _: False  # it reads the norm


def wrapped(module: nn.Module, options: dict[str, Any]) -> nn.Module:
    """DDP, which reads the results of its sums, and the pretended process group has none."""

    def summed(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        dist.all_reduce(bucket.buffer())
        future = torch.futures.Future[Tensor]()
        future.set_result(bucket.buffer())
        return future

    ddp = nn.parallel.DistributedDataParallel(module, **options)
    ddp.register_comm_hook(None, summed)
    return ddp


def simulate(case: str) -> Facts:
    """Build one rank of a training and take it through its steps."""
    cfg, facts, observer = config(case), Facts(), Observer()
    os.environ["LOCAL_WORLD_SIZE"] = str(min(PER_MACHINE, cfg.gpus))
    os.environ["DS_ACCELERATOR"] = "cpu"
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    dist.init_process_group("fake", rank=0, world_size=cfg.gpus, store=FakeStore())
    accelerator: Any = SimpleNamespace()
    accelerator.prepare_model = lambda module: wrapped(module, accelerator.ddp_handler.to_kwargs())
    runtime = Alone(0, cfg.gpus, 0, torch.device("cpu"), cfg.runtime.precision, accelerator)
    pretend(observer)
    side, model = cfg.model.sample_size, cfg.model
    plain = cfg.runtime.backend is BackendName.ddp
    with nullcontext() if plain else FakeTensorMode(allow_non_fake_inputs=True), observer:
        started = time.perf_counter()
        with torch.device("meta"):
            network = UNet(model)
        network.checkpoint_gradients(cfg.runtime.gradient_checkpointing)
        unet = Trainable(
            runtime, network, cfg.optim, cfg.batch, 10**6, cfg.runtime, cfg.ema, "unet", lambda n: network.initial(n, 0)
        )
        facts.built_s, average = time.perf_counter() - started, unet.ema
        assert average is not None
        inputs: dict[str, Any] = {"context": torch.randn(1, cfg.tokens, model.cross_attention_dim or 0)}
        if model.addition_time_embed_dim is not None:
            inputs["pooled"] = torch.randn(1, model.projected_width - 6 * model.addition_time_embed_dim)
            inputs["sizes"] = torch.ones(1, 6)
        observer.most = observer.live
        for _ in range(STEPS):
            observer.operations.clear()
            observer.sent.clear()
            out = unet(torch.randn(1, model.in_channels, side, side), torch.ones(1), **inputs)
            loss = out.square().mean()
            del out
            unet.backward(loss, True)
            del loss
            unet.backend.step()
            average.update(unet.backend.masters, 1, 1)
        facts.most = observer.most
        facts.weights = sum(held(parameter) for parameter in unet.module.parameters())
        facts.optimizer = sum(bytes_of(list(state.values())) for state in unet.backend.optimizer.state.values())
        facts.average = sum(map(bytes_of, average.averages.values()))
        facts.operations, facts.sent = dict(observer.operations), dict(observer.sent)
    return facts


def planned(case: str) -> Facts:
    """What the plan says of it; activations as this machine's autocast has them."""
    cfg = config(case)
    model, side, elements = cfg.model, cfg.model.sample_size, parameters(cfg)
    sharded = cfg.runtime.backend is BackendName.fsdp
    low, checkpointing = AUTOCAST.get(cfg.runtime.precision), cfg.runtime.gradient_checkpointing
    rounded = rounded_layers(sharded, stage_of(cfg))
    found = unet_activations(model, 1, side, side, cfg.tokens, low, checkpointing, "cpu", rounded)
    part = sharding(cfg, elements, sharded, stage_of(cfg), offload=False).footprint(found)
    facts = Facts(weights=part.weights, optimizer=part.optimizer, average=part.average, most=part.total)
    for flow in flows(cfg, elements):
        if flow.operations:
            key = f"{flow.kind} over {flow.processes}"
            facts.operations[key] = facts.operations.get(key, 0) + flow.operations
            facts.sent[key] = facts.sent.get(key, 0) + round(flow.sent)
    return facts


def held(parameter: Any) -> int:
    """Bytes of what this rank has of a parameter."""
    return int(getattr(parameter, "ds_tensor", getattr(parameter, "_local_tensor", parameter)).nbytes)


if __name__ == "__main__":
    print(json.dumps([asdict(planned(sys.argv[1])), asdict(simulate(sys.argv[1]))]))
    sys.stdout.flush()
    leave(0)
