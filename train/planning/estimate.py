"""What a training of the U-Net will cost, on paper: memory, arithmetic, exchange, reading, disk and GPU-hours."""

import tempfile
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import torch

from conf.schema import BackendName, Offload, PlanRun, Precision
from data.latent_record import LatentWriter
from models.flops import unet_flops
from models.unet import UNet
from train.engine.accelerators import SPECIFICATIONS
from train.engine.precision import AUTOCAST
from train.planning.activations import Activations, unet_activations
from train.planning.memory import FP32, Footprint, Sharding

RESERVE = 0.1  # share of the memory left to the CUDA context, the libraries' workspaces and fragmentation
LARGEST = 1 << 20  # micro-batch that is looked for
CAPTION = "a photograph of something that takes about as many words as most captions do"
HALF = 2  # bytes of a number that travels under autocast


@dataclass(frozen=True, slots=True)
class Option:
    """One way of spreading the network over the processes."""

    stage: int
    offload: bool
    footprint: Footprint  # with the configured micro-batch
    largest_micro_batch: int  # that fits; 0: none


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of the whole run, and of its parts."""

    parameters: int
    flops_per_sample: float  # of training
    micro_batch: int
    accumulation: int  # forward passes per step
    budget: int  # bytes of the GPU's memory that may be used
    options: list[Option]
    mfu: float  # that was reckoned with
    compute_s: float  # of one step
    exchange_s: float  # of one step, if nothing of it hides behind the arithmetic
    images_per_s: float  # of all GPUs
    gpu_hours: float
    record_bytes: float  # of a cached sample
    cache_bytes: float
    read_bytes_per_s: float
    tokens_per_s: float  # of the captions
    checkpoint_bytes: int  # one of them

    def option(self, cfg: PlanRun) -> Option:
        """The configured way of spreading."""
        offload = cfg.runtime.offload is not Offload.none
        return next(o for o in self.options if (o.stage, o.offload) == (stage_of(cfg), offload))


def stage_of(cfg: PlanRun) -> int:
    """The ZeRO stage that shards as much as the configured backend."""
    return {BackendName.ddp: 0, BackendName.fsdp: 3}.get(cfg.runtime.backend, cfg.runtime.zero_stage)


def estimate(cfg: PlanRun) -> Cost:
    """Everything that follows from a configuration; nothing of it needs data, weights or a GPU."""
    micro, accumulation = cfg.batch.split(cfg.gpus)
    elements, record, images_per_s = parameters(cfg), record_bytes(cfg), images_per_second(cfg)
    budget = int((1 - RESERVE) * SPECIFICATIONS[cfg.accelerator].memory_gib * 2**30)
    return Cost(
        parameters=elements,
        flops_per_sample=training_flops(cfg),
        micro_batch=micro,
        accumulation=accumulation,
        budget=budget,
        options=sharding_options(cfg, elements, budget),
        mfu=utilisation(cfg),
        compute_s=compute_seconds(cfg),
        exchange_s=exchange_seconds(cfg, elements),
        images_per_s=images_per_s,
        gpu_hours=cfg.gpus * cfg.loop.samples / images_per_s / 3600,
        record_bytes=record,
        cache_bytes=record * (cfg.cached_samples or cfg.loop.samples),
        read_bytes_per_s=record * images_per_s,
        tokens_per_s=cfg.tokens * images_per_s,
        checkpoint_bytes=FP32 * elements * (4 if cfg.ema.half_life_samples > 0 else 3),  # as `Trainable.save`
    )


def images_per_second(cfg: PlanRun) -> float:
    """Images per second of all GPUs."""
    return cfg.batch.global_batch_size / (compute_seconds(cfg) + exchange_seconds(cfg, parameters(cfg)))


def utilisation(cfg: PlanRun) -> float:
    """Share of its peak that each GPU reaches while it computes (MFU)."""
    return cfg.mfu or SPECIFICATIONS[cfg.accelerator].mfu


def compute_seconds(cfg: PlanRun) -> float:
    """Seconds of one step, without the exchange between GPUs."""
    peak = SPECIFICATIONS[cfg.accelerator].flops_per_s(cfg.runtime.precision)
    return cfg.batch.global_batch_size / cfg.gpus * training_flops(cfg) / (utilisation(cfg) * peak)


def parameters(cfg: PlanRun) -> int:
    """Parameters of the network, all of which are trained."""
    with torch.device("meta"):
        network = UNet(cfg.model)
    return sum(parameter.numel() for parameter in network.parameters())


def training_flops(cfg: PlanRun) -> float:
    """Operations of one sample: a forward pass, twice that going back, and once more with gradient checkpointing."""
    tokens = 0 if cfg.model.cross_attention_dim is None else cfg.tokens
    forward = unet_flops(cfg.model, cfg.model.sample_size, cfg.model.sample_size, tokens)
    return forward * (4 if cfg.runtime.gradient_checkpointing else 3)


def sharding_options(cfg: PlanRun, elements: int, budget: int) -> list[Option]:
    """Memory at every stage, without and with offload."""
    micro, accumulation = cfg.batch.split(cfg.gpus)
    measured, doubled = activations(cfg, micro), activations(cfg, 2 * micro)
    found = []
    for stage, offload in [(0, False), *((stage, offload) for offload in (False, True) for stage in (1, 2, 3))]:
        sharding = Sharding(
            elements,
            cfg.gpus,
            stage,
            offload,
            average=cfg.ema.half_life_samples > 0,
            accumulate=accumulation > 1,
            low_precision=cfg.runtime.precision in AUTOCAST,
        )

        def total(batch: int, sharding: Sharding = sharding) -> int:
            return sharding.footprint(on_the_line(measured, doubled, batch / micro, FP32 * elements)).total

        largest = bisect_right(range(1, LARGEST), budget, key=total)
        found.append(Option(stage, offload, sharding.footprint(measured), largest))
    return found


def activations(cfg: PlanRun, batch: int) -> Activations:
    """Activations of a micro-batch of the configured network."""
    side, runtime = cfg.model.sample_size, cfg.runtime
    low, checkpointing = AUTOCAST.get(runtime.precision), runtime.gradient_checkpointing
    return unet_activations(cfg.model, batch, side, side, cfg.tokens, low, checkpointing)


def on_the_line(once: Activations, twice: Activations, factor: float, gradients: int) -> Activations:
    """Activations of `factor` times the batch, given those of one and of two; bytes grow linearly with the batch.

    Those with gradients are the largest of several lines: of the two points', of the activations alone (large batches)
    and of all gradients alone (small ones).
    """

    def line(one: int, two: int) -> int:
        return max(0, round(one + (factor - 1) * (two - one)))

    alone = line(once.alone, twice.alone)
    return Activations(alone, max(line(once.with_gradients, twice.with_gradients), alone, gradients))


def exchange_seconds(cfg: PlanRun, elements: int) -> float:
    """Seconds per step in which gradients and weights travel; a ring within each machine and one across them.

    A sum over all processes moves each number twice, handing out shares or collecting them once.
    """
    gpu, number = SPECIFICATIONS[cfg.accelerator], FP32 if cfg.runtime.precision is Precision.fp32 else HALF
    _, accumulation = cfg.batch.split(cfg.gpus)
    reductions = accumulation if stage_of(cfg) >= 2 else 1
    moved = {
        0: 2 * number,
        1: 2 * number + FP32,
        2: 2 * number * reductions + FP32,
        3: 3 * number * reductions,
    }[stage_of(cfg)] * elements  # bytes
    inside = min(cfg.gpus, cfg.gpus_per_machine)
    machines = cfg.gpus // inside
    network = (cfg.network_gbps or gpu.network_gbps) * 1e9 / 8
    within = moved * (inside - 1) / inside / (gpu.link_gb_per_s * 1e9)
    return within + moved / inside * (machines - 1) / machines / network


def record_bytes(cfg: PlanRun) -> float:
    """Bytes of a sample in the latent cache, the archive's headers included: some are written to see."""
    samples, side, width = 16, cfg.model.sample_size, cfg.model.cross_attention_dim
    moments = np.zeros((cfg.variants, 2 * cfg.model.out_channels, side, side), dtype=np.float32)
    text = np.zeros((cfg.tokens, width), dtype=np.float32) if cfg.text_states and width is not None else None
    cut = {"left": 0, "top": 0, "width": 512, "height": 512, "flipped": False}
    meta = {"width": 1024, "height": 768, "cuts": [cut] * cfg.variants}
    with tempfile.TemporaryDirectory() as folder, LatentWriter(folder, samples, cfg.dtype) as write:
        for number in range(samples):
            write.add(f"{number:09d}", moments, np.zeros(cfg.tokens), CAPTION, meta, text)
        size = sum(info.bytes for info in write.close())
    return size / samples
