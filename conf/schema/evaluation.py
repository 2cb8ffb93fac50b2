"""The command that measures what was trained, and its small form inside a training."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from conf.overrides import a_path
from conf.schema.choices import EvaluationSubject, JudgeName, Perceptual
from conf.schema.sampling import ModelRun
from conf.schema.shared import (
    ImageConfig,
    WandbConfig,
    require,
    require_positive,
)

FEWEST = 4  # images; precision and recall need three neighbours of each
FEWEST_INCEPTION = 10  # likewise; the Inception Score has ten splits


def require_enough(what: str, count: int, inception: str | None) -> None:
    """Refuse before the work so few images as a metric would refuse after it."""
    fewest, given = (FEWEST, "") if inception is None else (FEWEST_INCEPTION, " with inception")
    require(count >= fewest, f"{what}: the metrics need at least {fewest} images{given}")


@dataclass(kw_only=True, slots=True)
class LoopEvaluationConfig:
    """Metrics `eval/loop/…` at each evaluation of a U-Net's training; few images, so they only show the direction."""

    samples: int = 0  # images drawn of held-out captions, with `sampling`; 0: none, and shards are not needed
    shards: str = a_path()  # folder whose heldout/ has the captions and the real images
    statistics_dir: str = a_path()  # where what was measured of real images is kept
    inception: str | None = a_path(None)  # file with the Inception weights of the FID; None: only fd_efficientnet
    batch_size: int = 32  # images made together

    def __post_init__(self) -> None:
        require(self.samples >= 0, f"evaluation.samples={self.samples}: must be 0 (off) or positive")
        if self.samples:
            require_enough(f"evaluation.samples={self.samples}", self.samples, self.inception)
        require_positive(self, "batch_size", group="evaluation.")


@dataclass(kw_only=True, slots=True)
class EvaluateRun(ModelRun):
    """`train/evaluate.py`: images of held-out prompts, or those that an autoencoder gives back, against real ones.

    python train/evaluate.py experiment=demo run_dir=runs/demo
    python train/evaluate.py experiment=demo subject=autoencoder
    python train/evaluate.py -m experiment=demo guidance_scale=1,3 sampler=ddim,dpmpp_2m
    """

    output_dir: str = a_path()
    subject: EvaluationSubject = EvaluationSubject.unet  # what is evaluated
    shards: str = a_path()
    captions: str = a_path()  # folder of image shards: its captions are drawn, or its images given back
    reference: str = a_path()  # real images: a folder of image shards, or statistics in a .safetensors or .npz file
    others: str | None = a_path(
        None
    )  # more of them, a folder of shards: how many lie nearer to reference than to these?
    statistics_dir: str = a_path()  # where what was measured of real images is kept
    unet: str = a_path()  # folder with the exported U-Net; with watch=true the one that its training will write
    images: ImageConfig = field(default_factory=ImageConfig)
    samples: int = 128  # images; a caption is drawn again, with other noise, where there are fewer
    batch_size: int = 32  # images made together
    inception: str | None = a_path(None)  # file with the Inception weights of the FID; None: only offline metrics
    clip_score: str | None = a_path(None)  # CLIP that compares images with captions: folder, or open_clip's NAME/TAG
    perceptual: Perceptual = Perceptual.efficientnet  # distance between an image and its original
    prompt_following: bool = False  # train the probe and score kind, background and colour (demo set only)
    judges: list[JudgeName] = field(default_factory=list)  # of labels that images are drawn of: each trains a probe
    bootstrap: int = 50  # sets drawn again for the 95 % interval of a Fréchet distance; 0: no interval
    watch: bool = False  # evaluate the checkpoints of a training as they appear, until it is finished
    watch_s: float = 30.0  # seconds between two looks
    wandb: WandbConfig = field(default_factory=WandbConfig)  # without wandb.name: the training's own W&B run

    def __post_init__(self) -> None:
        ModelRun.__post_init__(self)
        require(self.lora is None or not self.watch, "lora: goes with an export; leave it out with watch=true")
        require_positive(self, "batch_size", "watch_s")
        require_enough(f"samples={self.samples}", self.samples, self.inception)
        require(self.bootstrap == 0 or self.bootstrap > 1, f"bootstrap={self.bootstrap}: must be 0 (off) or above 1")
        if self.subject is EvaluationSubject.autoencoder:
            for option in ("watch", "prompt_following", "judges", "clip_score", "lora"):
                require(not getattr(self, option), f"{option}: is for a U-Net; leave it out with subject=autoencoder")
        files = [path for path in (self.reference, self.others or "") if path.endswith((".npz", ".safetensors"))]
        require(
            self.others is None or not files,
            f"others={self.others}: compares with single images; make reference and others folders of image shards",
        )
        require(
            self.inception is not None or not self.reference.endswith(".npz"),
            f"reference={self.reference}: holds statistics of Inception's features; set inception=PATH",
        )
        names = [judge.value for judge in self.judges]
        require(len(set(names)) == len(names), f"judges={names}: names one twice")


# The group `subject`: chosen after experiment and protocol, so that what these say of a U-Net is not asked of another.
SUBJECTS: dict[EvaluationSubject, dict[str, Any]] = {
    EvaluationSubject.unet: {"output_dir": "${run_dir}/evaluation"},
    EvaluationSubject.autoencoder: {
        "output_dir": "${run_dir}/autoencoder_evaluation",
        "prompt_following": False,
        "clip_score": None,
    },
}
for _subject, _options in SUBJECTS.items():
    _node = {"subject": _subject.value, **_options}
    ConfigStore.instance().store(group="subject", name=_subject.value, node=_node, package="_global_")
