"""One network in training: weights, AdamW and the average of the weights, alike under every backend.

Checkpoint files, in a folder named after the trainable: `weights`, `exp_avg`, `exp_avg_sq` and each average (`ema`,
`ema-50000`, `posthoc-0.05`) as `.safetensors`, whole fp32 tensors by parameter name, and `optimizer.json`. They know
nothing of processes or backends, so any layout resumes from them; the same layout resumes bit-exactly. Of frozen
parameters there is the digest only: whoever resumes brings the same ones.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema import BackendName, BatchConfig, EmaConfig, OptimConfig, UNetRuntimeConfig
from data.order import micro_batch_weights
from models.formats.tensor_stream import TensorStream
from train.engine.backend.distribute import distribute
from train.engine.backend.layout import Initial
from train.engine.contents import Contents, TensorFile, read_into, stream
from train.engine.ema import Ema
from train.engine.meter import Clock
from train.engine.optim import Muon, lr_at
from train.engine.runtime import Late, Runtime

WEIGHTS, SCALARS = "weights.safetensors", "optimizer.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by its own names
PLAIN = UNetRuntimeConfig(backend=BackendName.ddp)


class Trainable:
    """ONE module with AdamW and, on demand, an average of its weights.

    Args:
        cfg: which backend, and with which of its options; None for plain DDP.
        ema: None, or a half-life of 0, for no average.
        name: of the network, in files and messages.
        initial: makes a parameter of the module, whole and on the CPU, the same on any process. Of parameters on the
            meta device each process then allocates no more than it keeps.

    """

    def __init__(
        self,
        runtime: Runtime,
        module: nn.Module,
        optim: OptimConfig,
        batch: BatchConfig,
        total_samples: int,
        cfg: UNetRuntimeConfig | None = None,
        ema: EmaConfig | None = None,
        name: str = "model",
        initial: Initial | None = None,
    ) -> None:
        self.runtime, self.module, self.name = runtime, module, name
        self.optim, self.batch, self.total_samples = optim, batch, total_samples
        self.lr = 0.0  # of the latest step
        self.clock = Clock(runtime.device)  # of forward passes, in which a process waits for no other
        self.frozen = _digest_of_frozen(module)
        self._skipped_steps = 0
        self.latest: tuple[int, Late] | None = None  # samples seen and gradient norm of a step not yet told of
        micro, _ = batch.split(runtime.world)
        self.micro_weights = micro_batch_weights(batch.global_batch_size, runtime.rank, runtime.world, micro)
        self.pass_weights = cycle(self.micro_weights)
        self.backend = distribute(runtime, module, optim, batch, cfg or PLAIN, initial)
        if isinstance(self.backend.optimizer, Muon):
            self.backend.optimizer.place(self.backend.layout, self.backend.masters)
        self.ema = Ema(ema, self.backend.masters) if ema is not None and ema.half_life_samples > 0 else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass in the run's precision; floating outputs come back in fp32."""
        with self.clock:
            return self.backend.forward(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Backward pass of one micro-batch; `loss` is its mean. `last`: the step follows."""
        # Every backend takes the mean of the gradients over processes and passes, as if all were of as many samples.
        # Where some are of one more they must count more, for the step to be that of the mean over the samples. Here,
        # where all losses of all trainings pass on their way to all backends, neither has to know.
        weight = next(self.pass_weights)
        self.backend.backward(loss if weight == 1 else weight * loss, last)

    def step(self, samples_seen: int) -> Tensor:
        """Clip, update the weights, clear the gradients.

        The average of the weights follows at the next step, or when it is asked for: until then nobody has to know
        whether this one was taken.

        Args:
            samples_seen: by the whole run, those of this step included.

        Returns:
            The global gradient norm before clipping, []; not finite when the update was skipped.

        """
        self.settle()
        self.lr = lr_at(samples_seen, self.optim, self.total_samples)
        for group in self.backend.optimizer.param_groups:
            group["lr"] = self.lr
        norm = self.backend.step()
        self.latest = samples_seen, Late(norm.view(1))
        return norm

    def settle(self) -> None:
        """Find out whether the latest step was taken: then the average moves, else the step is counted."""
        if self.latest is None:
            return
        (samples_seen, norm), self.latest = self.latest, None
        if not all(map(math.isfinite, norm.read())):
            self._skipped_steps += 1
        elif self.ema is not None:
            self.ema.update(self.backend.masters, samples_seen, self.batch.global_batch_size)

    @property
    def skipped_steps(self) -> int:
        """Updates that were dropped because a gradient was not finite."""
        self.settle()
        return self._skipped_steps

    @property
    def steps(self) -> int:
        """Updates of the weights so far; those that were skipped are none."""
        return int(self._state_of(self.backend.masters[0])["step"].item())

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """Full fp32 state dict on the CPU of every process; collective. `ema`: of the average."""
        shards, layout = self._shards(ema), self.backend.layout
        whole = {name: layout.assemble(name, shards).cpu() for name in layout.shapes}
        others = self._others().items()
        return whole | {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in others}

    def tensors(self, ema: bool = False) -> Iterator[tuple[str, Tensor]]:
        """The full state dict in fp32, one tensor after the other on the device of every process; collective.

        What a process holds whole is no copy. `ema`: of the average.
        """
        shards, layout = self._shards(ema), self.backend.layout
        for name, piece in layout.pieces.items():
            whole = layout.assemble(name, shards) if layout.sharded else shards[piece.shard].detach()
            yield name, whole.to(self.runtime.device)
        yield from self._others().items()

    def stream(self, ema: bool = False) -> TensorStream:
        """The full state dict, made tensor by tensor on the main process; collective. `ema`: of the average."""
        return stream(self.backend.layout, self._shards(ema), self._others())

    def contents(self) -> Contents:
        """The whole state as it is while the files are asked for their bytes; collective then."""
        self.settle()
        layout, states = self.backend.layout, [self._state_of(master) for master in self.backend.masters]
        files = {WEIGHTS: TensorFile(layout, self.backend.masters, self._buffers())}
        for key in MOMENTS:
            files[f"{key}.safetensors"] = TensorFile(layout, [state[key] for state in states], {})
        for average, shards in self._averages().items():
            files[f"{average}.safetensors"] = TensorFile(layout, shards, {})
        scalars = {
            "step": self.steps,
            "skipped_steps": self.skipped_steps,
            "loss_scale": self.backend.scale.state(),
            "frozen": self.frozen,
        }
        return Contents({f"{self.name}/{file}": f for file, f in files.items()}, {f"{self.name}/{SCALARS}": scalars})

    def save(self, folder: Path | str) -> None:
        """Write the whole state to `folder`/name, each process its part; collective. Raises OSError where it fails."""
        self.contents().write(Path(folder), self.runtime.is_main)

    def load(self, folder: Path | str) -> None:
        """Counterpart of `save`, in any layout; collective.

        Raises:
            UserError: a file or tensor is missing, has another shape or is not ours (names the first), or the frozen
                parameters were others.

        """
        folder, layout = Path(folder) / self.name, self.backend.layout
        scalars = json.loads((folder / SCALARS).read_bytes())
        if scalars.get("frozen", "") != self.frozen:
            raise UserError(f"{folder}: was trained beside other frozen weights; resume with what init_from held then")
        self.latest = None
        states = [self._state_of(master) for master in self.backend.masters]
        read_into(folder / WEIGHTS, layout, self.backend.masters, self._buffers())
        for key in MOMENTS:
            read_into(folder / f"{key}.safetensors", layout, [state[key] for state in states], {})
        for average, shards in self._averages().items():
            read_into(folder / f"{average}.safetensors", layout, shards, {})
        for state in states:
            state["step"].fill_(scalars["step"])
        self._skipped_steps = scalars["skipped_steps"]
        self.backend.scale.load(scalars["loss_scale"])
        self.backend.publish()
        self.runtime.barrier()

    def _shards(self, ema: bool) -> list[Tensor]:
        self.settle()
        if not ema:
            return self.backend.masters
        if self.ema is None:
            raise ValueError(f"{self.name} keeps no average of its weights")
        return self.ema.shards

    def _averages(self) -> dict[str, list[Tensor]]:
        return {} if self.ema is None else self.ema.averages

    def _others(self) -> dict[str, Tensor]:
        """Frozen parameters and persistent buffers: the same on all processes."""
        state = self.module.state_dict()
        return {name: tensor for name, tensor in state.items() if name not in self.backend.layout.shapes}

    def _buffers(self) -> dict[str, Tensor]:
        """Those that change: the persistent buffers."""
        frozen = _frozen(self.module)
        return {name: tensor for name, tensor in self._others().items() if name not in frozen}

    def _state_of(self, master: Tensor) -> dict[str, Tensor]:
        """AdamW's state of one tensor, made as AdamW makes it where no step was taken yet."""
        state: dict[str, Tensor] = self.backend.optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(master, memory_format=torch.preserve_format)
        return state


def _frozen(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}


def _digest_of_frozen(module: nn.Module) -> str:
    """sha256 of the frozen parameters' names and bytes; empty where all are trained."""
    frozen, digest = _frozen(module), hashlib.sha256()
    for name, parameter in frozen.items():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest() if frozen else ""
