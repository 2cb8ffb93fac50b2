"""The command that runs the others."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.overrides import a_path


@dataclass(kw_only=True, slots=True)
class PipelineRun:
    """`train/pipeline.py`: all stages; each takes its own options as STAGE.option=value."""

    run_dir: str = a_path()
    name: str = MISSING
    seed: int = 0
    processes: int = 1  # processes per training stage, started with torchrun
    stages: list[str] = field(  # those to run; always in this order
        default_factory=lambda: ["build", "autoencoder", "clip", "latents", "unet", "sample", "evaluate"]
    )
    overrides: dict[str, list[str]] = field(default_factory=dict)  # filled in from STAGE.option=value
