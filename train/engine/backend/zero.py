"""One network under DeepSpeed ZeRO, stages 0 to 3 (Rajbhandari et al. 2020).

DeepSpeed's own bf16 and fp16 modes are not used: at stage 0 they scale the first update, and they need a network whose
inputs are cast by hand. Its autocast is right at all stages in bf16; in fp16 its gradient scaler is not (the gradients
are clipped before they are unscaled), so ours takes its place. At stage 3 it hands each module copies of the lists
among its arguments, so that what a module does to them is lost.
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

from conf.schema import Offload, OptimConfig, UNetRuntimeConfig
from train.engine.backend.layout import BUCKET, Layout, Piece, require_cuttable, whole
from train.engine.optim import make_optimizer, unscale_and_clip
from train.engine.precision import AUTOCAST, LossScale
from train.engine.runtime import Runtime

SMALL_NETWORK = 20_000_000  # up to so many parameters stage 3 cuts all tensors, above it leaves the small ones whole


class ZeroBackend:
    """A DeepSpeed engine, without its compiled extensions."""

    def __init__(
        self,
        runtime: Runtime,
        module: nn.Module,
        optim: OptimConfig,
        micro: int,
        accumulation: int,
        cfg: UNetRuntimeConfig,
    ) -> None:
        stage = cfg.zero_stage
        # Below stage 3 frozen parameters are whole on every process, and DeepSpeed hears of the others alone.
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad or stage == 3}
        require_cuttable(parameters)
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        elements = sum(shape.numel() for shape in shapes.values())
        config = {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": optim.grad_clip if stage else 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # its own is compiled; torch's fused AdamW runs on a CPU, too
            "steps_per_print": None,
            "zero_optimization": zero_options(stage, elements) | offload_options(cfg.offload, runtime),
        }
        dtype = AUTOCAST.get(runtime.precision)
        if dtype is not None:
            config["torch_autocast"] = {"enabled": True, "dtype": str(dtype).removeprefix("torch.")}
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


def zero_options(stage: int, elements: int) -> dict[str, Any]:
    """How DeepSpeed shards a network of so many `elements`."""
    options: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": min(BUCKET, elements),  # allocated in full
        "allgather_bucket_size": BUCKET,
        "round_robin_gradients": False,  # its shards are read back wrongly
    }
    if stage == 3 and elements <= SMALL_NETWORK:
        options["stage3_param_persistence_threshold"] = 0
    return options


def offload_options(offload: Offload, runtime: Runtime) -> dict[str, Any]:
    """What of the shards DeepSpeed keeps in the CPU's memory; page-locked, where a GPU fetches it."""
    place = {"device": "cpu", "pin_memory": runtime.device.type == "cuda"}
    kinds = {
        Offload.none: [],
        Offload.optimizer: ["offload_optimizer"],
        Offload.parameters: ["offload_optimizer", "offload_param"],
    }
    return dict.fromkeys(kinds[offload], place)


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
    optimizer = make_optimizer(module.to(runtime.device), optim)
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
