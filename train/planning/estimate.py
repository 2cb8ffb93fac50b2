"""What a training of the U-Net will cost, on paper: memory, arithmetic, exchange, reading, disk and GPU-hours."""

import tempfile
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, log2

import numpy as np
import torch
from torch import nn

from conf.schema import BackendName, Offload, PlanRun, Precision
from conf.schema.networks import AutoencoderConfig
from data.latent_record import LatentWriter
from models.autoencoder import Autoencoder
from models.flops import counted_flops, unet_flops
from models.unet import UNet
from train.engine.accelerators import SPECIFICATIONS
from train.engine.backend.ddp import BUCKET_MB
from train.engine.backend.distribute import units_of
from train.engine.backend.layout import BUCKET
from train.engine.precision import AUTOCAST
from train.planning.activations import Activations, frozen_activations, frozen_unet, unet_activations
from train.planning.memory import FP32, GATHERED, HALF, Footprint, Sharding

RESERVE = 0.1  # share of the memory left to the CUDA context, the libraries' workspaces and fragmentation
LARGEST = 1 << 20  # micro-batch that is looked for
CAPTION = "a photograph of something that takes about as many words as most captions do"
GROUPS = 2  # of parameters, AdamW's: with and without weight decay
PERSISTENT = 100_000  # DeepSpeed's stage3_param_persistence_threshold
HOP_S = 10e-6  # of a collective operation from one GPU to the next, an assumption
LAUNCH_S = 10e-6  # of the host for one operator, an assumption


@dataclass(frozen=True, slots=True)
class Option:
    """One way of spreading the network over the processes."""

    sharded: bool  # by FSDP; else by DDP (stage 0) or DeepSpeed
    stage: int  # of ZeRO, or the one that shards as much
    offload: bool
    footprint: Footprint  # with the configured micro-batch
    largest_micro_batch: int  # that fits; 0: none

    @property
    def name(self) -> str:
        """For a column."""
        return ("fsdp" if self.sharded else str(self.stage)) + "+RAM" * self.offload


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
class Flow:
    """Collective operations of one kind in a step."""

    kind: str  # "sum", "gather" or "scatter"
    sent: float  # bytes by each GPU of a ring
    operations: int
    processes: int  # that take part in each
    stride: int = 1  # from one of these to the next: 1 neighbours, else those with the same part of the network
    after: bool = False  # the optimiser's step, when nothing is computed


@dataclass(frozen=True, slots=True)
class Exchange:
    """What travels between the GPUs in one step."""

    flows: list[Flow]
    beside_s: float  # while others are computed: gradients, and weights that are gathered ahead
    after_s: float  # when nothing is computed: weights after the optimiser's step
    hidden_s: float  # at most, behind the arithmetic

    @property
    def beside_bytes(self) -> float:
        """Bytes that each GPU sends while others are computed."""
        return sum(flow.sent for flow in self.flows if not flow.after)

    @property
    def after_bytes(self) -> float:
        """Bytes that each GPU sends after the optimiser's step, when nothing is computed."""
        return sum(flow.sent for flow in self.flows if flow.after)

    @property
    def operations(self) -> int:
        """Collective operations of a step, of all kinds."""
        return sum(flow.operations for flow in self.flows)

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
        chosen = cfg.runtime.backend is BackendName.fsdp, stage_of(cfg), offload
        return next(o for o in self.options if (o.sharded, o.stage, o.offload) == chosen)


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
    micro, _ = cfg.batch.split(cfg.gpus)
    counted = cache(lambda rounded: [activations(cfg, size, rounded) for size in (micro, 2 * micro)])
    kinds = [(False, 0, False)]
    for offload in (False, True):
        kinds += [*((False, stage, offload) for stage in (1, 2, 3)), (True, 3, offload)]
    found = []
    for sharded, stage, offload in kinds:
        spread = sharding(cfg, elements, sharded, stage, offload)
        measured, doubled = counted(rounded_layers(sharded, stage))

        def total(
            batch: int, spread: Sharding = spread, measured: Activations = measured, doubled: Activations = doubled
        ) -> int:
            return spread.footprint(on_the_line(measured, doubled, batch / micro, FP32 * elements)).total

        largest = bisect_right(range(1, LARGEST), budget, key=total)
        found.append(Option(sharded, stage, offload, spread.footprint(measured), largest))
    return found


def sharding(cfg: PlanRun, elements: int, sharded: bool, stage: int, offload: bool) -> Sharding:
    """How the network is spread, by the fields of `Option`."""
    _, accumulation = cfg.batch.split(cfg.gpus)
    shards = cfg.runtime.sharing(cfg.gpus, cfg.gpus_per_machine)
    units = padded_units(cfg, shards) if sharded else ()
    return Sharding(
        sum(units) or elements,
        shards if sharded else cfg.gpus,
        stage,
        offload,
        average=cfg.ema.half_life_samples > 0,
        accumulate=accumulation > 1,
        low_precision=cfg.runtime.precision in AUTOCAST,
        teacher=teacher_bytes(cfg),
        units=units,
        machine=1 if offload or shards == cfg.gpus else shards,
    )


def ways(cfg: PlanRun, elements: int, options: list[Option], budget: int) -> list[Way]:
    """The backends without offload, those that fit first, of these the one that waits least for other GPUs."""
    totals = {(o.sharded, o.stage): o.footprint.total for o in options if not o.offload}
    kinds = [(BackendName.ddp, 0), *((BackendName.deepspeed, stage) for stage in (1, 2)), (BackendName.fsdp, 3)]
    found = []
    for backend, stage in kinds:
        shards = cfg.runtime.shard_processes if backend is BackendName.fsdp else None  # refused where nothing is cut
        runtime = replace(
            cfg.runtime, backend=backend, zero_stage=max(1, stage), offload=Offload.none, shard_processes=shards
        )
        waited_s = exchange(replace(cfg, runtime=runtime), elements).waited_s
        fits = totals[backend is BackendName.fsdp, stage] <= budget
        found.append(Way(backend.value, stage, fits, waited_s))
    return sorted(found, key=lambda way: (not way.fits, way.waited_s))


def rounded_layers(sharded: bool, stage: int) -> tuple[type[nn.Module], ...]:
    """Layers of whose weights autocast keeps no copy for the backward pass.

    FSDP gathers all in low precision; DeepSpeed's own linear layer of stage 3 casts once more going back.
    """
    if sharded:
        return (nn.Module,)
    return (nn.Linear,) if stage == 3 else ()


def activations(cfg: PlanRun, batch: int, rounded: tuple[type[nn.Module], ...] = ()) -> Activations:
    """Activations of a micro-batch of the configured network; a teacher's are gone before the student's come.

    `rounded`: as of `unet_activations`.
    """
    side, runtime = cfg.model.sample_size, cfg.runtime
    low, checkpointing = AUTOCAST.get(runtime.precision), runtime.gradient_checkpointing
    step = unet_activations(cfg.model, batch, side, side, cfg.tokens, low, checkpointing, rounded=rounded)
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
    """The exchange as the backends do it: a ring within each machine and one across them."""
    _, passes = cfg.batch.split(cfg.gpus)
    compute_s, stage = compute_seconds(cfg), stage_of(cfg)
    backward_s = compute_s * 2 / (3 + cfg.extra_passes)  # without gradient checkpointing
    hidden_s = {
        0: backward_s / passes if cfg.runtime.backend is BackendName.ddp else 0.0,
        1: backward_s / passes,
        2: backward_s,
        3: compute_s,
    }[stage]
    found = flows(cfg, elements)
    beside_s = sum(seconds(cfg, flow) for flow in found if not flow.after)
    return Exchange(found, beside_s, sum(seconds(cfg, flow) for flow in found if flow.after), hidden_s)


def flows(cfg: PlanRun, elements: int) -> list[Flow]:
    """What travels in a step.

    A sum moves each number twice, handing out shares or collecting them once. Gradients are summed in fp32 everywhere
    but at ZeRO 3, whose layers travel in 16 bits under autocast, both ways; so do the weights that FSDP gathers.
    """
    _, passes = cfg.batch.split(cfg.gpus)
    low = FP32 if cfg.runtime.precision is Precision.fp32 else HALF
    stage, everyone = stage_of(cfg), cfg.gpus
    shards = cfg.runtime.sharing(everyone, cfg.gpus_per_machine)
    if cfg.runtime.backend is BackendName.fsdp:
        units = padded_units(cfg, shards)
        gathers = (2 + cfg.targets) * passes  # of the weights: forwards, backwards, and for the target
        padded, count = sum(units), len(units)
        found = [
            Flow("gather", gathers * low * padded, gathers * count, shards),
            Flow("scatter", FP32 * padded * passes, passes * count, shards),
        ]
        if shards < everyone:  # in the last pass
            found.append(Flow("sum", 2 * FP32 * padded / shards, count, everyone // shards, stride=shards))
        return found
    if stage == 3:
        # What is not let go of between the passes is gathered once.
        again, layers = max(0, elements - GATHERED), passes * cut_layers(cfg)
        near = everyone if cfg.runtime.offload is not Offload.none else shards
        return [
            Flow("gather", (1 + cfg.targets) * low * passes * elements, (1 + cfg.targets) * layers, everyone),
            Flow("gather", low * passes * again, round(layers * again / elements), near),
            Flow("scatter", low * passes * elements, passes * ceil(elements / BUCKET), everyone),
        ]
    times = passes if stage == 2 else 1
    bucket = BUCKET_MB * 2**20 / FP32 if stage == 0 else BUCKET  # elements
    found = [Flow("sum", 2.0 * FP32 * times * elements, times * ceil(elements / bucket), everyone)]
    if stage > 0:
        found.append(Flow("gather", FP32 * elements, GROUPS, everyone, after=True))
    return found


def seconds(cfg: PlanRun, flow: Flow) -> float:
    """How long a flow takes: what each GPU sends inside its machine and to others, and a tree up and down for each."""
    gpu = SPECIFICATIONS[cfg.accelerator]
    inside = max(1, min(flow.processes, cfg.gpus_per_machine // flow.stride))
    machines, network = flow.processes // inside, (cfg.network_gbps or gpu.network_gbps) * 1e9 / 8
    within = flow.sent * (inside - 1) / inside / (gpu.link_gb_per_s * 1e9)
    latency = 0.0 if flow.after else 2 * HOP_S * log2(flow.processes) * flow.operations
    return within + flow.sent / inside * (machines - 1) / machines / network + latency


def padded_units(cfg: PlanRun, shards: int) -> tuple[int, ...]:
    """Elements of each part that FSDP gathers at a time, the outermost last; rows are filled up to equal runs."""
    with torch.device("meta"):
        units = units_of(UNet(cfg.model))
    return tuple(
        sum(ceil(p.shape[0] / shards) * shards * p.shape[1:].numel() for p in parameters)
        for parameters in units.values()
    )


def cut_layers(cfg: PlanRun) -> int:
    """Parameters that ZeRO 3 gathers when their layer computes; it leaves small ones whole."""
    with torch.device("meta"):
        return sum(parameter.numel() > PERSISTENT for parameter in UNet(cfg.model).parameters())


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
