"""The processes of a run: who am I, on which device, with how many threads, and the few exchanges that stages need."""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, rendezvous  # type: ignore[attr-defined]

from conf.errors import UserError
from conf.process import cores, cpu_quota, usable_cpus
from conf.schema import Device, Precision, RuntimeConfig, TrainingRuntimeConfig
from train.engine.metric_log import say
from train.engine.precision import resolved

TORCHS_CHOICE = torch.get_num_threads()  # CPU cores that this process may use, before anybody changes it
CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY")  # set by the user, or torchrun
MOST_LOADERS = 32  # processes that load for one that trains
WINDOW_S = 0.5  # in which CPU time is compared, or the length of a step where that is longer
CALM = 2  # such windows in a row, after which a core that others left is taken
TAKEN, LEFT = 0.5, 0.3  # share of a core: others who use more have taken it, those who use less have left it
IDLE = ("idle", "iowait", "guest", "guest_nice")  # times of no work, and of guests, which are in `user` as well


def cpu_seconds() -> tuple[float, float]:
    """CPU seconds so far: of all processes on the CPUs that this one may use, and of this one.

    A virtual machine counts what its host gave to others as well (`steal`).
    """
    allowed, busy = usable_cpus(), 0.0
    for number, times in enumerate(psutil.cpu_times(percpu=True)):
        if number in allowed:
            busy += sum(times) - sum(getattr(times, name, 0.0) for name in IDLE)
    return busy, time.process_time()


class Threads:
    """The CPU threads that torch computes with: as many as there are cores that other processes leave alone.

    At the end of each operator torch's threads wait for each other in a busy loop. Where one of them shares its core,
    all wait until it has it again, thousands of times per step: two threads beside one busy process are several times
    slower than one. So one thread gives way for each core that others keep busy, and comes back when they have ended.

    Args:
        most: threads on a machine that is idle otherwise; 1 adjusts nothing.
        cores: that this process and others share.
        read: as `cpu_seconds`.
        clock: seconds.
    """

    def __init__(
        self,
        most: int = 1,
        cores: int = 1,
        read: Callable[[], tuple[float, float]] = cpu_seconds,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most, self.cores, self.read, self.clock = most, cores, read, clock
        self.count = self.told = most
        self.calm = 0  # windows in a row in which more threads would have had a core
        self.silence_s, self.silent_until = 1.0, 0.0
        self.began, (self.busy, self.own) = clock(), read()

    def adjust(self) -> None:
        """Between two steps, on the thread that computes: give way to others, or take what they have left."""
        now = self.clock()
        if self.most == 1 or now - self.began < WINDOW_S:
            return
        busy, own = self.read()
        others = (busy - self.busy - (own - self.own)) / (now - self.began)  # cores
        self.began, self.busy, self.own = now, busy, own
        if (fewer := self._fitting(others, TAKEN)) < self.count:
            self._set(fewer)
        elif (more := self._fitting(others, LEFT)) > self.count:
            self.calm += 1
            if self.calm == CALM:
                self._set(more)
        else:
            self.calm = 0
        if self.count != self.told and now >= self.silent_until:
            self._tell(others, now)

    def _fitting(self, others: float, share: float) -> int:
        """Threads that have a core to themselves, where others have taken one by using more than a share of it."""
        return max(1, min(self.most, self.cores - int(others + 1 - share)))

    def _set(self, count: int) -> None:
        torch.set_num_threads(count)
        self.count, self.calm = count, 0

    def _tell(self, others: float, now: float) -> None:
        """Each line doubles the time to the next: others who come and go shall not fill the log."""
        if self.count == self.most:
            say("cpu", f"{self.most} threads again")
        else:
            fewer = f"{self.count} thread{'s' * (self.count > 1)} instead of {self.most}"
            shared = f"other processes keep {others:.1f} of {self.cores} cores busy"
            say("cpu", f"{shared}: {fewer}; runtime.threads={self.most} holds the number fixed")
        self.told, self.silent_until = self.count, now + self.silence_s
        self.silence_s *= 2


def choose_threads(cfg: RuntimeConfig, device: torch.device) -> Threads:
    """Set the number of CPU threads: as chosen, else torch's choice within the limits of this process.

    Who chose a number, by an option or a variable, keeps it: the last bits of a result depend on it. So does a compiled
    network, which has it in its code.
    """
    if cfg.threads > 0:
        torch.set_num_threads(cfg.threads)
    compiled = isinstance(cfg, TrainingRuntimeConfig) and cfg.compile
    if cfg.threads > 0 or compiled or device.type != "cpu" or any(name in os.environ for name in CHOSEN_BY):
        return Threads()
    few = min(TORCHS_CHOICE, len(usable_cpus()))
    most = max(1, round(min(few, cpu_quota())))
    if most != torch.get_num_threads():  # a member of a sweep before this one may have left another number
        torch.set_num_threads(most)
    return Threads(most, few)


class Late:
    """Numbers of the device on their way to this process, which reads them when it needs them.

    A process that asks at once waits until the device has done all that was launched, and the device then waits for
    what is launched next. One step later they are there.
    """

    def __init__(self, values: Tensor) -> None:
        self.arrived: torch.Event | None = None
        if values.device.type == "cpu":
            self.values = values.detach().clone()
            return
        self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self.values.copy_(values.detach(), non_blocking=True)
        self.arrived = torch.Event(values.device)
        self.arrived.record()

    def read(self) -> list[float]:
        """The numbers [N]; waits for them, and for nothing that was launched later."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return [float(value) for value in self.values.tolist()]


@dataclass(frozen=True, slots=True)
class Runtime:
    """This process among all processes of the run. Every method but `is_main` must be called by all of them."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    precision: Precision
    accelerator: Accelerator
    threads: Threads = field(default_factory=Threads)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def loaders(self, chosen: int | None) -> int:
        """Processes that load for this one: as chosen, or where a GPU computes one for each core that is left.

        A CPU that computes has no core left.
        """
        if chosen is not None or self.device.type == "cpu":
            return chosen or 0
        return max(1, min(MOST_LOADERS, cores() - 1))

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
        return dict(zip(values, self.summed(torch.stack(numbers)).tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; waits for all of them."""
        return bool(self.raised([flag]).item())

    def raised(self, flags: Sequence[bool | Tensor]) -> Tensor:
        """For each flag 1 where it is set on any process, else 0: float32 [N] on the device, for which nobody waits."""
        own = torch.zeros(len(flags), pin_memory=self.device.type != "cpu")
        for place, flag in enumerate(flags):
            own[place] = 0.0 if isinstance(flag, Tensor) else float(flag)
        found = self.moved(own)
        for place, flag in enumerate(flags):
            if isinstance(flag, Tensor):
                found[place] = flag
        if self.world > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found

    def moved(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; of page-locked memory, nobody waits for the copy."""
        return tensor.to(self.device, non_blocking=True)

    def batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A loader's batch with its tensors on the device, but for the positions, which only this process reads."""

        def placed(name: str, value: Any) -> Any:
            if isinstance(value, dict):
                return {key: placed(key, part) for key, part in value.items()}
            return self.moved(value) if isinstance(value, Tensor) and name != "position" else value

        return {name: placed(name, value) for name, value in batch.items()}

    def summed(self, tensor: Tensor) -> Tensor:
        """The tensor, on the device, as the sum of those of all processes; for it nobody waits."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """The value of every process, in rank order, on every process."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered

    def on_main(self, own: Mapping[int, NDArray[np.uint8]]) -> dict[int, NDArray[np.uint8]]:
        """Images of all processes by their numbers, on the main one; the others get none. Collective.

        One at a time: `gather_objects` makes room for the largest value of a process as often as there are processes,
        on each of them.
        """
        if self.world == 1:
            return dict(own)
        found = dict[int, NDArray[np.uint8]]()
        for rank, shapes in enumerate(self.gather_objects({number: image.shape for number, image in own.items()})):
            for number, shape in shapes.items():
                image = torch.from_numpy(own[number]) if rank == self.rank else torch.empty(shape, dtype=torch.uint8)
                image = image.to(self.device).contiguous()
                dist.broadcast(image, src=rank)
                if self.is_main:
                    found[number] = image.cpu().numpy()
        return found

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
    set_numerics(cfg, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _join("nccl" if device.type == "cuda" else "gloo", timedelta(seconds=cfg.timeout_s), device)
    # Its mixed precision stays off: `Trainable` casts by itself, alike under DDP and DeepSpeed.
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    threads = choose_threads(cfg, device)
    cfg.precision = resolved(cfg.precision, device)  # in the options, too, which records and protocols keep
    return Runtime(dist.get_rank(), dist.get_world_size(), local_rank, device, cfg.precision, accelerator, threads)


def set_numerics(cfg: RuntimeConfig, device: torch.device) -> None:
    """How exact a GPU is in fp32, and whether it makes the same bits each time; a CPU does so anyway."""
    exact = cfg.deterministic or not cfg.tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not exact
    torch.backends.cudnn.deterministic = cfg.deterministic
    if cfg.deterministic:  # of cuBLAS, before it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(cfg.deterministic and device.type != "cpu")


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
    world without naming one: half an hour by itself, ten minutes over NCCL.
    """
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
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
