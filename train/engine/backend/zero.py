"""One network under DeepSpeed ZeRO, stages 0 to 3 (Rajbhandari et al. 2020).

DeepSpeed's own bf16 and fp16 modes are not used: at stage 0 they scale the first update, and they need a network whose
inputs are cast by hand. Its autocast is right at all stages in bf16; in fp16 its gradient scaler is not (the gradients
are clipped before they are unscaled), so ours takes its place. At stage 3 it hands each module copies of the lists
among its arguments, so that what a module does to them is lost.
"""

import logging
import os
import warnings
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from accelerate.utils import convert_to_fp32
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from conf.process import processes_here
from conf.schema import Offload, OptimConfig, UNetRuntimeConfig
from train.engine.backend.layout import (
    BUCKET,
    Initial,
    Layout,
    Members,
    Piece,
    cut_over,
    made_by_all,
    materialise,
    replace_parameter,
    require_cuttable,
    whole,
)
from train.engine.optim import judge_gradients, make_optimizer
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
        initial: Initial | None,
    ) -> None:
        stage = cfg.zero_stage
        # DeepSpeed's own norm is read by the host, which waits for it; stages 0 to 2 without offload can do without it.
        self.judged_here = stage < 3 and cfg.offload is Offload.none
        # Below stage 3 frozen parameters are whole on every process, and DeepSpeed hears of the others alone.
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad or stage == 3}
        require_cuttable(parameters)
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        elements = sum(shape.numel() for shape in shapes.values())
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0 if self.judged_here else optim.grad_clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # its own is compiled; torch's fused AdamW runs on a CPU, too
            "steps_per_print": None,
            "timers": {"throughput": {"enabled": False}},  # it would wait for the device four times per step
            "zero_optimization": zero_options(stage, elements)
            | offload_options(cfg.offload, runtime)
            | hybrid_options(cfg, runtime),
        }
        dtype = AUTOCAST.get(runtime.precision)
        if dtype is not None:
            config["torch_autocast"] = autocast_options(stage, str(dtype).removeprefix("torch."), module)
        if stage in (1, 2) and self.judged_here:
            config["zero_optimization"]["compute_grad_norm"] = False
        self.runtime, self.stage, self.grad_clip = runtime, stage, optim.grad_clip
        self.scale = LossScale(runtime.precision, runtime.device)
        everyone = Members(runtime.world, runtime.rank)
        start_deepspeed(runtime)
        if stage == 3:
            cut_while_made(module, runtime, config, initial, everyone)
        else:
            materialise(module, runtime.device, initial, everyone)
        # Those of the network as it is now: what was on the meta device has become another tensor.
        parameters = {name: p for name, p in module.named_parameters() if name in shapes}
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=make_optimizer(module, optim), config=config)
        zero = self.engine.optimizer
        if stage == 0:
            self.engine.torch_autocast_z0_gradscaler = None
            self.optimizer: torch.optim.AdamW = zero
            self.masters: list[Tensor] = list(parameters.values())
            self.layout: Layout = whole(parameters, runtime.device, everyone)
            return
        zero.torch_autocast_gradscaler = None
        if stage < 3 and zero.overlap_comm:
            wait_on_the_device(zero)
        self.optimizer = zero.optimizer
        self.masters = list(zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups)
        if stage == 3:
            pieces = {name: _piece_of_slice(zero, p, runtime.rank) for name, p in parameters.items()}
        else:
            pieces = {name: _piece_of_range(p) for name, p in parameters.items()}
        self.layout = cut_over(everyone, Members(), shapes, pieces, runtime.device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Through the engine, in the run's precision; outputs in fp32."""
        return convert_to_fp32(self.engine(*args, **kwargs))

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate; the engine divides by the accumulation and reduces gradients in the last pass."""
        if self.engine.is_gradient_accumulation_boundary() != last:
            raise ValueError(f"last={last} at the wrong one of the micro-batches of a step")
        if self.judged_here:
            self.engine.backward(self.scale.scaled(loss))
        else:
            self.engine.optimizer.override_loss_scale(self.scale.value)
            self.engine.backward(loss)
        if not last:
            self.engine.step()  # only counts the pass

    def step(self) -> Tensor:
        """Clip, update, clear; returns the norm before clipping, []. Not finite: the update was skipped."""
        if self.judged_here:
            norm = judge_gradients(self.optimizer, self._gradients(), self.grad_clip, self.scale, self._over_processes)
            self.engine.step()
            return norm
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.runtime.device)
        self.scale.update(norm.isfinite())
        return norm

    def _gradients(self) -> list[Tensor]:
        """Gradients of this process's part of the weights; at stage 0 of all."""
        if self.stage == 0:
            return [master.grad for master in self.masters if master.grad is not None]
        averaged = self.engine.optimizer.averaged_gradients
        return [gradient for group in range(len(averaged)) for gradient in averaged[group]]

    def _over_processes(self, norm: Tensor) -> Tensor:
        own = norm.to(self.runtime.device, torch.float64)  # of no gradients at all it is on the CPU
        return self.runtime.summed(own.square()).sqrt() if self.stage else norm

    def publish(self) -> None:
        """Bring masters that were written from outside into the weights of the forward pass."""
        zero = self.engine.optimizer
        if self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3:
            zero.invalidate_secondary_tensor()  # of hybrid sharding
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
        "overlap_comm": stage > 0,  # gradients travel while others are computed
    }
    if stage == 3 and elements <= SMALL_NETWORK:
        options["stage3_param_persistence_threshold"] = 0
    return options


def hybrid_options(cfg: UNetRuntimeConfig, runtime: Runtime) -> dict[str, Any]:
    """Stage 3 keeps a second copy of the weights on each machine, for the backward pass (hpZ of Wang et al. 2023).

    It is what DeepSpeed has of hybrid sharding: the forward pass still gathers weights from all machines. Below stage 3
    nothing is gathered for a part of the network alone, and with offload no memory is to be spent.
    """
    if cfg.zero_stage < 3 or cfg.offload is not Offload.none:
        return {}
    shards = cfg.sharing(runtime.world, min(runtime.gather_objects(processes_here())))
    return {"zero_hpz_partition_size": shards} if 1 < shards < runtime.world else {}


def autocast_options(stage: int, dtype: str, module: nn.Module) -> dict[str, Any]:
    """What is computed in `dtype`, and what travels in it.

    Below stage 3 only gradients travel, and are summed in fp32 as DDP and FSDP sum them: a sum over hundreds of
    processes in bf16 loses terms. Stage 3 gathers the weights of each layer twice per step, which costs half in
    16 bits. DeepSpeed takes layers by their exact classes, so those derived of torch's are named, too.
    """
    layers = {type(part) for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d) and stage == 3}
    named = sorted(f"{layer.__module__}.{layer.__qualname__}" for layer in layers)
    return {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": named}


def wait_on_the_device(zero: Any) -> None:
    """At the end of a backward pass let the device wait for the gradients that travel, and not this process with it.

    DeepSpeed's `overlap_comm` stops the process until all that it launched is done, so that the device has nothing to
    do while the optimiser's step is launched.
    """
    accelerator, epilogue = get_accelerator(), zero.independent_gradient_partition_epilogue

    def on_the_device() -> None:
        accelerator.current_stream().wait_stream(zero.reduction_stream)

    def without_stopping() -> None:
        accelerator.synchronize = on_the_device
        try:
            epilogue()
        finally:
            del accelerator.synchronize  # the class has its own

    zero.independent_gradient_partition_epilogue = without_stopping


def offload_options(offload: Offload, runtime: Runtime) -> dict[str, Any]:
    """What of the shards DeepSpeed keeps in the CPU's memory; page-locked, where a GPU fetches it."""
    place = {"device": "cpu", "pin_memory": runtime.device.type == "cuda"}
    kinds = {
        Offload.none: [],
        Offload.optimizer: ["offload_optimizer"],
        Offload.parameters: ["offload_optimizer", "offload_param"],
    }
    return dict.fromkeys(kinds[offload], place)


def cut_while_made(
    module: nn.Module, runtime: Runtime, config: dict[str, Any], initial: Initial | None, everyone: Members
) -> None:
    """Stage 3: cut each parameter as soon as it is made, so that no process ever holds the network whole."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters() if parameter.is_meta}
    if initial is not None and shapes:
        cutter = deepspeed.zero.Init(
            module=nn.Module(),
            config_dict_or_path=config,
            dtype=torch.float32,
            # Of hybrid sharding; DeepSpeed makes it once in a process, for all networks.
            zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
        )
        for name, tensor in made_by_all(initial, shapes, runtime.device, everyone):
            cutter._convert_to_zero_parameters([replace_parameter(module, name, tensor)])
    module.to(runtime.device)


def start_deepspeed(runtime: Runtime) -> None:
    """DeepSpeed on the process group that is there, silent but for errors."""
    deepspeed_logger.setLevel(logging.ERROR)
    # It calls collectives of torch by names that torch has replaced.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    # Its shared-memory collectives are compiled at first use, for minutes, and fail where there is no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", str(runtime.local_rank))  # DeepSpeed insists on it
    backend = "nccl" if runtime.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


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
