"""One network under DeepSpeed ZeRO, stages 0 to 3 (Rajbhandari et al. 2020).

DeepSpeed's own bf16 and fp16 modes are not used: at stage 0 they scale the first update, and they need a network whose
inputs are cast by hand. Its autocast is right at all stages in bf16; in fp16 its gradient scaler is not (the gradients
are clipped before they are unscaled), so ours takes its place.
"""

import logging
import math
import os
import warnings
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from accelerate.utils import convert_to_fp32
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from conf.schema import OptimConfig
from train.engine.footprint import BUCKET
from train.engine.layout import Layout, Piece, whole
from train.engine.optim import adamw, unscale_and_clip
from train.engine.precision import AUTOCAST, LossScale
from train.engine.runtime import Runtime

SMALL_NETWORK = 20_000_000  # up to so many parameters stage 3 cuts all tensors, above it leaves the small ones whole


class ZeroBackend:
    """A DeepSpeed engine, without its compiled extensions."""

    def __init__(
        self, runtime: Runtime, module: nn.Module, optim: OptimConfig, micro: int, accumulation: int, stage: int
    ) -> None:
        parameters = dict(module.named_parameters())
        for name, parameter in parameters.items():
            if not parameter.requires_grad or parameter.ndim == 0:
                raise ValueError(f"'{name}' is frozen or a scalar, which ZeRO cannot cut: use plain DDP, or shape [1]")
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        elements = sum(shape.numel() for shape in shapes.values())
        dtype = AUTOCAST.get(runtime.precision)
        config = engine_config(optim.grad_clip, dtype, stage, micro, accumulation, elements)
        self.stage, self.grad_clip, self.scale = stage, optim.grad_clip, LossScale(runtime.precision)
        self.engine = start_engine(runtime, module, optim, config)
        zero = self.engine.optimizer
        if stage == 0:
            self.engine.torch_autocast_z0_gradscaler = None
            self.optimizer: torch.optim.AdamW = zero
            self.masters: list[Tensor] = list(parameters.values())
            self.layout: Layout = whole(parameters, runtime.device)
            return
        zero.torch_autocast_gradscaler = None
        self.optimizer = zero.optimizer
        self.masters = list(zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups)
        if stage == 3:
            pieces = {name: _piece_of_slice(zero, p, runtime.rank) for name, p in parameters.items()}
        else:
            pieces = {name: _piece_of_range(p) for name, p in parameters.items()}
        self.layout = Layout(shapes=shapes, pieces=pieces, sharded=True, device=runtime.device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Through the engine, in the run's precision; outputs in fp32."""
        return convert_to_fp32(self.engine(*args, **kwargs))

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate; the engine divides by the accumulation and reduces gradients in the last pass."""
        if self.engine.is_gradient_accumulation_boundary() != last:
            raise ValueError(f"last={last} at the wrong one of the micro-batches of a step")
        if self.stage:
            self.engine.optimizer.override_loss_scale(self.scale.value)
            self.engine.backward(loss)
        else:
            self.engine.backward(loss * self.scale.value)
        if not last:
            self.engine.step()  # only counts the pass

    def step(self) -> float:
        """Clip, update, clear; returns the norm before clipping. Not finite: the update was skipped."""
        if self.stage:
            self.engine.step()
            norm = float(self.engine.get_global_grad_norm())
        else:  # the engine would forget the norm, and take gradients that are not finite
            norm = unscale_and_clip(self.masters, self.grad_clip, self.scale.value)
            if not math.isfinite(norm):
                self.optimizer.zero_grad(set_to_none=True)
            self.engine.step()
        self.scale.update(norm)
        return norm

    def publish(self) -> None:
        """Bring masters that were written from outside into the weights of the forward pass."""
        zero = self.engine.optimizer
        if self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3:
            for group in range(len(self.masters)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def engine_config(
    grad_clip: float, dtype: torch.dtype | None, stage: int, micro: int, accumulation: int, elements: int
) -> dict[str, Any]:
    """DeepSpeed's configuration for a network of so many `elements`."""
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": min(BUCKET, elements),  # allocated in full
        "allgather_bucket_size": BUCKET,
        "round_robin_gradients": False,  # its shards are read back wrongly
    }
    if stage == 3 and elements <= SMALL_NETWORK:
        zero["stage3_param_persistence_threshold"] = 0
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": grad_clip if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "zero_optimization": zero,
    }
    if dtype is not None:
        config["torch_autocast"] = {"enabled": True, "dtype": str(dtype).removeprefix("torch.")}
    return config


def start_engine(runtime: Runtime, module: nn.Module, optim: OptimConfig, config: dict[str, Any]) -> Any:
    """A DeepSpeed engine on the process group that is there, silent but for errors."""
    deepspeed_logger.setLevel(logging.ERROR)
    # It calls collectives of torch by names that torch has replaced.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    # Its shared-memory collectives are compiled at first use, for minutes, and fail where there is no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", str(runtime.local_rank))  # DeepSpeed insists on it
    backend = "nccl" if runtime.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    optimizer = adamw(module.to(runtime.device), optim)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def _piece_of_range(parameter: Any) -> Piece:
    """Stages 1 and 2: the parameters of a group end to end, cut into one range per process."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return Piece(0, 0, 0, 0)
    held, place = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Piece(mapping.param_group_index, place.start, held.start, held.numel)


def _piece_of_slice(zero: Any, parameter: Any, rank: int) -> Piece:
    """Stage 3: every parameter padded and cut into one slice per process."""
    shard, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
    start = min(rank * numel, parameter.ds_numel)
    return Piece(shard, offset, start, min(numel, parameter.ds_numel - start))
