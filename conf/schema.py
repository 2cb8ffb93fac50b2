"""Every option of every command: name, type, unit, default and the checks that join two of them.

YAML files in this folder only select and override; a name that is not here is refused. Sizes that count progress are
in samples, so that neither the batch nor the number of processes moves a schedule. `__post_init__` runs when a command
turns its composed configuration into these objects, before torch is imported.
"""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from conf.errors import UserError
from conf.networks import AutoencoderConfig, ClipConfig, DiscriminatorConfig, UNetConfig


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class LrDecay(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class WandbMode(Enum):
    auto = "auto"  # online when logged in, else offline
    offline = "offline"
    online = "online"
    disabled = "disabled"


class Source(Enum):
    demo = "demo"
    twemoji = "twemoji"
    folder = "folder"
    shards = "shards"
    mix = "mix"


class ImageFormat(Enum):
    png = "png"
    jpg = "jpg"
    webp = "webp"


class Crop(Enum):
    center = "center"
    random = "random"


class Reconstruction(Enum):
    l1 = "l1"
    l2 = "l2"


class ExportFormat(Enum):
    diffusers = "diffusers"  # a folder for StableDiffusionPipeline
    compvis = "compvis"  # one file with the names of the original Stable Diffusion


class Adversarial(Enum):
    hinge = "hinge"
    non_saturating = "non_saturating"  # logistic


class Perceptual(Enum):
    none = "none"
    lpips = "lpips"  # VGG16 features; needs its backbone weights on disk
    efficientnet = "efficientnet"  # EfficientNet-Lite0 features from a package, offline


class Prediction(Enum):
    eps = "eps"
    v = "v"
    flow = "flow"


class BetaSchedule(Enum):
    linear = "linear"
    scaled_linear = "scaled_linear"  # linear in the square root of beta: what the LDM code calls linear
    cosine = "cosine"


class TimestepSampling(Enum):
    uniform = "uniform"
    logit_normal = "logit_normal"


class Sampler(Enum):
    ddim = "ddim"
    dpmpp_2m = "dpmpp_2m"


class CacheDtype(Enum):
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


def require(condition: bool, message: str) -> None:
    """Raise the one-line error of an impossible configuration."""
    if not condition:
        raise UserError(message)


def require_positive(cfg: object, *names: str, group: str = "") -> None:
    """Likewise for options that must be above zero."""
    for name in names:
        require(getattr(cfg, name) > 0, f"{group}{name}={getattr(cfg, name)}: must be positive")


@dataclass(kw_only=True, slots=True)
class RuntimeConfig:
    """Where and how a stage computes: the only part that differs between a laptop and a cluster."""

    device: Device = Device.auto  # auto: cuda when there is one
    precision: Precision = Precision.fp32  # of the forward and backward pass; master weights stay fp32
    zero_stage: int = 0  # DeepSpeed ZeRO stage of the U-Net, 0-3; the other networks train with plain DDP
    gradient_checkpointing: bool = False  # train the U-Net in half the memory and a quarter more time
    threads: int = 0  # CPU threads per process; 0: torch's own choice
    timeout_s: float = 1800.0  # seconds after which a collective operation that does not return is an error

    def __post_init__(self) -> None:
        require(self.zero_stage in (0, 1, 2, 3), f"runtime.zero_stage={self.zero_stage}: must be 0, 1, 2 or 3")
        require(self.timeout_s > 0, f"runtime.timeout_s={self.timeout_s}: must be positive")


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    mode: WandbMode = WandbMode.auto  # auto: $WANDB_MODE, else online when logged in, else offline
    project: str = "latentline"  # where W&B files the runs
    entity: str | None = None  # team or user; None: the login's default


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its learning rate as a function of samples seen."""

    lr: float = 1e-4  # peak learning rate; never scaled by batch or world size behind the user's back
    beta1: float = 0.9  # decay per step of the gradients' running mean, in [0, 1)
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
    global_batch_size: int = 256  # samples per optimiser step over all processes
    micro_batch_size: int = 0  # samples per process and forward pass; 0: the whole share of the process
    workers: int = 0  # loader processes per training process; 0: load in the training process

    def __post_init__(self) -> None:
        require(self.global_batch_size > 0, f"batch.global_batch_size={self.global_batch_size}: must be positive")
        require(self.micro_batch_size >= 0, f"batch.micro_batch_size={self.micro_batch_size}: must be 0 or positive")

    def split(self, processes: int) -> tuple[int, int]:
        """Samples per forward pass of a process, and forward passes per optimiser step.

        Raises:
            UserError: the processes and micro-batches do not divide `global_batch_size`.
        """
        size, unit = self.global_batch_size, processes * max(1, self.micro_batch_size)
        if size % unit:
            lower, upper = size // unit * unit, (size // unit + 1) * unit
            nearest = f"{lower} or {upper}" if lower else f"{upper}"
            micro = f" x batch.micro_batch_size={self.micro_batch_size}" if self.micro_batch_size else ""
            raise UserError(
                f"batch.global_batch_size={size}: must be a multiple of {unit} ({processes} processes{micro}); "
                f"set {nearest}"
            )
        micro_size = self.micro_batch_size or size // processes
        return micro_size, size // (processes * micro_size)


@dataclass(kw_only=True, slots=True)
class StreamConfig:
    """How a training walks through its data."""

    window: int = 0  # shards whose samples are mixed at a time; 0: all, each epoch a full permutation
    skip_broken: bool = False  # leave out samples that cannot be read, and name them, instead of ending the run
    verify: bool = False  # compare each shard with the SHA-256 of its manifest when it is first opened
    mix: dict[str, float] = field(default_factory=dict)  # further data sets: folder: weight (the first one's is 1)
    cache_dir: str | None = None  # for remote shards; None: a folder below $TMPDIR, which should be a local disk
    cache_gb: float = 100.0  # of them on that disk, at most, in 10^9 bytes; shared by the processes of a machine
    timeout_s: float = 60.0  # seconds without a byte after which a server counts as dead
    bucket_run: int = 0  # samples of one shape in a row, in a cache with aspect buckets; 0: the global batch

    def __post_init__(self) -> None:
        require(self.bucket_run >= 0, f"stream.bucket_run={self.bucket_run}: must be 0 (global batch) or positive")
        require(self.window >= 0, f"stream.window={self.window}: must be 0 (all shards) or positive")
        require_positive(self, "cache_gb", "timeout_s", group="stream.")
        for folder, weight in self.mix.items():
            require(weight > 0, f"stream.mix: the weight of '{folder}' is {weight}: must be positive")


@dataclass(kw_only=True, slots=True)
class LoopConfig:
    """All in samples seen; rounded up to whole steps."""

    samples: int = 10_000_000  # length of the run
    log_every: int = 2560  # between two lines of metrics (means over the interval)
    evaluate_every: int = 100_000  # between two evaluations with pictures; one more at the end
    checkpoint_every: int = 100_000  # between two checkpoints; one more at the end and on a signal
    keep_checkpoints: int = 2  # complete checkpoints left on disk

    def __post_init__(self) -> None:
        names = ("samples", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints")
        require_positive(self, *names, group="loop.")


@dataclass(kw_only=True, slots=True)
class EmaConfig:
    """Exponential moving average of the weights; its decay is a function of samples."""

    half_life_samples: float = 100_000.0  # samples after which a weight counts half; 0: no average
    warmup_ratio: float = 0.05  # the half-life never exceeds this part of the samples seen so far (EDM2)


@dataclass(kw_only=True, slots=True)
class ImageConfig:
    """From a decoded picture to a square in [-1, 1]."""

    resolution: int = 256  # pixels: the shorter side is resized to it, then a square is cropped
    crop: Crop = Crop.center  # of the longer side in training; evaluation always takes the centre
    flip: bool = False  # mirror every second sample, drawn per (seed, position)
    max_pixels: int = 64_000_000  # a picture with more is refused before it is decoded (decompression bomb)


@dataclass(kw_only=True, slots=True)
class FilterConfig:
    """Which samples a build leaves out although nothing is wrong with them; all off by default."""

    min_side: int = 0  # pixels of the shorter side
    max_aspect: float = 0.0  # longer side / shorter side; 0: any
    min_caption: int = 0  # characters
    max_caption: int = 0  # characters; 0: any
    min_score: dict[str, float] = field(default_factory=dict)  # by field of the sample's JSON; no field, no sample
    max_score: dict[str, float] = field(default_factory=dict)  # likewise, such as {pwatermark: 0.5, punsafe: 0.1}
    near_duplicates: int = -1  # bits of 64 in which the perceptual hash of a copy may differ; -1: keep copies

    def __post_init__(self) -> None:
        require(
            -1 <= self.near_duplicates <= 16,
            f"filters.near_duplicates={self.near_duplicates}: must be -1 (off) or 0 to 16 bits",
        )
        require(
            self.max_aspect == 0 or self.max_aspect >= 1,
            f"filters.max_aspect={self.max_aspect}: must be 0 (any) or at least 1",
        )


@dataclass(kw_only=True, slots=True)
class MixedSource:
    """One of several sources of a build."""

    source: Source = Source.folder  # any but mix
    name: str | None = None  # under which samples and manifest remember it; None: that of the source
    path: str | None = None  # as that of the build
    image_column: str = "path"  # of a table: image file, relative to the table's folder
    caption_column: str = "caption"  # of a table: text
    weight: float = 1.0  # its share of the samples, relative to the others

    def __post_init__(self) -> None:
        require(self.source is not Source.mix, "sources: a mix cannot hold a mix")
        require_positive(self, "weight", group="sources: ")


@dataclass(kw_only=True, slots=True)
class BuildRun:
    """`data/build_shards.py`: any source to WebDataset shards, `train/` and `heldout/`."""

    run_dir: str = MISSING  # the project's folder; stages find each other's results below it
    name: str = MISSING  # of the project; the default run_dir and the W&B group
    seed: int = 0  # of all that is drawn at random
    output_dir: str = MISSING  # folder of this command's results; by default one below run_dir
    source: Source = Source.demo  # rendered scenes, Twitter's emoji, files below path, shards of others, several
    path: str | None = None  # folder: of images, or .csv/.parquet; shards: folder or tars, also http(s):// and s3://
    sources: list[MixedSource] = field(default_factory=list)  # source=mix: those that are mixed
    filters: FilterConfig = field(default_factory=FilterConfig)
    timeout_s: float = 60.0  # seconds without a byte after which a server of shards counts as dead
    image_column: str = "path"  # of a table: image file, relative to the table's folder
    caption_column: str = "caption"  # of a table: text
    samples: int = 0  # source=demo: scenes to render; elsewhere the most to take, 0 for all
    resolution: int = 0  # pixels of the shorter side, never enlarged, 0 to keep; source=demo: of the square
    format: ImageFormat = ImageFormat.png  # of the stored pictures
    quality: int = 95  # of jpg and webp
    background: str = "white"  # colour name or #rrggbb behind transparent pixels
    shard_samples: int = 1000  # samples per shard
    heldout_fraction: float = 0.04  # share of captions that training never sees; chosen by a digest of the caption
    max_pixels: int = 64_000_000  # a picture with more goes to rejects.jsonl
    workers: int = 0  # processes; 0: one per core

    def __post_init__(self) -> None:
        require(
            self.source is not Source.folder or bool(self.path), "source=folder needs path=FOLDER, .csv or .parquet"
        )
        require(
            self.source is not Source.shards or bool(self.path),
            "source=shards needs path=FOLDER, 'path=\"FOLDER/{00000..00099}.tar\"' or an address of either",
        )
        require(
            (self.source is Source.mix) == bool(self.sources),
            "source=mix and 'sources=[{source: ..., path: ..., weight: ...}, ...]' go together",
        )
        names = [member.name or member.source.value for member in self.sources]
        require(len(set(names)) == len(names), f"sources: the names {', '.join(names)} are not all different; set name")
        require_positive(self, "timeout_s")
        require(self.source is not Source.demo or self.samples > 0, "source=demo needs samples=N scenes to render")
        require(self.source is not Source.demo or self.resolution >= 16, "source=demo needs resolution>=16 pixels")
        require(0 <= self.heldout_fraction < 1, f"heldout_fraction={self.heldout_fraction}: must be in [0, 1)")
        require(self.shard_samples > 0, f"shard_samples={self.shard_samples}: must be positive")


@dataclass(kw_only=True, slots=True)
class AutoencoderLossConfig:
    """LDM paper, appendix G and eq. 25; weights of the terms relative to the reconstruction."""

    reconstruction: Reconstruction = Reconstruction.l1  # mean absolute or mean squared difference of pixels
    perceptual: Perceptual = Perceptual.lpips  # whose features compare the pictures
    perceptual_weight: float = 1.0  # 0: off
    kl_weight: float = 1e-6  # of the KL divergence summed over a latent, per pixel value of the image
    codebook_weight: float = 1.0  # of the distance between latents and codebook, with model.num_vq_embeddings
    adversarial: Adversarial = Adversarial.hinge  # how verdicts become losses
    adversarial_weight: float = 0.5  # times the adaptive weight |grad rec| / |grad gan| at the decoder's last layer
    adversarial_start: int = 600_000  # samples seen before the discriminator joins
    r1_weight: float = 0.0  # of half the squared gradient of real verdicts by their pictures; 0: off
    lecam_weight: float = 0.0  # of the squared distance of verdicts to the other kind's running mean; 0: off


@dataclass(kw_only=True, slots=True)
class AutoencoderRun:
    """`train/train_autoencoder.py`."""

    run_dir: str = MISSING
    name: str = MISSING
    seed: int = 0
    output_dir: str = MISSING
    shards: str = MISSING  # folder that holds train/ and heldout/
    init_from: str | None = None  # to start from: folder in diffusers' format, or CompVis checkpoint in one file
    images: ImageConfig = field(default_factory=ImageConfig)
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    discriminator_optim: OptimConfig = field(default_factory=OptimConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        factor = self.model.downscale
        require(
            self.images.resolution % factor == 0,
            f"images.resolution={self.images.resolution}: must be a multiple of {factor}, "
            "the autoencoder's downscale factor (model.block_out_channels)",
        )


@dataclass(kw_only=True, slots=True)
class ClipRun:
    """`train/train_clip.py`."""

    run_dir: str = MISSING
    name: str = MISSING
    seed: int = 0
    output_dir: str = MISSING
    shards: str = MISSING
    images: ImageConfig = field(default_factory=ImageConfig)
    model: ClipConfig = field(default_factory=ClipConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(kw_only=True, slots=True)
class BucketConfig:
    """Shapes of pictures that are not square, all of about images.resolution² pixels."""

    max_aspect: float = 1.0  # longer side / shorter side, at most; 1: squares only
    step: int = 64  # pixels of which each side is a multiple

    def __post_init__(self) -> None:
        require(self.max_aspect >= 1, f"buckets.max_aspect={self.max_aspect}: must be at least 1 (squares only)")
        require_positive(self, "step", group="buckets.")


@dataclass(kw_only=True, slots=True)
class PrecomputeRun:
    """`data/precompute_latents.py`: image shards to latent shards."""

    run_dir: str = MISSING
    name: str = MISSING
    seed: int = 0
    output_dir: str = MISSING
    shards: str = MISSING
    autoencoder: str = MISSING  # folder with the frozen autoencoder (config.json, safetensors)
    clip: str = MISSING  # folder with the frozen CLIP, or a pretrained open_clip name
    images: ImageConfig = field(default_factory=ImageConfig)
    dtype: CacheDtype = CacheDtype.fp16  # of moments and text states on disk
    text_states: bool = True  # cache the text tower's output too, not only the tokens
    variants: int = 1  # cuts kept of each picture: the centre, then images.crop and images.flip drawn for each
    buckets: BucketConfig = field(default_factory=BucketConfig)
    batch_size: int = 64  # pictures decoded and encoded together; halved by itself where memory is short
    tile: int = 0  # pixels: larger pictures are encoded in overlapping squares of this side, one at a time; 0: whole
    threads: int = 2  # that decode pictures beside the encoder
    lease_s: float = 120.0  # seconds after which the claim of a process that shows no life on another machine is void
    check_samples: int = 64  # latents decoded back against their images
    min_psnr: float = 15.0  # dB; a cache that decodes worse is refused
    plan: bool = False  # only say how much storage and time the cache will take
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        require_positive(self, "variants", "batch_size", "threads", "check_samples", "lease_s")
        require(
            self.variants == 1 or self.images.crop is Crop.random or self.images.flip,
            f"variants={self.variants}: all would be the same; set images.crop=random or images.flip=true",
        )


@dataclass(kw_only=True, slots=True)
class PreviewRun:
    """`data/preview.py`: a contact sheet and the statistics of a data set."""

    run_dir: str = MISSING
    name: str = MISSING
    seed: int = 0
    output_dir: str = MISSING
    data: str = MISSING  # folder of image or latent shards, such as RUN/shards/train
    autoencoder: str = MISSING  # decodes latents for the sheet
    pictures: int = 64  # on the contact sheet, spread over the data set
    samples: int = 20_000  # behind the statistics, at most
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        require_positive(self, "pictures", "samples")


@dataclass(kw_only=True, slots=True)
class ProcessConfig:
    """What the network predicts and at which noise levels it learns."""

    prediction: Prediction = Prediction.eps  # noise, velocity (v), or the straight flow from image to noise
    train_timesteps: int = 1000  # T of the discrete process (eps, v); scale of the time input (flow)
    schedule: BetaSchedule = BetaSchedule.scaled_linear  # of the noise variances beta (eps, v)
    beta_start: float = 0.00085  # variance of the noise added at the first timestep
    beta_end: float = 0.012  # likewise at the last; the cosine schedule uses neither
    timestep_sampling: TimestepSampling = TimestepSampling.uniform  # logit_normal favours the middle
    min_snr_gamma: float = 0.0  # Hang et al. 2023, eq. 5; 0: off

    def __post_init__(self) -> None:
        require(
            not (self.prediction is Prediction.flow and self.min_snr_gamma > 0),
            "process.min_snr_gamma: not defined for process.prediction=flow; set it to 0",
        )
        require(self.train_timesteps > 0, f"process.train_timesteps={self.train_timesteps}: must be positive")
        require(0 < self.beta_start <= self.beta_end < 1, "process: needs 0 < beta_start <= beta_end < 1")


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    sampler: Sampler = Sampler.dpmpp_2m  # DDIM or DPM-Solver++ 2M
    steps: int = 30  # calls of the network per picture (twice that with guidance)
    guidance_scale: float = 3.0  # 1: no classifier-free guidance

    def __post_init__(self) -> None:
        require(self.steps > 0, f"sampling.steps={self.steps}: must be positive")


@dataclass(kw_only=True, slots=True)
class UNetRun:
    """`train/train_unet.py`."""

    run_dir: str = MISSING
    name: str = MISSING
    seed: int = 0
    output_dir: str = MISSING
    latents: str = MISSING  # folder that holds train/ and heldout/
    autoencoder: str = MISSING  # must be the one that made the latents; decodes the sample grids
    clip: str = MISSING  # likewise; encodes the prompts of the sample grids
    init_from: str | None = None
    caption_drop: float = 0.1  # share of samples trained without their caption, for classifier-free guidance
    sample_prompts: int = 16  # held-out captions that are drawn at each evaluation
    model: UNetConfig = field(default_factory=UNetConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        require(0 <= self.caption_drop < 1, f"caption_drop={self.caption_drop}: must be in [0, 1)")
        for option in ("num_class_embeds", "class_embed_type", "addition_embed_type"):
            value = getattr(self.model, option)
            require(value is None, f"model.{option}={value}: the network can, but this training gives it captions only")


@dataclass(kw_only=True, slots=True)
class SampleRun:
    """`train/sample.py`: prompts to PNGs and a captioned grid."""

    run_dir: str = MISSING
    name: str = MISSING
    seed: int = 0  # of the noise; picture i of a prompt uses (seed, prompt, i)
    output_dir: str = MISSING
    unet: str = MISSING  # folder with the exported U-Net
    autoencoder: str = MISSING
    clip: str = MISSING
    prompts: list[str] = field(default_factory=list)  # on the command line: 'prompts=["a red planet"]'
    prompts_file: str | None = None  # a text file, one prompt a line
    images_per_prompt: int = 1  # pictures drawn of each prompt
    batch_size: int = 32  # pictures made together; changes no picture
    tile: int = 0  # pixels: larger pictures are decoded in overlapping squares of this side, one at a time; 0: whole
    sampler: Sampler = Sampler.dpmpp_2m
    steps: int = 30
    guidance_scale: float = 3.0
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        require(bool(self.prompts) or bool(self.prompts_file), 'no prompts: set prompts=["..."] or prompts_file=FILE')
        require(self.steps > 0, f"steps={self.steps}: must be positive")


@dataclass(kw_only=True, slots=True)
class ExportRun:
    """`train/export.py`: a trained model as other programs load it."""

    run_dir: str = MISSING
    name: str = MISSING
    seed: int = 0
    output_dir: str = MISSING
    unet: str = MISSING
    autoencoder: str = MISSING
    clip: str = MISSING
    format: ExportFormat = ExportFormat.diffusers  # compvis: one file OUTPUT_DIR.safetensors
    dtype: CacheDtype = CacheDtype.fp32  # of the weights on disk


@dataclass(kw_only=True, slots=True)
class EvaluateRun:
    """`train/evaluate.py`: pictures of held-out prompts against held-out images."""

    run_dir: str = MISSING
    name: str = MISSING
    seed: int = 0
    output_dir: str = MISSING
    shards: str = MISSING
    unet: str = MISSING
    autoencoder: str = MISSING
    clip: str = MISSING
    images: ImageConfig = field(default_factory=ImageConfig)
    samples: int = 128  # held-out prompts to draw
    batch_size: int = 32
    tile: int = 0  # pixels: larger pictures are decoded in overlapping squares of this side, one at a time; 0: whole
    sampler: Sampler = Sampler.dpmpp_2m
    steps: int = 30
    guidance_scale: float = 3.0
    inception: str | None = None  # file with the Inception weights of the FID; None: only offline metrics
    prompt_following: bool = False  # train the probe and score kind, background and colour (demo set only)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(kw_only=True, slots=True)
class PipelineRun:
    """`train/pipeline.py`: all stages; each takes its own options as STAGE.option=value."""

    run_dir: str = MISSING
    name: str = MISSING
    seed: int = 0
    processes: int = 1  # processes per training stage, started with torchrun
    stages: list[str] = field(  # those to run; always in this order
        default_factory=lambda: ["build", "autoencoder", "clip", "latents", "unet", "sample", "evaluate"]
    )
    overrides: dict[str, list[str]] = field(default_factory=dict)  # filled in from STAGE.option=value
