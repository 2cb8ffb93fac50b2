"""One network under plain data parallelism."""

import warnings
from contextlib import nullcontext
from typing import Any

from accelerate.utils import DistributedDataParallelKwargs, convert_to_fp32
from torch import Tensor, nn

from conf.schema import OptimConfig
from train.engine.backend.layout import Initial, Layout, Members, materialise, whole
from train.engine.optim import Accumulating, make_optimizer, sound_step
from train.engine.precision import autocast
from train.engine.runtime import Runtime

BUCKET_MB = 150  # of gradients that travel together


class DdpBackend(Accumulating):
    """DistributedDataParallel through accelerate; the bare module on one process."""

    def __init__(
        self, runtime: Runtime, module: nn.Module, optim: OptimConfig, accumulation: int, initial: Initial | None
    ) -> None:
        super().__init__(optim, accumulation, runtime)
        self.accelerator = runtime.accelerator
        norms = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
        # Large buckets, since all gradients of a compiled block appear at once; buffers are the same everywhere but for
        # those that a norm follows its batches with.
        self.accelerator.ddp_handler = DistributedDataParallelKwargs(
            gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MB, broadcast_buffers=norms
        )
        warnings.filterwarnings("ignore", message=r"`broadcast_buffers` is deprecated")  # accelerate knows no other
        # Gradients of 1 x 1 kernels have strides of either layout of pixels, which differ in name only.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        processes = Members(runtime.world, runtime.rank)
        materialise(module, runtime.device, initial, processes)
        self.wrapped: nn.Module = self.accelerator.prepare_model(module)
        self.optimizer = make_optimizer(module, optim)
        self.device, self.precision = runtime.device, runtime.precision
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.masters: list[Tensor] = list(parameters.values())
        self.layout: Layout = whole(parameters, self.device, processes)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Through the wrapper, in the run's precision; outputs in fp32."""
        # The wrapper decides in its forward pass whether the backward pass exchanges gradients: only the last one does.
        alone = self.passes < self.accumulation - 1
        with (
            self.accelerator.no_sync(self.wrapped) if alone else nullcontext(),
            autocast(self.device, self.precision),
        ):
            return convert_to_fp32(self.wrapped(*args, **kwargs))

    def step(self) -> Tensor:
        """Clip, update, clear; returns the norm before clipping, []. Not finite: the update was skipped."""
        self.passes = 0
        return sound_step(self.optimizer, self.masters, self.grad_clip, self.scale)
