"""Commands that show what a run has done."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.overrides import a_path
from conf.schema.sections import WandbConfig, require_positive


@dataclass(kw_only=True, slots=True)
class ReportRun:
    """`train/report.py`: a run folder as one page that needs nothing else."""

    run_dir: str = a_path()
    name: str = MISSING
    seed: int = 0
    output_dir: str = a_path()  # where report.html is written
    shards: str = a_path()  # folder that holds train/ and heldout/
    frames: int = 24  # pictures behind each slider, at most, spread over the training
    pictures_mb: float = 9.0  # megabytes of all pictures on the page; with it they get smaller
    samples: int = 2_000  # behind the statistics of the data set, at most

    def __post_init__(self) -> None:
        require_positive(self, "frames", "pictures_mb", "samples")


@dataclass(kw_only=True, slots=True)
class DashboardRun:
    """`train/dashboard.py`: the W&B workspace of a run, as a file and on the server."""

    run_dir: str = a_path()
    name: str = MISSING
    seed: int = 0
    output_dir: str = a_path()  # where dashboard.json is written
    save: bool = False  # put the workspace on the W&B server, too; needs `wandb login`
    wandb: WandbConfig = field(default_factory=WandbConfig)
