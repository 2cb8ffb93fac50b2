"""What a training of the U-Net will cost, on paper: memory, arithmetic, exchange, reading, disk and GPU-hours."""

import tempfile
from bisect import bisect_right
from dataclasses import dataclass, replace
from math import ceil, log2

import numpy as np
import torch

from conf.schema import BackendName, Offload, PlanRun, Precision
from conf.schema.networks import AutoencoderConfig
from data.latent_record import LatentWriter
from models.autoencoder import Autoencoder
from models.flops import counted_flops, unet_flops
from models.unet import UNet
from train.engine.accelerators import SPECIFICATIONS
from train.engine.backend.ddp import BUCKET_MB
from train.engine.backend.distribute import parts_of
from train.engine.backend.layout import BUCKET
from train.engine.precision import AUTOCAST
from train.planning.activations import Activations, frozen_activations, frozen_unet, unet_activations
from train.planning.memory import FP32, Footprint, Sharding

RESERVE = 0.1  # share of the memory left to the CUDA context, the libraries' workspaces and fragmentation
LARGEST = 1 << 20  # micro-batch that is looked for
CAPTION = "a photograph of something that takes about as many words as most captions do"
HALF = 2  # bytes of a number that travels under autocast
HOP_S = 10e-6  # of a collective operation from one GPU to the next, an assumption
LAUNCH_S = 10e-6  # of the host for one operator, an assumption


@dataclass(frozen=True, slots=True)
class Option:
    """One way of spreading the network over the processes."""

    stage: int
    offload: bool
    footprint: Footprint  # with the configured micro-batch
    largest_micro_batch: int  # that fits; 0: none


@dataclass(frozen=True, slots=True)
class Way:
    """A backend that could train the network."""

    backend: str
    stage: int  # of ZeRO, or the one that shards as much
    fits: bool
    waited_s: float  # of a step, for other GPUs

    @property
    def name(self) -> str:
        """As options of a command."""
        stage = f" runtime.zero_stage={self.stage}" if self.backend == BackendName.deepspeed.value else ""
        return f"runtime.backend={self.backend}{stage}"


@dataclass(frozen=True, slots=True)
class Exchange:
    """What travels between the GPUs in one step."""

    beside_bytes: float  # by each GPU, while others are computed: gradients, and weights that are gathered ahead
    after_bytes: float  # when nothing is computed: weights after the optimiser's step
    operations: int  # collective ones
    beside_s: float
    after_s: float
    hidden_s: float  # at most, behind the arithmetic

    @property
    def waited_s(self) -> float:
        """Seconds of a step in which the GPUs wait for it."""
        return max(0.0, self.beside_s - self.hidden_s) + self.after_s


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of the whole run, and of its parts."""

    parameters: int
    flops_per_sample: float  # of training
    micro_batch: int
    accumulation: int  # forward passes per step
    budget: int  # bytes of the GPU's memory that may be used
    options: list[Option]
    ways: list[Way]  # the one that waits least first, of those that fit
    mfu: float  # that was reckoned with
    compute_s: float  # of one step
    exchange: Exchange
    host_s: float  # of one step, in which Python launches its operators; counts where it is longer than the arithmetic
    images_per_s: float  # of all GPUs
    gpu_hours: float
    record_bytes: float  # of a cached sample
    cache_bytes: float
    encoder_flops: float  # of a sample that is encoded in the step instead, by Stable Diffusion's autoencoder
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
    options = sharding_options(cfg, elements, budget)
    return Cost(
        parameters=elements,
        flops_per_sample=training_flops(cfg),
        micro_batch=micro,
        accumulation=accumulation,
        budget=budget,
        options=options,
        ways=ways(cfg, elements, options, budget),
        mfu=utilisation(cfg),
        compute_s=compute_seconds(cfg),
        exchange=exchange(cfg, elements),
        host_s=host_seconds(cfg),
        images_per_s=images_per_s,
        gpu_hours=cfg.gpus * cfg.loop.samples / images_per_s / 3600,
        record_bytes=record,
        cache_bytes=record * (cfg.cached_samples or cfg.loop.samples),
        encoder_flops=encoder_flops(cfg),
        read_bytes_per_s=record * images_per_s,
        tokens_per_s=cfg.tokens * images_per_s,
        checkpoint_bytes=FP32 * elements * (4 if cfg.ema.half_life_samples > 0 else 3),  # as `Trainable.save`
    )


def images_per_second(cfg: PlanRun) -> float:
    """Images per second of all GPUs."""
    return cfg.batch.global_batch_size / (compute_seconds(cfg) + exchange(cfg, parameters(cfg)).waited_s)


def utilisation(cfg: PlanRun) -> float:
    """Share of its peak that each GPU reaches while it computes (MFU)."""
    return cfg.mfu or SPECIFICATIONS[cfg.accelerator].mfu


def compute_seconds(cfg: PlanRun) -> float:
    """Seconds of one step, without the exchange between GPUs."""
    peak = SPECIFICATIONS[cfg.accelerator].flops_per_s(cfg.runtime.precision)
    micro, passes = cfg.batch.split(cfg.gpus)  # of an uneven batch those of the GPU that the others wait for
    return micro * passes * training_flops(cfg) / (utilisation(cfg) * peak)


def parameters(cfg: PlanRun) -> int:
    """Parameters of the network, all of which are trained."""
    with torch.device("meta"):
        network = UNet(cfg.model)
    return sum(parameter.numel() for parameter in network.parameters())


def training_flops(cfg: PlanRun) -> float:
    """Operations of one sample: a forward pass, twice that going back, and once more with gradient checkpointing.

    The target and the teacher of a distillation take further passes, and so does the slope of a mean flow.
    """
    tokens = 0 if cfg.model.cross_attention_dim is None else cfg.tokens
    forward = unet_flops(cfg.model, cfg.model.sample_size, cfg.model.sample_size, tokens)
    return forward * ((4 if cfg.runtime.gradient_checkpointing else 3) + cfg.extra_passes)


def sharding_options(cfg: PlanRun, elements: int, budget: int) -> list[Option]:
    """Memory at every stage, without and with offload."""
    micro, accumulation = cfg.batch.split(cfg.gpus)
    measured, doubled, teacher = activations(cfg, micro), activations(cfg, 2 * micro), teacher_bytes(cfg)
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
            teacher=teacher,
        )

        def total(batch: int, sharding: Sharding = sharding) -> int:
            return sharding.footprint(on_the_line(measured, doubled, batch / micro, FP32 * elements)).total

        largest = bisect_right(range(1, LARGEST), budget, key=total)
        found.append(Option(stage, offload, sharding.footprint(measured), largest))
    return found


def ways(cfg: PlanRun, elements: int, options: list[Option], budget: int) -> list[Way]:
    """The backends without offload, those that fit first, of these the one that waits least for other GPUs."""
    totals = {option.stage: option.footprint.total for option in options if not option.offload}
    kinds = [(BackendName.ddp, 0), *((BackendName.deepspeed, stage) for stage in (1, 2)), (BackendName.fsdp, 3)]
    found = []
    for backend, stage in kinds:
        runtime = replace(cfg.runtime, backend=backend, zero_stage=max(1, stage), offload=Offload.none)
        waited_s = exchange(replace(cfg, runtime=runtime), elements).waited_s
        found.append(Way(backend.value, stage, totals[stage] <= budget, waited_s))
    return sorted(found, key=lambda way: (not way.fits, way.waited_s))


def activations(cfg: PlanRun, batch: int) -> Activations:
    """Activations of a micro-batch of the configured network; a teacher's are gone before the student's come."""
    side, runtime = cfg.model.sample_size, cfg.runtime
    low, checkpointing = AUTOCAST.get(runtime.precision), runtime.gradient_checkpointing
    step = unet_activations(cfg.model, batch, side, side, cfg.tokens, low, checkpointing)
    if cfg.extra_passes == 0:
        return step
    frozen = frozen_activations(cfg.model, 2 * batch, side, side, cfg.tokens, runtime.precision)  # guided: twice
    most = frozen.alone if cfg.taught else 0  # those of a target lie below the step's
    judged = step.alone if cfg.adversarial_weight > 0 else 0  # back through the teacher, before any gradient
    calls = cfg.targets + cfg.taught + (3 if judged else 0)
    operators = step.operators + calls * frozen.operators
    return Activations(max(step.alone + judged, most), max(step.with_gradients, most), operators)


def teacher_bytes(cfg: PlanRun) -> int:
    """Bytes of the weights of a teacher, as large as its student."""
    if not cfg.taught:
        return 0
    return sum(parameter.nbytes for parameter in frozen_unet(cfg.model, cfg.runtime.precision).parameters())


def on_the_line(once: Activations, twice: Activations, factor: float, gradients: int) -> Activations:
    """Activations of `factor` times the batch, given those of one and of two; bytes grow linearly with the batch.

    Those with gradients are the largest of several lines: of the two points', of the activations alone (large batches)
    and of all gradients alone (small ones).
    """

    def line(one: int, two: int) -> int:
        return max(0, round(one + (factor - 1) * (two - one)))

    alone = line(once.alone, twice.alone)
    return Activations(alone, max(line(once.with_gradients, twice.with_gradients), alone, gradients), once.operators)


def exchange(cfg: PlanRun, elements: int) -> Exchange:
    """The exchange as the backends do it: a ring within each machine and one across them.

    A sum over all processes moves each number twice, handing out shares or collecting them once. Gradients are summed
    in fp32 everywhere but at ZeRO 3, whose layers travel in 16 bits under autocast, both ways; so do the weights that
    FSDP gathers.
    """
    low = FP32 if cfg.runtime.precision is Precision.fp32 else HALF
    _, passes = cfg.batch.split(cfg.gpus)
    compute_s = compute_seconds(cfg)
    backward_s = compute_s * 2 / (3 + cfg.extra_passes)  # without gradient checkpointing
    sharded = cfg.runtime.backend is BackendName.fsdp
    gathers = 2 + cfg.targets  # of the weights at stage 3: forwards, backwards, and for the target
    beside, after, hidden_s = {  # bytes of an element, and seconds
        0: (2.0 * FP32, 0.0, backward_s / passes if cfg.runtime.backend is BackendName.ddp else 0.0),
        1: (2.0 * FP32, FP32, backward_s / passes),
        2: (2.0 * FP32 * passes, FP32, backward_s),
        3: ((gathers * low + (FP32 if sharded else low)) * passes, 0.0, compute_s),
    }[stage_of(cfg)]
    bucket = BUCKET_MB * 2**20 / FP32 if stage_of(cfg) == 0 else BUCKET  # elements
    times = passes if stage_of(cfg) == 2 else 1
    operations = times * ceil(elements / bucket) + (stage_of(cfg) in (1, 2)) * ceil(elements / BUCKET)
    if stage_of(cfg) == 3:
        operations = (gathers + 1) * passes * units(cfg)
    after_s = travel_seconds(cfg, after * elements)
    beside_s = travel_seconds(cfg, beside * elements) + latency_seconds(cfg) * operations
    return Exchange(beside * elements, after * elements, operations, beside_s, after_s, hidden_s)


def travel_seconds(cfg: PlanRun, moved: float) -> float:
    """Seconds in which each GPU sends so many bytes of a ring, inside its machine and to the others."""
    gpu, inside = SPECIFICATIONS[cfg.accelerator], min(cfg.gpus, cfg.gpus_per_machine)
    machines, network = cfg.gpus // inside, (cfg.network_gbps or gpu.network_gbps) * 1e9 / 8
    within = moved * (inside - 1) / inside / (gpu.link_gb_per_s * 1e9)
    return within + moved / inside * (machines - 1) / machines / network


def latency_seconds(cfg: PlanRun) -> float:
    """Seconds that a collective operation takes however little it moves: a tree over all GPUs, up and down."""
    return 2 * HOP_S * log2(cfg.gpus)


def units(cfg: PlanRun) -> int:
    """Parts of the network that FSDP gathers one at a time."""
    with torch.device("meta"):
        return sum(1 for _ in parts_of(UNet(cfg.model)))


def host_seconds(cfg: PlanRun) -> float:
    """Seconds of a step in which Python launches its operators, one by one; a compiled network needs fewer."""
    _, passes = cfg.batch.split(cfg.gpus)
    return passes * activations(cfg, 1).operators * LAUNCH_S


def encoder_flops(cfg: PlanRun) -> float:
    """FLOPs of one pass through the encoder of Stable Diffusion's autoencoder, for latents of this size."""
    network = AutoencoderConfig()
    side = cfg.model.sample_size * network.downscale
    with torch.device("meta"):
        return float(counted_flops(Autoencoder(network).encoder, torch.empty(1, network.in_channels, side, side)))


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
