"""The processes of a run: who am I, on which device, and the few exchanges that stages need."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, rendezvous  # type: ignore[attr-defined]

from conf.errors import UserError
from conf.schema import Device, Precision, RuntimeConfig
from train.engine.precision import resolved


@dataclass(frozen=True, slots=True)
class Runtime:
    """This process among all processes of the run. Every method but `is_main` must be called by all of them."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    precision: Precision
    accelerator: Accelerator

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()

    def mean(self, values: Mapping[str, float | Tensor]) -> dict[str, float]:
        """Mean over the processes of each value; the names must be the same everywhere."""
        return {name: total / self.world for name, total in self.sum(values).items()}

    def sum(self, values: Mapping[str, float | Tensor]) -> dict[str, float]:
        """Sum over the processes of each value; the names must be the same everywhere."""
        if not values:
            return {}
        numbers = [torch.as_tensor(value).detach().to(self.device, torch.float64) for value in values.values()]
        stacked = torch.stack(numbers)
        if self.world > 1:
            dist.all_reduce(stacked)
        return dict(zip(values, stacked.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        if self.world == 1:
            return flag
        raised = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised.item())

    def gather_objects(self, value: Any) -> list[Any]:
        """The value of every process, in rank order, on every process."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered

    def hardware(self) -> dict[str, Any]:
        """What the run computes on, for its record: kind and number of devices, machines, torch."""
        return {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name(),
            "processes": self.world,
            "hosts": len(set(self.gather_objects(platform.node()))),
            "torch": str(torch.__version__),
        }


def start(cfg: RuntimeConfig) -> Runtime:
    """Join the process group that torchrun describes, or make one of this process alone.

    Raises:
        UserError: a GPU is asked for and there is none, or the processes do not know each other.

    """
    device = pick_device(cfg)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    os.environ["DS_ACCELERATOR"] = device.type  # or DeepSpeed takes a GPU wherever there is one
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _join("nccl" if device.type == "cuda" else "gloo", timedelta(seconds=cfg.timeout_s), device)
    # Its mixed precision stays off: `Trainable` casts by itself, alike under DDP and DeepSpeed.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[ddp])
    if cfg.threads > 0:
        torch.set_num_threads(cfg.threads)
    cfg.precision = resolved(cfg.precision, device)  # in the options, too, which records and protocols keep
    return Runtime(dist.get_rank(), dist.get_world_size(), local_rank, device, cfg.precision, accelerator)


def stop() -> None:
    """Leave the process group: the last call of one of several processes.

    A process alone keeps its group: the next member of a sweep runs in it, and DeepSpeed cannot change to another one.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()


def pick_device(cfg: RuntimeConfig) -> torch.device:
    """The device of this process."""
    available = torch.cuda.is_available()
    if cfg.device is Device.cuda and not available:
        raise UserError("runtime.device=cuda: torch sees no GPU here; set runtime.device=cpu or check the driver")
    if cfg.device is Device.cpu or not available:
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this node has no GPU of its own ({torch.cuda.device_count()} visible): "
            "start one process per GPU"
        )
    return torch.device("cuda", local_rank)


def cpu_name() -> str:
    """What the system calls the CPU, and how many cores it shows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {os.cpu_count()} cores"


def _join(backend: str, timeout: timedelta, device: torch.device) -> None:
    """Make the process group.

    Each torchrun restart writes under its own prefix of the store: keys of the attempt that died would otherwise
    be taken for this one's. The time limit is also made the default of later groups, since DeepSpeed clones the
    world without naming one and a hung process would go unnoticed for half an hour.
    """
    c10d.default_pg_timeout = timeout
    if "RANK" in os.environ:
        store, rank, world = next(rendezvous("env://", timeout=timeout))
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise UserError(
            "several processes were started by srun, none of which knows the others: start torchrun under it"
        )
    else:
        store, rank, world = HashStore(), 0, 1  # no port, so nothing to collide with
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"attempt-{attempt}", store)
    device_id = device if device.type == "cuda" else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device_id)
