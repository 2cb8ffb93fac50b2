"""One network in training: weights, AdamW and the average of the weights, alike under DDP and ZeRO.

Checkpoint files, in a folder named after the trainable: `weights`, `exp_avg`, `exp_avg_sq` and, with an average,
`ema.safetensors`, whole fp32 tensors by parameter name, and `optimizer.json`. They know nothing of processes or
ZeRO stages, so any layout resumes from them; the same layout resumes bit-exactly.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema import BatchConfig, EmaConfig, OptimConfig
from data.shards import atomic_path, atomic_write
from train.engine.ddp import DdpBackend
from train.engine.ema import Ema
from train.engine.layout import Layout
from train.engine.optim import lr_at
from train.engine.precision import LossScale
from train.engine.runtime import Runtime

WEIGHTS, AVERAGE, SCALARS = "weights.safetensors", "ema.safetensors", "optimizer.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by its own names


class Backend(Protocol):
    """What a way of distributing a network offers to `Trainable`."""

    optimizer: torch.optim.AdamW
    masters: list[Tensor]  # fp32 tensors that the optimiser updates: whole parameters or this process's shards
    layout: Layout  # of the masters
    scale: LossScale

    def forward(self, *args: Any, **kwargs: Any) -> Any: ...
    def backward(self, loss: Tensor, last: bool) -> None: ...
    def step(self) -> float: ...
    def publish(self) -> None: ...


class Trainable:
    """ONE module with AdamW and, on demand, an average of its weights.

    Args:
        zero_stage: DeepSpeed ZeRO stage 0-3; None for plain DDP.
        ema: None, or a half-life of 0, for no average.
        name: of the network, in files and messages.

    """

    def __init__(
        self,
        runtime: Runtime,
        module: nn.Module,
        optim: OptimConfig,
        batch: BatchConfig,
        total_samples: int,
        zero_stage: int | None = None,
        ema: EmaConfig | None = None,
        name: str = "model",
    ) -> None:
        self.runtime, self.module, self.name = runtime, module, name
        self.optim, self.batch, self.total_samples = optim, batch, total_samples
        self.lr = 0.0  # of the latest step
        self.skipped_steps = 0  # updates dropped because a gradient was not finite
        micro, accumulation = batch.split(runtime.world)
        self.backend: Backend
        if zero_stage is None:
            self.backend = DdpBackend(runtime, module, optim, accumulation)
        else:
            from train.engine.zero import ZeroBackend  # only those who use DeepSpeed wait for its import

            self.backend = ZeroBackend(runtime, module, optim, micro, accumulation, zero_stage)
        self.ema = Ema(ema, self.backend.masters) if ema is not None and ema.half_life_samples > 0 else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass in the run's precision; floating outputs come back in fp32."""
        return self.backend.forward(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Backward pass of one micro-batch; `loss` is its mean. `last`: the step follows."""
        self.backend.backward(loss, last)

    def step(self, samples_seen: int) -> float:
        """Clip, update the weights and their average, clear the gradients.

        Args:
            samples_seen: by the whole run, those of this step included.

        Returns:
            The global gradient norm before clipping; not finite when the update was skipped.

        """
        self.lr = lr_at(samples_seen, self.optim, self.total_samples)
        for group in self.backend.optimizer.param_groups:
            group["lr"] = self.lr
        norm = self.backend.step()
        if not math.isfinite(norm):
            self.skipped_steps += 1
        elif self.ema is not None:
            self.ema.update(self.backend.masters, samples_seen, self.batch.global_batch_size)
        return norm

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """Full fp32 state dict on the CPU of every process; collective. `ema`: of the average."""
        shards = self.backend.masters
        if ema:
            if self.ema is None:
                raise ValueError(f"{self.name} keeps no average of its weights")
            shards = self.ema.shards
        return dict(chain(self._assembled(shards), self._copied_others()))

    def save(self, folder: Path | str) -> None:
        """Write the whole state to `folder`/name; collective, the main process writes.

        Raises:
            OSError, SafetensorError: the main process could not write. The others return.

        """
        folder, failures = Path(folder) / self.name, list[Exception]()
        states = [self._state_of(master) for master in self.backend.masters]
        files = {WEIGHTS: chain(self._assembled(self.backend.masters), self._copied_others())}
        for key in MOMENTS:
            files[f"{key}.safetensors"] = chain(self._assembled([state[key] for state in states]))
        if self.ema is not None:
            files[AVERAGE] = chain(self._assembled(self.ema.shards))
        for file, tensors in files.items():
            self._write(folder / file, tensors, failures)
        if self.runtime.is_main and not failures:
            scalars = {
                "step": int(states[0]["step"].item()),
                "skipped_steps": self.skipped_steps,
                "loss_scale": self.backend.scale.state(),
            }
            atomic_write(folder / SCALARS, json.dumps(scalars).encode())
        if failures:
            raise failures[0]

    def load(self, folder: Path | str) -> None:
        """Counterpart of `save`, in any layout; collective.

        Raises:
            UserError: a file or tensor is missing, has another shape or is not ours; names the first.

        """
        folder = Path(folder) / self.name
        states = [self._state_of(master) for master in self.backend.masters]
        self._read(folder / WEIGHTS, self.backend.masters, self._others())
        for key in MOMENTS:
            self._read(folder / f"{key}.safetensors", [state[key] for state in states], {})
        if self.ema is not None:
            self._read(folder / AVERAGE, self.ema.shards, {})
        scalars = json.loads((folder / SCALARS).read_bytes())
        for state in states:
            state["step"].fill_(scalars["step"])
        self.skipped_steps = scalars["skipped_steps"]
        self.backend.scale.load(scalars["loss_scale"])
        self.backend.publish()
        self.runtime.barrier()

    def _assembled(self, shards: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every trainable parameter, or what has its shape, whole and copied to the CPU; collective."""
        for name in self.backend.layout.shapes:
            yield name, self.backend.layout.assemble(name, shards).cpu()

    def _others(self) -> dict[str, Tensor]:
        """Frozen parameters and persistent buffers: the same on all processes."""
        state = self.module.state_dict()
        return {name: tensor for name, tensor in state.items() if name not in self.backend.layout.shapes}

    def _copied_others(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._others().items():
            yield name, tensor.detach().cpu().clone(memory_format=torch.contiguous_format)

    def _state_of(self, master: Tensor) -> dict[str, Tensor]:
        """AdamW's state of one tensor, made as AdamW makes it where no step was taken yet."""
        state: dict[str, Tensor] = self.backend.optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(master, memory_format=torch.preserve_format)
        return state

    def _write(self, path: Path, tensors: Iterable[tuple[str, Tensor]], failures: list[Exception]) -> None:
        """Write one file; after a failure only keep the other processes company in putting the tensors together."""
        if not self.runtime.is_main or failures:
            for _ in tensors:
                pass
            return
        whole = dict(tensors)
        try:
            with atomic_path(path) as temporary:
                save_file(whole, temporary)
        except (OSError, SafetensorError) as error:
            failures.append(error)

    def _read(self, path: Path, shards: Sequence[Tensor], others: dict[str, Tensor]) -> None:
        """Fill the shards and other tensors from a file, after all its names and shapes were checked."""
        if not path.is_file():
            raise UserError(f"{path}: not there; resume with the options that the checkpoint was made with")
        layout = self.backend.layout
        shapes = {**layout.shapes, **{name: tensor.shape for name, tensor in others.items()}}
        with safe_open(path, framework="pt") as file:
            found = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            for name, shape in shapes.items():
                if name not in found:
                    raise UserError(f"{path}: has no tensor '{name}'; it belongs to another architecture")
                if found[name] != shape:
                    raise UserError(f"{path}: '{name}' is {list(found[name])} there but {list(shape)} in this network")
            for name in sorted(found.keys() - shapes.keys()):
                raise UserError(f"{path}: has a tensor '{name}' that this network lacks")
            for name in shapes:
                if name in others:
                    others[name].copy_(file.get_tensor(name))
                else:
                    layout.disperse(name, file.get_tensor(name), shards)
