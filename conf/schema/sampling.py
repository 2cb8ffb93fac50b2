"""Between noise and images: the options of every command that draws, and the networks that it draws with."""

import math
from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.overrides import PATH, TEXT, a_path, a_text
from conf.schema.choices import WITH_ETA, CacheDtype, ExportFormat, Sampler, Spacing, Weighting
from conf.schema.shared import RuntimeConfig, require, require_positive


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """From noise to images."""

    sampler: Sampler = Sampler.dpmpp_2m  # docs/sampling.md compares them
    steps: int = 30  # per image; heun, dpm2 and dpmpp_2s call the network twice in each
    eta: float | None = None  # noise that ddim, euler_ancestral and the SDE samplers add, 0-1; None: 0 for ddim, else 1
    spacing: Spacing = Spacing.trailing  # of the noise levels: by timesteps, or by the levels themselves
    shift: float | None = None  # factor of a flow's noise levels; None: that of the training
    guidance_scale: float = 3.0  # 1: no classifier-free guidance
    guidance_rescale: float = 0.0  # 0-1: how far guidance keeps the contrast that the image has without it
    guidance_interval: list[float] = field(default_factory=list)  # noise levels std/alpha, [above, up to]; []: all
    negative_prompt: str = a_text("")  # what guidance leads away from, instead of the empty caption
    size: list[int] = field(default_factory=list)  # pixels, [height, width]; []: as in training, or as a given image
    prompt_syntax: bool = False  # read (words:1.3), [words] and AND in prompts; False: prompts are plain text
    weighting: Weighting = Weighting.difference  # what a word's weight multiplies: difference it makes, or its tokens

    def __post_init__(self) -> None:
        require_positive(self, "steps")
        require(self.shift is None or self.shift > 0, f"shift={self.shift}: must be positive")
        require(self.eta is None or 0 <= self.eta <= 1, f"eta={self.eta}: must be in [0, 1]")
        allowed = ", ".join(sorted(sampler.value for sampler in WITH_ETA))
        require(
            self.eta is None or self.sampler in WITH_ETA,
            f"eta={self.eta}: sampler={self.sampler.value} has none; choose {allowed}, or eta=null",
        )
        require(
            self.size == [] or (len(self.size) == 2 and min(self.size) > 0),
            f"size={self.size}: must be two numbers of pixels, [height,width], or []",
        )
        rescale, interval = self.guidance_rescale, self.guidance_interval
        require(0 <= rescale <= 1, f"guidance_rescale={rescale}: must be in [0, 1]")
        require(
            interval == [] or (len(interval) == 2 and 0 <= interval[0] < interval[1]),
            f"guidance_interval={interval}: must be two noise levels, [lower,higher], or []",
        )
        for option in ("guidance_rescale", "guidance_interval", "negative_prompt"):
            require(
                self.guidance_scale != 1 or not getattr(self, option),
                f"{option}: without effect at guidance_scale=1; set another scale",
            )


@dataclass(kw_only=True, slots=True)
class ModelRun(SamplingConfig):
    """What the commands share that draw with a trained model."""

    run_dir: str = a_path()
    name: str = MISSING
    seed: int = 0  # of the noise; image i of a prompt uses (seed, prompt, i)
    unet: str = a_path()  # folder with the exported U-Net
    lora: str | None = a_path(None)  # adapters that are merged into it: a .safetensors file, or a folder that holds one
    lora_scale: float = 1.0  # factor on what they add to the weights
    autoencoder: str = a_path()
    clip: str = a_path()
    tile: int = 0  # pixels: larger images are decoded in overlapping squares of this side, one at a time; 0: whole
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        SamplingConfig.__post_init__(self)
        scale = self.lora_scale
        require(math.isfinite(scale), f"lora_scale={scale}: must be a number, such as 0.8")
        require(self.lora is not None or scale == 1, f"lora_scale={scale}: without effect; set lora=FOLDER as well")


@dataclass(kw_only=True, slots=True)
class SampleRun(ModelRun):
    """`train/sample.py`: prompts to PNGs, a captioned grid and a film strip.

    python train/sample.py run_dir=runs/demo prompts="a red planet on a navy background"
    python train/sample.py run_dir=runs/demo prompts_file=prompts.txt images_per_prompt=4
    python train/sample.py run_dir=runs/demo prompts_from=runs/demo/shards/heldout sampler=unipc steps=12
    """

    output_dir: str = a_path()
    prompts: list[str] = field(default_factory=list, metadata=TEXT)  # one, or '["one","two"]'; or classes, boxes
    prompts_file: str | None = a_path(None)  # a text file, one prompt a line
    prompts_from: str | None = a_path(None)  # folder of shards, such as RUN/shards/heldout: its captions are prompts
    inputs: list[str] = field(
        default_factory=list, metadata=TEXT | PATH
    )  # files; each with KEY.mask.png, KEY.txt … beside it
    prompts_from_samples: int = 64  # of that folder, from its first sample on; 0: all
    images_per_prompt: int = 1  # images drawn of each prompt
    film_frames: int = 0  # of film.png, which shows guesses of the image from the first step to the last; 0: no film
    batch_size: int = 32  # images made together; changes no image
    prompt_syntax: bool = True

    def __post_init__(self) -> None:
        ModelRun.__post_init__(self)
        require_positive(self, "images_per_prompt", "batch_size")
        given = self.prompts or self.prompts_file or self.prompts_from or self.inputs
        require(bool(given), 'no prompts: set prompts=["..."], prompts_file=FILE, prompts_from=FOLDER or inputs=[FILE]')
        samples, frames = self.prompts_from_samples, self.film_frames
        require(samples >= 0, f"prompts_from_samples={samples}: must be 0 (all) or positive")
        require(frames == 0 or frames > 1, f"film_frames={frames}: must be 0 (no film), or 2 or more")


@dataclass(kw_only=True, slots=True)
class PlaygroundRun(ModelRun):
    """`train/playground.py`: a page on which one draws images and edits them; it begins with these options.

    python train/playground.py run_dir=runs/demo
    python train/playground.py run_dir=runs/demo/export
    python train/playground.py run_dir=runs/demo host=0.0.0.0 port=8000
    """

    run_dir: str = a_path()  # a run, or a folder with a model_index.json: an export, or one in the format of the Hub
    steps: int = 10  # a first look; the page has more
    examples: str = a_path()  # folder of image shards, whose first captions are offered as prompts if it is there
    film_frames: int = 8  # of the strip that shows an image on its way out of the noise
    host: str = "127.0.0.1"  # address to listen on: this machine's own; 0.0.0.0 lets in everybody who can reach it
    port: int = 7860  # to listen on; 0: any free one
    queue: int = 16  # images that wait while one is drawn, at most; who asks for more is told to come back

    def __post_init__(self) -> None:
        ModelRun.__post_init__(self)
        require_positive(self, "queue")
        require(self.film_frames > 1, f"film_frames={self.film_frames}: must be 2 or more")
        require(0 <= self.port < 2**16, f"port={self.port}: must be in [0, 65535]")


@dataclass(kw_only=True, slots=True)
class ExportRun:
    """`train/export.py`: a trained model as other programs load it.

    python train/export.py run_dir=runs/demo
    python train/export.py run_dir=runs/demo format=compvis
    python train/export.py run_dir=runs/demo dtype=fp16 output_dir=weights/demo
    """

    run_dir: str = a_path()
    name: str = MISSING
    output_dir: str = a_path()
    unet: str = a_path()
    autoencoder: str = a_path()
    clip: str = a_path()
    format: ExportFormat = ExportFormat.diffusers  # compvis: one file OUTPUT_DIR.safetensors
    dtype: CacheDtype = CacheDtype.fp32  # of the weights on disk


@dataclass(kw_only=True, slots=True)
class AverageRun:
    """`train/average.py`: an export of the U-Net with another average of its weights.

    python train/average.py run_dir=runs/demo sigma_rel=0.08
    python train/average.py run_dir=runs/demo half_life_samples=50000
    python train/average.py run_dir=runs/demo sigma_rel=0.05 samples_seen=20000
    """

    run_dir: str = a_path()
    name: str = MISSING
    output_dir: str = a_path()
    trained: str = a_path()  # folder of the U-Net's training, which is finished
    sigma_rel: float | None = None  # width relative to the run, of an average put together from those of ema.posthoc
    half_life_samples: float | None = None  # instead: one of ema.half_life_samples and ema.more_half_lives
    samples_seen: int | None = None  # moment in the run; None: its end, or the newest checkpoint

    def __post_init__(self) -> None:
        require(
            (self.sigma_rel is None) != (self.half_life_samples is None),
            "which average: set either sigma_rel, such as 0.08, or half_life_samples",
        )
        require(self.sigma_rel is None or 0 < self.sigma_rel < 0.28, f"sigma_rel={self.sigma_rel}: in (0, 0.28)")
