"""Commands that use a trained model."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.overrides import PATH, TEXT, a_path
from conf.schema.choices import CacheDtype, ExportFormat
from conf.schema.drawing import ModelRun
from conf.schema.sections import require, require_positive


@dataclass(kw_only=True, slots=True)
class SampleRun(ModelRun):
    """`train/sample.py`: prompts to PNGs, a captioned grid and a film strip."""

    output_dir: str = a_path()
    prompts: list[str] = field(default_factory=list, metadata=TEXT)  # one, or '["one","two"]'; or classes, boxes
    prompts_file: str | None = a_path(None)  # a text file, one prompt a line
    prompts_from: str | None = a_path(None)  # folder of shards, such as RUN/shards/heldout: its captions are prompts
    inputs: list[str] = field(
        default_factory=list, metadata=TEXT | PATH
    )  # files; each with KEY.mask.png, KEY.txt … beside it
    prompts_from_samples: int = 64  # of that folder, from its first sample on; 0: all
    images_per_prompt: int = 1  # pictures drawn of each prompt
    film_frames: int = 0  # of film.png, which shows guesses of the picture from the first step to the last; 0: no film
    batch_size: int = 32  # pictures made together; changes no picture
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
    """`train/playground.py`: a page on which one draws pictures and edits them; it begins with these options."""

    run_dir: str = a_path()  # a run, or a folder with a model_index.json: an export, or one in the format of the Hub
    examples: str = a_path()  # folder of image shards, whose first captions are offered as prompts if it is there
    film_frames: int = 8  # of the strip that shows a picture on its way out of the noise
    host: str = "127.0.0.1"  # address to listen on: this machine's own; 0.0.0.0 lets in everybody who can reach it
    port: int = 7860  # to listen on; 0: any free one
    queue: int = 16  # pictures that wait while one is drawn, at most; who asks for more is told to come back

    def __post_init__(self) -> None:
        ModelRun.__post_init__(self)
        require_positive(self, "queue")
        require(self.film_frames > 1, f"film_frames={self.film_frames}: must be 2 or more")
        require(0 <= self.port < 2**16, f"port={self.port}: must be in [0, 65535]")


@dataclass(kw_only=True, slots=True)
class ExportRun:
    """`train/export.py`: a trained model as other programs load it."""

    run_dir: str = a_path()
    name: str = MISSING
    seed: int = 0
    output_dir: str = a_path()
    unet: str = a_path()
    autoencoder: str = a_path()
    clip: str = a_path()
    format: ExportFormat = ExportFormat.diffusers  # compvis: one file OUTPUT_DIR.safetensors
    dtype: CacheDtype = CacheDtype.fp32  # of the weights on disk


@dataclass(kw_only=True, slots=True)
class AverageRun:
    """`train/average.py`: an export of the U-Net with another average of its weights."""

    run_dir: str = a_path()
    name: str = MISSING
    seed: int = 0
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
