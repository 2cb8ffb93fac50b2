"""Commands around a training: those that run the others, plan, show and pass on."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.errors import UserError
from conf.overrides import a_path
from conf.schema.choices import Accelerator, CacheDtype, DistillMethod, Precision, TerminalImages
from conf.schema.shared import WandbConfig, require, require_positive
from conf.schema.training import SLOPE, TARGETS, UNetRun, asks_teacher, passes_beside


@dataclass(kw_only=True, slots=True)
class PipelineRun:
    """`train/pipeline.py`: all stages, each a process of its own; a second start continues.

    python train/pipeline.py experiment=demo
    python train/pipeline.py experiment=demo stages=[build,autoencoder] run_dir=runs/other
    python train/pipeline.py experiment=demo seed=1 processes=2 unet.optim.lr=1e-4 wandb.mode=disabled
    """

    run_dir: str = a_path()
    name: str = MISSING
    seed: int = 0
    processes: int = 1  # processes per training stage, started with torchrun
    stages: list[str] = field(  # those to run; always in this order
        default_factory=lambda: ["build", "autoencoder", "clip", "latents", "unet", "sample", "evaluate"]
    )
    calibrate: bool = True  # try the networks' steps for some seconds, so that the time left is known from the start
    live: bool = True  # on a terminal: serve the run's page on this machine's own address, as train/report.py live=true
    terminal_images: TerminalImages = TerminalImages.auto  # how new images are shown there
    overrides: dict[str, list[str]] = field(default_factory=dict)  # filled in from STAGE.option=value


@dataclass(kw_only=True, slots=True)
class PlanRun(UNetRun):
    """`train/plan.py`: what a training of the U-Net will cost: memory, time, disk; it reads no data.

    It takes the options of `train/train_unet.py`, which it does not start, and those of the machines. With `method` it
    is of `train/distill_unet.py`, whose student is a U-Net of the same options.

        python train/plan.py model=sdxl
        python train/plan.py experiment=distill_sd1
        python train/plan.py accelerator=a100 gpus=256 batch.global_batch_size=2048
    """

    method: DistillMethod | None = None  # of distillation; None: the U-Net is trained without a teacher
    adversarial_weight: float = 0.0  # of distillation: above 0 the student is judged through its teacher
    accelerator: Accelerator = Accelerator.h100  # whose peak, memory and links count
    gpus: int = 8  # processes, one per GPU
    gpus_per_machine: int = 8  # that exchange gradients without the network
    mfu: float = 0.0  # share of the GPU's peak that the network reaches, in (0, 1]; 0: what is known of the accelerator
    network_gbps: float = 0.0  # Gbit/s between machines, per GPU; 0: what such machines usually have
    cached_samples: int = 0  # samples in the latent cache; 0: loop.samples, each seen once
    dtype: CacheDtype = CacheDtype.fp16  # of moments and text states on disk
    variants: int = 1  # cuts kept of each image
    text_states: bool = True  # cache the text tower's output too, not only the tokens
    tokens: int = 77  # of a caption

    def __post_init__(self) -> None:
        if self.runtime.precision is Precision.auto:
            self.runtime.precision = Precision.fp32 if self.accelerator is Accelerator.v100 else Precision.bf16
        require_positive(self, "gpus", "gpus_per_machine", "variants", "tokens")
        require(0 <= self.mfu <= 1, f"mfu={self.mfu}: must be in (0, 1], or 0 for what is known of the accelerator")
        for name in ("network_gbps", "cached_samples"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: must be 0 or positive")
        require(
            self.gpus <= self.gpus_per_machine or self.gpus % self.gpus_per_machine == 0,
            f"gpus={self.gpus}: must be a multiple of gpus_per_machine={self.gpus_per_machine}, or fit into one",
        )
        require(self.lora.rank == 0, f"lora.rank={self.lora.rank}: the plan is of training all weights; leave it out")
        side, factor = self.model.sample_size, self.model.downscale
        require(
            side % factor == 0,
            f"model.sample_size={side}: must be a multiple of {factor}, the U-Net's downscale factor "
            "(model.block_out_channels)",
        )
        self.batch.split(self.gpus)

    @property
    def program(self) -> str:
        """The command that this is the plan of."""
        return "train_unet.py" if self.method is None else "distill_unet.py"

    @property
    def extra_passes(self) -> int:
        """Passes of a sample beside those there and back: a distillation's, or those for the target of a mean flow."""
        if self.method is None:
            return self.targets
        return passes_beside(self.method, self.adversarial_weight > 0)

    @property
    def targets(self) -> int:
        """Calls of the network that is trained, in a step, for its own target."""
        if self.method is None:
            return SLOPE if self.process.mean_flow > 0 else 0
        return TARGETS[self.method]

    @property
    def taught(self) -> bool:
        """Whether every process holds a teacher."""
        return self.method is not None and asks_teacher(self.method, self.adversarial_weight > 0)

    def refusal(self) -> str:
        """Why `program` would not start with these options; "" where nothing in them hinders it."""
        try:
            UNetRun.__post_init__(self)
        except UserError as error:
            return str(error)
        return ""


@dataclass(kw_only=True, slots=True)
class ReportRun:
    """`train/report.py`: a run folder as one page that needs nothing else.

    python train/report.py run_dir=runs/demo
    python train/report.py run_dir=runs/demo live=true
    python train/report.py run_dir=runs/demo output_dir=pages/demo
    """

    run_dir: str = a_path()
    name: str = MISSING
    seed: int = 0
    output_dir: str = a_path()  # where report.html is written
    shards: str = a_path()  # folder that holds train/ and heldout/
    frames: int = 24  # images behind each slider, at most, spread over the training
    images_mb: float = 9.0  # megabytes of all images on the page; with it they get smaller
    samples: int = 2_000  # behind the statistics of the data set, at most
    live: bool = False  # serve the page to this machine's own browser, as the run goes on, instead of writing it
    port: int = 7861  # to listen on with live=true; 0: any free one

    def __post_init__(self) -> None:
        require_positive(self, "frames", "images_mb", "samples")
        require(0 <= self.port < 2**16, f"port={self.port}: must be in [0, 65535]")


@dataclass(kw_only=True, slots=True)
class DashboardRun:
    """`train/dashboard.py`: the W&B workspace of a run, as a file and on the server.

    python train/dashboard.py run_dir=runs/demo
    python train/dashboard.py run_dir=runs/demo save=true
    python train/dashboard.py run_dir=runs/demo save=true wandb.entity=TEAM
    """

    run_dir: str = a_path()
    name: str = MISSING
    output_dir: str = a_path()  # where dashboard.json is written
    save: bool = False  # put the workspace on the W&B server, too; needs `wandb login`
    wandb: WandbConfig = field(default_factory=WandbConfig)
