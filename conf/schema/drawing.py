"""Between noise and pictures: the options of every command that draws, and the networks that it draws with."""

import math
from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.overrides import a_path, a_text
from conf.schema.choices import WITH_ETA, Sampler, Spacing
from conf.schema.sections import RuntimeConfig, require, require_positive


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """From noise to pictures."""

    sampler: Sampler = Sampler.dpmpp_2m  # docs/sampling.md compares them
    steps: int = 30  # per picture; heun, dpm2 and dpmpp_2s call the network twice in each
    eta: float | None = None  # noise that ddim, euler_ancestral and the SDE samplers add, 0-1; None: 0 for ddim, else 1
    spacing: Spacing = Spacing.trailing  # of the noise levels: by timesteps, or by the levels themselves
    shift: float | None = None  # factor of a flow's noise levels; None: that of the training
    guidance_scale: float = 3.0  # 1: no classifier-free guidance
    guidance_rescale: float = 0.0  # 0-1: how far guidance keeps the contrast that the picture has without it
    guidance_interval: list[float] = field(default_factory=list)  # noise levels std/alpha, [above, up to]; []: all
    negative_prompt: str = a_text("")  # what guidance leads away from, instead of the empty caption
    size: list[int] = field(default_factory=list)  # pixels, [height, width]; []: as in training, or as a given picture
    prompt_syntax: bool = False  # read (words:1.3), [words] and AND in prompts; False: prompts are plain text

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
    seed: int = 0  # of the noise; picture i of a prompt uses (seed, prompt, i)
    unet: str = a_path()  # folder with the exported U-Net
    lora: str | None = a_path(None)  # adapters that are merged into it: a .safetensors file, or a folder that holds one
    lora_scale: float = 1.0  # factor on what they add to the weights
    autoencoder: str = a_path()
    clip: str = a_path()
    tile: int = 0  # pixels: larger pictures are decoded in overlapping squares of this side, one at a time; 0: whole
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        SamplingConfig.__post_init__(self)
        scale = self.lora_scale
        require(math.isfinite(scale), f"lora_scale={scale}: must be a number, such as 0.8")
        require(self.lora is not None or scale == 1, f"lora_scale={scale}: without effect; set lora=FOLDER as well")
