"""Commands that train a network."""

from dataclasses import dataclass, field, replace

from omegaconf import MISSING

from conf.overrides import a_path
from conf.schema.choices import Adversarial, BackendName, DistillMethod, Perceptual, Reconstruction, Sampler
from conf.schema.conditions import ConditionsConfig
from conf.schema.evaluation import LoopEvaluationConfig
from conf.schema.networks import AutoencoderConfig, ClipConfig, DiscriminatorConfig, UNetConfig
from conf.schema.sampling import SamplingConfig
from conf.schema.shared import (
    BatchConfig,
    EmaConfig,
    ImageConfig,
    LoopConfig,
    OptimConfig,
    ProcessConfig,
    StreamConfig,
    TrainingRuntimeConfig,
    UNetRuntimeConfig,
    WandbConfig,
    require,
)

LENGTH_EMBEDDING = 256  # width, of the length of a mean flow's step


@dataclass(kw_only=True, slots=True)
class AutoencoderLossConfig:
    """LDM paper, appendix G and eq. 25; weights of the terms relative to the reconstruction."""

    reconstruction: Reconstruction = Reconstruction.l1  # mean absolute or mean squared difference of pixels
    perceptual: Perceptual = Perceptual.lpips  # whose features compare the images
    perceptual_weight: float = 1.0  # 0: off
    kl_weight: float = 1e-6  # of the KL divergence summed over a latent, per pixel value of the image
    codebook_weight: float = 1.0  # of the distance between latents and codebook, with model.num_vq_embeddings
    adversarial: Adversarial = Adversarial.hinge  # how verdicts become losses
    adversarial_weight: float = 0.5  # times the adaptive weight |grad rec| / |grad gan| at the decoder's last layer
    adversarial_start: int = 600_000  # samples seen before the discriminator joins
    r1_weight: float = 0.0  # of half the squared gradient of real verdicts by their images; 0: off
    lecam_weight: float = 0.0  # of the squared distance of verdicts to the other kind's running mean; 0: off


@dataclass(kw_only=True, slots=True)
class AutoencoderRun:
    """`train/train_autoencoder.py`: train the autoencoder, images to latents and back.

    python train/train_autoencoder.py experiment=demo
    python train/train_autoencoder.py model=kl_f8 images.resolution=256 run_dir=RUN
    torchrun --nproc-per-node=8 train/train_autoencoder.py model=vq_f4 run_dir=RUN runtime=gpu8
    """

    run_dir: str = a_path()
    name: str = MISSING
    seed: int = 0
    output_dir: str = a_path()
    shards: str = a_path()  # folder that holds train/ and heldout/
    init_from: str | None = a_path(None)  # to start from: folder in diffusers' format, or one file of CompVis
    images: ImageConfig = field(default_factory=ImageConfig)
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    discriminator_optim: OptimConfig = field(default_factory=OptimConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    runtime: TrainingRuntimeConfig = field(default_factory=TrainingRuntimeConfig)
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
    """`train/train_clip.py`: train CLIP, the image and text tower, on pairs of images and captions.

    python train/train_clip.py experiment=demo
    python train/train_clip.py run_dir=RUN model.pretrained=ViT-B-32/openai optim.lr=1e-5
    torchrun --nproc-per-node=8 train/train_clip.py run_dir=RUN runtime=gpu8
    """

    run_dir: str = a_path()
    name: str = MISSING
    seed: int = 0
    output_dir: str = a_path()
    shards: str = a_path()
    images: ImageConfig = field(default_factory=ImageConfig)
    model: ClipConfig = field(default_factory=ClipConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    runtime: TrainingRuntimeConfig = field(default_factory=TrainingRuntimeConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        # Its loss is no mean over samples: each process tells its images from the texts of all, in blocks of one size.
        require(not self.batch.uneven, "batch.uneven=true: CLIP takes its negatives from equal shares; leave it out")


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): fine-tuning that leaves the weights of `init_from` as they are."""

    rank: int = 0  # inner width of each adapter; 0: off, all weights train
    alpha: float | None = None  # what adapters add is multiplied by alpha / rank; None: by 1
    modules: list[str] = field(  # endings of the names of the linear layers that get one
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"]
    )

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"lora.rank={self.rank}: must be 0 (off) or positive")
        require(self.alpha is None or self.alpha > 0, f"lora.alpha={self.alpha}: must be positive")
        require(len(self.modules) > 0, "lora.modules=[]: name at least one layer, such as to_q")

    @property
    def numerator(self) -> float:
        """Alpha as a number."""
        return self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """Factor on what the adapters add."""
        return self.numerator / self.rank


@dataclass(kw_only=True, slots=True)
class UNetRun:
    """`train/train_unet.py`: train the U-Net on cached latents.

    python train/train_unet.py experiment=demo
    python train/train_unet.py -m experiment=demo optim.lr=1e-4,3e-4
    torchrun --nproc-per-node=8 train/train_unet.py experiment=sd1_256 runtime=gpu8
    """

    run_dir: str = a_path()
    name: str = MISSING
    seed: int = 0
    output_dir: str = a_path()
    latents: str = a_path()  # folder that holds train/ and heldout/
    autoencoder: str = a_path()  # must be the one that made the latents; decodes the sample grids
    clip: str = a_path()  # must be the one that the latents' captions are of; encodes the prompts of the sample grids
    encode: bool = False  # train on images of shards, encoded in each step; the cache need not have all of them
    shards: str | None = a_path(None)  # folder of these images that holds train/; null: shards/ of run_dir
    init_from: str | None = a_path(None)
    sample_prompts: int = 16  # held-out samples whose conditions are drawn at each evaluation
    conditions: ConditionsConfig = field(default_factory=ConditionsConfig)
    model: UNetConfig = field(default_factory=UNetConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: LoopEvaluationConfig = field(default_factory=LoopEvaluationConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    runtime: UNetRuntimeConfig = field(default_factory=UNetRuntimeConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        options = ["num_class_embeds", "class_embed_type", "addition_embed_type"]
        if self.process.mean_flow > 0:
            self.model = replace(self.model, time_cond_proj_dim=LENGTH_EMBEDDING)
            require(
                self.lora.rank == 0,
                f"process.mean_flow={self.process.mean_flow}: adapters cannot be told a length; set lora.rank=0",
            )
        else:
            options.append("time_cond_proj_dim")
            require(
                self.sampling.sampler is not Sampler.mean_flow,
                "sampling.sampler=mean_flow: asks for mean velocities; set process.mean_flow=0.25 or another sampler",
            )
        for option in options:
            value = getattr(self.model, option)
            require(value is None, f"model.{option}={value}: the network can, but this training tells it `conditions`")
        guidance, drops = self.sampling.guidance_scale, [section.drop for _, section in self.conditions.chosen()]
        require(
            guidance == 1 or any(drops),
            f"sampling.guidance_scale={guidance}: no condition is dropped in training; set it to 1",
        )
        if self.lora.rank > 0:
            self._check_lora()

    def _check_lora(self) -> None:
        """Adapters belong to trained weights, which no process may hold in part only."""
        chosen, runtime = f"lora.rank={self.lora.rank}: ", self.runtime
        require(self.init_from is not None, chosen + "adapters need a trained U-Net; set init_from=FOLDER")
        require(
            runtime.backend is BackendName.ddp or (runtime.backend is BackendName.deepspeed and runtime.zero_stage < 3),
            chosen + "frozen weights cannot be sharded; set runtime.backend=deepspeed and runtime.zero_stage=0, 1 or 2",
        )


SLOPE = 2  # calls of a network between which its slope is seen
TARGETS = {  # calls of the student for its own target
    DistillMethod.lcm: 1,
    DistillMethod.scm: SLOPE,
    DistillMethod.consistency_training: 1,
    DistillMethod.guidance: 0,
}


def asks_teacher(method: DistillMethod, judged: bool) -> bool:
    """Whether every process holds a teacher: for its steps, or as an adversary's eye."""
    return method is not DistillMethod.consistency_training or judged


def passes_beside(method: DistillMethod, judged: bool, guided: bool = True) -> int:
    """Passes through a U-Net that a sample of a distillation costs beside the student's own, there and back.

    Those for its target; the teacher's, two where it is guided; where an adversary judges, there and back of a guess,
    and there of the data.
    """
    teacher = 0 if method is DistillMethod.consistency_training else 1 + guided
    return TARGETS[method] + teacher + (3 if judged else 0)


@dataclass(kw_only=True, slots=True)
class DistillRun:
    """`train/distill_unet.py`: teach a student to draw in one to four steps what a trained U-Net draws in many.

    python train/distill_unet.py experiment=distill_demo
    python train/distill_unet.py run_dir=RUN guidance=[1,8]
    torchrun --nproc-per-node=8 train/distill_unet.py experiment=distill_sd1 runtime=gpu8
    """

    run_dir: str = a_path()
    name: str = MISSING
    seed: int = 0
    output_dir: str = a_path()
    teacher: str = a_path()  # folder with the exported U-Net; the student begins with its weights
    latents: str = a_path()  # folder that holds train/ and heldout/
    autoencoder: str = a_path()  # must be the one that made the latents; decodes the sample grids
    clip: str = a_path()  # must be the one that the latents' captions are of; encodes the prompts of the sample grids
    sample_prompts: int = 16  # held-out samples whose conditions are drawn at each evaluation
    method: DistillMethod = DistillMethod.lcm  # docs/distillation.md; consistency_training asks no teacher for a step
    levels: int = 50  # noise levels; the student learns from neighbours among them
    guidance: list[float] = field(default_factory=lambda: [1.0, 4.0])  # scales of the teacher's guidance, from and to
    huber: float = 0.001  # c of the pseudo-Huber distance; 0: the absolute difference
    tangent_warmup: int = 0  # samples over which method=scm takes the student's own slope into account, bit by bit
    adversarial_weight: float = 0.0  # by how much verdicts pull at a sample, where consistency pulls by 1; 0: off
    lora: LoraConfig = field(default_factory=LoraConfig)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(sampler=Sampler.lcm, steps=4))
    evaluation: LoopEvaluationConfig = field(default_factory=LoopEvaluationConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    discriminator_optim: OptimConfig = field(default_factory=OptimConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    runtime: UNetRuntimeConfig = field(default_factory=UNetRuntimeConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    @property
    def guided(self) -> list[float] | None:
        """The scales that the student is told; None where there is one for all."""
        return None if self.guidance[0] == self.guidance[1] else self.guidance

    def __post_init__(self) -> None:
        require(self.levels > 1, f"levels={self.levels}: must be 2 or more")
        require(self.huber >= 0, f"huber={self.huber}: must be 0 or positive")
        require(self.tangent_warmup >= 0, f"tangent_warmup={self.tangent_warmup}: must be 0 or positive")
        require(
            self.adversarial_weight >= 0,
            f"adversarial_weight={self.adversarial_weight}: must be 0 (off) or positive",
        )
        require(
            self.adversarial_weight == 0 or self.method is not DistillMethod.guidance,
            f"adversarial_weight={self.adversarial_weight}: method=guidance is for solvers of many steps, of which no "
            "single one draws an image to be judged; leave it out",
        )
        require(
            len(self.guidance) == 2 and 1 <= self.guidance[0] <= self.guidance[1],
            f"guidance={self.guidance}: must be two scales, [lowest,highest], of 1 or more",
        )
        require(
            self.method is not DistillMethod.guidance or self.guidance != [1.0, 1.0],
            "guidance=[1,1]: method=guidance would have nothing to teach; set guidance=[1,4]",
        )
        require(
            self.method is not DistillMethod.consistency_training or self.guidance == [1.0, 1.0],
            f"guidance={self.guidance}: method={self.method.value} has no teacher that is guided; set guidance=[1,1]",
        )
        require(
            self.lora.rank == 0 or self.guided is None,
            f"guidance={self.guidance}: adapters cannot be told a scale, lora.rank={self.lora.rank}; name one for all, "
            "such as guidance=[3,3]",
        )
