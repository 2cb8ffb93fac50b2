"""Groups of options that several commands share."""

from dataclasses import dataclass, field

from conf.errors import UserError
from conf.overrides import PATH, a_path
from conf.schema.choices import (
    BackendName,
    BetaSchedule,
    Crop,
    Device,
    Distance,
    LrDecay,
    Offload,
    OptimizerName,
    Precision,
    Prediction,
    ResizeFilter,
    TimestepSampling,
    WandbMode,
)


def require(condition: bool, message: str) -> None:
    """Raise the one-line error of an impossible configuration."""
    if not condition:
        raise UserError(message)


def require_positive(cfg: object, *names: str, group: str = "") -> None:
    """Raise the one-line error of an option that is not above zero."""
    for name in names:
        require(getattr(cfg, name) > 0, f"{group}{name}={getattr(cfg, name)}: must be positive")


@dataclass(kw_only=True, slots=True)
class RuntimeConfig:
    """Where and how a command computes: the only part that differs between a laptop and a cluster."""

    device: Device = Device.auto  # auto: cuda when there is one
    precision: Precision = Precision.fp32  # of forward and backward pass; auto: bf16 where it is fast, else fp32
    tf32: bool = True  # a GPU multiplies numbers of fp32 with 10 bits of their mantissa, which is faster
    deterministic: bool = False  # a GPU makes the same bits each time, more slowly, and fp32 without TF32
    threads: int = 0  # CPU threads per process; 0: one per core, fewer while other processes compute
    timeout_s: float = 1800.0  # seconds after which a collective operation that does not return is an error

    def __post_init__(self) -> None:
        require(self.timeout_s > 0, f"runtime.timeout_s={self.timeout_s}: must be positive")


@dataclass(kw_only=True, slots=True)
class TrainingRuntimeConfig(RuntimeConfig):
    """Where and how a training computes: the only part that differs between a laptop and a cluster."""

    compile: bool = False  # train through torch.compile, which needs a C++ compiler
    gradient_checkpointing: bool = False  # train in about half the memory and a quarter more time
    profile: bool = False  # write a trace of three steps, and what a GPU did in them
    watchdog_s: float = 600.0  # seconds without a step after which all say what they are doing, and where; 0: off
    watchdog_ends: bool = False  # ends a run in which some then do not answer; its job goes on without their nodes
    preflight: bool = True  # of several processes: look at devices, links, folder and clocks before the training

    def __post_init__(self) -> None:
        RuntimeConfig.__post_init__(self)
        require(self.watchdog_s >= 0, f"runtime.watchdog_s={self.watchdog_s}: must be 0 (off) or positive")


@dataclass(kw_only=True, slots=True)
class UNetRuntimeConfig(TrainingRuntimeConfig):
    """Where and how the U-Net's training computes; it alone shards its network, others train with plain DDP."""

    backend: BackendName = BackendName.deepspeed  # what divides the training among the processes
    zero_stage: int = 2  # 0-3, of backend=deepspeed: shards 1 the optimizer, 2 gradients too, 3 weights too
    offload: Offload = Offload.none  # what of the training waits in the CPU's memory, for want of a GPU's
    shard_processes: int | None = None  # that cut the weights among them, others hold copies; null: those of a machine

    def __post_init__(self) -> None:
        TrainingRuntimeConfig.__post_init__(self)
        require(self.zero_stage in (0, 1, 2, 3), f"runtime.zero_stage={self.zero_stage}: must be 0, 1, 2 or 3")
        require(
            self.shard_processes is None or self.shard_processes > 0,
            f"runtime.shard_processes={self.shard_processes}: must be positive, or null for those of a machine",
        )
        cut = self.backend is BackendName.fsdp or (self.zero_stage == 3 and self.offload is Offload.none)
        require(
            self.shard_processes is None or (cut and self.backend is not BackendName.ddp),
            f"runtime.shard_processes={self.shard_processes}: nothing cuts the weights but runtime.backend=fsdp and "
            "runtime.zero_stage=3 without offload; leave it out",
        )
        self._check_offload()
        require(
            not (self.compile and self.backend is BackendName.deepspeed and self.zero_stage == 3),
            "runtime.compile=true: ZeRO stage 3 breaks the graph at every layer; set runtime.backend=fsdp or "
            "runtime.zero_stage=2",
        )

    def sharing(self, processes: int, per_machine: int) -> int:
        """How many of all processes cut a network among them, where its weights are cut at all.

        Raises:
            UserError: all processes are no multiple of them.
        """
        chosen = min(self.shard_processes or per_machine, processes)
        require(
            processes % chosen == 0,
            f"runtime.shard_processes={chosen}: {processes} processes are no multiple of it; set one that divides them",
        )
        return chosen

    def _check_offload(self) -> None:
        """Each backend can offload its shards only, and FSDP2 all of them or nothing."""
        chosen = f"runtime.offload={self.offload.value}: "
        if self.offload is Offload.none:
            return
        require(
            self.backend is not BackendName.ddp,
            chosen + "plain DDP shards nothing that could wait elsewhere; set runtime.backend=deepspeed or fsdp",
        )
        if self.backend is BackendName.fsdp:
            require(
                self.offload is Offload.parameters,
                chosen + "FSDP2 keeps weights and optimizer in one place; set runtime.offload=parameters",
            )
            return
        least = 3 if self.offload is Offload.parameters else 1
        remedy = f"set runtime.zero_stage={least}" + (" or runtime.offload=optimizer" * (0 < self.zero_stage < least))
        require(
            self.zero_stage >= least,
            chosen + f"ZeRO stage {self.zero_stage} does not shard them; {remedy}",
        )


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """Where Weights & Biases files the run."""

    mode: WandbMode = WandbMode.auto  # auto: $WANDB_MODE, else online when logged in, else offline
    project: str = "latentline"  # where W&B files the runs
    entity: str | None = None  # team or user; None: the login's default
    group: str | None = None  # runs that are shown together; None: the name of run_dir, and of a sweep its folder's too
    name: str | None = None  # of the run; None: name of run_dir and stage, of a sweep's member its overrides


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """The optimizer and its learning rate as a function of samples seen."""

    name: OptimizerName = OptimizerName.adamw  # muon: makes steps of hidden matrices orthogonal, AdamW for the rest
    lr: float = 1e-4  # peak learning rate; never scaled by batch or world size behind the user's back
    beta1: float = 0.9  # AdamW's decay per step of the gradients' running mean, in [0, 1)
    beta2: float = 0.999  # decay per step of their running mean square, in [0, 1)
    eps: float = 1e-8  # added to the root of that mean square
    weight_decay: float = 0.01  # times lr: by which share matrices and kernels shrink per step
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping
    warmup_samples: int = 0  # samples of linear warm-up from 0
    decay: LrDecay = LrDecay.constant  # from hold_fraction of the run to its end
    hold_fraction: float = 0.0  # part of the run, in [0, 1), before the decay begins
    final_lr_ratio: float = 0.0  # learning rate at the end of the run / peak

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr={self.lr}: must be positive")
        require(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "optim.beta1 and optim.beta2 must be in [0, 1)")
        require(self.grad_clip >= 0, f"optim.grad_clip={self.grad_clip}: must be 0 (off) or positive")
        require(0 <= self.hold_fraction < 1, f"optim.hold_fraction={self.hold_fraction}: must be in [0, 1)")


@dataclass(kw_only=True, slots=True)
class BatchConfig:
    """How many samples a step takes, and who loads them."""

    global_batch_size: int = 256  # samples per optimiser step over all processes
    micro_batch_size: int = 0  # samples per process and forward pass, at most; 0: the whole share of the process
    uneven: bool = (
        False  # where these do not divide the global batch, micro-batches may differ by a sample; not in CLIP
    )
    workers: int | None = None  # loader processes per training process; 0: it loads itself; None: as its device wants

    def __post_init__(self) -> None:
        require(self.global_batch_size > 0, f"batch.global_batch_size={self.global_batch_size}: must be positive")
        require((self.workers or 0) >= 0, f"batch.workers={self.workers}: must be 0, positive or null")
        require(self.micro_batch_size >= 0, f"batch.micro_batch_size={self.micro_batch_size}: must be 0 or positive")

    def split(self, processes: int) -> tuple[int, int]:
        """Samples per forward pass of a process, at most, and forward passes per optimiser step.

        Raises:
            UserError: the processes and micro-batches do not divide `global_batch_size`, and they must, or some process
                would have a pass without samples.
        """
        size, unit = self.global_batch_size, processes * max(1, self.micro_batch_size)
        passes = -(-size // unit) if self.micro_batch_size else 1
        enough = processes * passes <= size  # samples for every pass
        if size % unit and not (self.uneven and enough):
            lower, upper = size // unit * unit, (size // unit + 1) * unit
            nearest = f"{lower} or {upper}" if lower else f"{upper}"
            micro = f" x batch.micro_batch_size={self.micro_batch_size}" if self.micro_batch_size else ""
            raise UserError(
                f"batch.global_batch_size={size}: must be a multiple of {unit} ({processes} processes{micro}); "
                f"set {nearest}{', or batch.uneven=true (not for CLIP)' if enough else ''}"
            )
        return -(-size // (processes * passes)), passes


def require_captions(option: str, names: list[str]) -> None:
    """Refuse names of captions among which the usual one does not come first."""
    require(all(names) and len(set(names)) == len(names), f"{option}: a name is empty, or there twice")
    require(
        "caption" not in names[1:], f"{option}: caption, which stands in for those that an image lacks, comes first"
    )


@dataclass(kw_only=True, slots=True)
class StreamConfig:
    """How a training walks through its data."""

    window: int = 0  # shards (of each lane) whose samples are mixed at a time; 0: all, each epoch a full permutation
    lanes: int = 0  # parts of a batch that read shards of their own, so that each machine reads its share alone; 0: off
    lane_batch: int = 0  # samples that the lanes share in turn; 0: the global batch; a run keeps what it began with
    skip_broken: bool = False  # leave out samples that cannot be read, and name them, instead of ending the run
    verify: bool = False  # compare each shard with the SHA-256 of its manifest when it is first opened
    webdataset: str | None = a_path(None)  # addresses for webdataset's own pipeline, in place of train/
    buffer: int = 2000  # samples among which it shuffles
    captions: dict[str, float] = field(default_factory=dict)  # {NAME: WEIGHT} of an image's; {}: caption, or all cached
    mix: dict[str, float] = field(default_factory=dict, metadata=PATH)  # {FOLDER: WEIGHT}; the first data set's is 1
    cache_dir: str | None = a_path(None)  # for remote shards; None: below $TMPDIR, which should be a local disk
    cache_gb: float = 100.0  # of them on that disk, at most, in 10^9 bytes; shared by the processes of a machine
    transfers: int = 8  # shards that a machine fetches at a time before they are needed
    timeout_s: float = 60.0  # seconds without a byte after which a server counts as dead
    bucket_run: int = 0  # samples of one shape in a row, in a cache with aspect buckets; 0: the global batch

    def __post_init__(self) -> None:
        require(self.bucket_run >= 0, f"stream.bucket_run={self.bucket_run}: must be 0 (global batch) or positive")
        require(self.window >= 0, f"stream.window={self.window}: must be 0 (all shards) or positive")
        require(self.lanes >= 0, f"stream.lanes={self.lanes}: must be 0 (off) or positive, a multiple of the processes")
        require(self.lane_batch >= 0, f"stream.lane_batch={self.lane_batch}: must be 0 (global batch) or positive")
        require_positive(self, "cache_gb", "timeout_s", "transfers", "buffer", group="stream.")
        require(
            self.webdataset is None or not (self.mix or self.window or self.lanes),
            f"stream.webdataset={self.webdataset}: has an order of its own; leave out stream.mix, window and lanes",
        )
        require_captions("stream.captions", list(self.captions))
        for name, weight in self.captions.items():
            require(weight > 0, f"stream.captions: the weight of {name} is {weight}: must be positive; or leave it out")
        for folder, weight in self.mix.items():
            require(
                weight > 0,
                f"stream.mix: the weight of '{folder}' is {weight}: must be positive; leave out what shall not be read",
            )


@dataclass(kw_only=True, slots=True)
class LoopConfig:
    """All in samples seen; rounded up to whole steps."""

    samples: int = 10_000_000  # length of the run
    log_every: int = 2560  # between two lines of metrics (means over the interval)
    evaluate_every: int = 100_000  # between two evaluations with images; one more at the end
    checkpoint_every: int = 100_000  # between two checkpoints; one more at the end and on a signal
    log_every_s: float = 0.0  # seconds: where two lines would come faster, those between are left out
    evaluate_every_s: float = 0.0  # the same of evaluations
    checkpoint_every_s: float = 0.0  # the same of checkpoints, but for those that loop.keep_best needs
    keep_checkpoints: int = 2  # complete checkpoints left on disk: the newest, and what the next two options add
    keep_every: int = 0  # samples: the first checkpoint at or after every multiple stays; 0: none
    keep_best: str | None = None  # metric of the evaluations (eval/loss) whose best checkpoint stays
    best_is_highest: bool = False  # of keep_best: more is better (eval/psnr); false: less is
    most_skipped_steps: int = 20  # in a row, not finite: then back to the last checkpoint, and if that fails the end
    async_checkpoints: bool = True  # train on while they are written; the main process holds a copy in host memory

    def __post_init__(self) -> None:
        names = ("samples", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints", "most_skipped_steps")
        require_positive(self, *names, group="loop.")
        for name in ("log_every_s", "evaluate_every_s", "checkpoint_every_s"):
            require(getattr(self, name) >= 0, f"loop.{name}={getattr(self, name)}: must be 0 (no floor) or positive")
        require(self.keep_every >= 0, f"loop.keep_every={self.keep_every}: must be 0 (off) or positive")
        require(
            self.keep_best is None or self.evaluate_every % self.checkpoint_every == 0,
            f"loop.keep_best={self.keep_best}: every evaluation needs its checkpoint; "
            "make loop.evaluate_every a multiple of loop.checkpoint_every",
        )


@dataclass(kw_only=True, slots=True)
class EmaConfig:
    """Moving averages of the weights; decays are functions of samples. Each costs 4 bytes a parameter."""

    half_life_samples: float = 100_000.0  # samples after which a weight counts half; 0: no average
    warmup_ratio: float = 0.05  # the half-life never exceeds this part of the samples seen so far (EDM2)
    more_half_lives: list[float] = field(default_factory=list)  # samples; of averages kept in the checkpoints, too
    posthoc: list[float] = field(default_factory=list)  # widths, relative to the run so far, of EDM2's: [0.05,0.1]
    on_cpu: bool = False  # keep the averages in host memory: less on the GPU, and every step copies the weights

    def __post_init__(self) -> None:
        more, widths = self.more_half_lives, self.posthoc
        require(self.half_life_samples >= 0, f"ema.half_life_samples={self.half_life_samples}: must be 0 or positive")
        require(
            self.half_life_samples > 0 or not (more or widths),
            "ema.more_half_lives and ema.posthoc: need an ema.half_life_samples above 0",
        )
        different = len({round(value) for value in [0, self.half_life_samples, *more]}) == 2 + len(more)
        require(
            not more or (different and min(more) > 0),
            f"ema.more_half_lives={more}: must be whole, positive, and all different, from ema.half_life_samples too",
        )
        require(
            all(0 < width < 0.28 for width in widths) and len(set(widths)) == len(widths) != 1,
            f"ema.posthoc={widths}: two or more different widths in (0, 0.28), such as [0.05,0.1], or none",
        )


@dataclass(kw_only=True, slots=True)
class ImageConfig:
    """From a decoded image to a square in [-1, 1]."""

    resolution: int = 256  # pixels: the shorter side is resized to it, then a square is cropped
    crop: Crop = Crop.center  # of the longer side in training; evaluation always takes the centre
    flip: bool = False  # mirror every second sample, drawn per (seed, position)
    filter: ResizeFilter = ResizeFilter.lanczos  # that scales; bicubic takes a seventh of its time
    max_pixels: int = 64_000_000  # an image with more is refused before it is decoded (decompression bomb)

    def other_filter(self) -> dict[str, str]:
        """The filter, for what must not be taken for images that another one scaled; the first one was not named."""
        return {} if self.filter is ResizeFilter.lanczos else {"filter": self.filter.value}


@dataclass(kw_only=True, slots=True)
class ProcessConfig:
    """What the network predicts, at which noise levels it learns, and how its errors count."""

    prediction: Prediction = Prediction.eps  # noise, velocity (v), image (x0), or the flow from image to noise
    train_timesteps: int = 1000  # T of the discrete process (eps, v, x0); scale of the time input (flow)
    schedule: BetaSchedule = BetaSchedule.scaled_linear  # of the noise variances beta (eps, v, x0)
    beta_start: float = 0.00085  # variance of the noise added at the first timestep
    beta_end: float = 0.012  # variance of the noise added at the last timestep; the cosine schedule uses neither
    zero_terminal_snr: bool = False  # rescale the schedule so that the last timestep is noise alone (v, x0)
    shift: float = 1.0  # factor of all noise levels std/alpha: for larger images the ratio of the sides, or its root
    timestep_sampling: TimestepSampling = TimestepSampling.uniform  # logit_normal favours the middle
    logit_mean: float = 0.0  # of the normal whose sigmoid logit_normal draws; above 0 favours noise
    logit_std: float = 1.0  # its standard deviation
    offset_noise: float = 0.0  # standard deviation of noise that is the same for all pixels of a channel; 0: off
    loss: Distance = Distance.l2  # between prediction and target
    huber_delta: float = 0.1  # difference at which loss=huber becomes linear
    min_snr_gamma: float = 0.0  # Hang et al. 2023, eq. 5; 0: off
    p2_gamma: float = 0.0  # exponent of P2 weights (Choi et al. 2022): 1 or 0.5; 0: off
    p2_k: float = 1.0  # added to the signal-to-noise ratio in them
    mean_flow: float = 0.0  # share of samples that learn the mean velocity of a long step (Geng et al. 2025); 0: off

    def __post_init__(self) -> None:
        name = self.prediction.value
        require_positive(self, "train_timesteps", "shift", "logit_std", "huber_delta", "p2_k", group="process.")
        for option in ("offset_noise", "min_snr_gamma", "p2_gamma"):
            value = getattr(self, option)
            require(value >= 0, f"process.{option}={value}: must be 0 (off) or positive")
        for option in ("min_snr_gamma", "p2_gamma"):
            weighs = getattr(self, option) > 0
            require(
                not (weighs and self.prediction is Prediction.flow),
                f"process.{option}: not defined for process.prediction=flow; set it to 0",
            )
            require(
                not (weighs and self.loss is not Distance.l2),
                f"process.{option}: weighs squared errors; set process.loss=l2 or process.{option}=0",
            )
        require(
            self.min_snr_gamma == 0 or self.p2_gamma == 0,
            "process.min_snr_gamma and process.p2_gamma: two weights of the same errors; set one of them to 0",
        )
        require(
            not (self.zero_terminal_snr and self.prediction in (Prediction.eps, Prediction.flow)),
            f"process.zero_terminal_snr: not with process.prediction={name}; set it to false or predict v or x0",
        )
        share = self.mean_flow
        require(0 <= share <= 1, f"process.mean_flow={share}: must be in [0, 1], 0 for none")
        require(
            share == 0 or (self.prediction is Prediction.flow and self.loss is Distance.l2),
            f"process.mean_flow={share}: is the mean of a flow's velocity, by squared errors; set "
            "process.prediction=flow and process.loss=l2",
        )
        require(0 < self.beta_start <= self.beta_end < 1, "process: needs 0 < beta_start <= beta_end < 1")
