"""Every option of every command: name, type, unit, default and the checks that join two of them.

YAML files in this folder only select and override; a name that is not here is refused. Sizes that count progress are
in samples, so that neither the batch nor the number of processes moves a schedule. `__post_init__` runs when a command
turns its composed configuration into these objects, before torch is imported.
"""

from conf.schema.choices import (
    DRAWN,
    STOCHASTIC,
    Accelerator,
    Adversarial,
    BackendName,
    BetaSchedule,
    CacheDtype,
    Crop,
    Degradation,
    Device,
    Distance,
    EditMode,
    EvaluationSubject,
    ExportFormat,
    ImageFormat,
    JudgeName,
    LrDecay,
    MaskStyle,
    Offload,
    Perceptual,
    Precision,
    Prediction,
    Reconstruction,
    Sampler,
    Source,
    Spacing,
    TimestepSampling,
    WandbMode,
)
from conf.schema.conditions import ConditionsConfig
from conf.schema.data import BucketConfig, BuildRun, FilterConfig, MixedSource, PrecomputeRun, PreviewRun
from conf.schema.drawing import ModelRun, SamplingConfig
from conf.schema.editing import Edit, EditRun
from conf.schema.evaluation import EvaluateRun, LoopEvaluationConfig
from conf.schema.pipeline import PipelineRun
from conf.schema.planning import PlanRun
from conf.schema.reporting import DashboardRun, ReportRun
from conf.schema.sampling import AverageRun, ExportRun, PlaygroundRun, SampleRun
from conf.schema.sections import (
    BatchConfig,
    EmaConfig,
    ImageConfig,
    LoopConfig,
    OptimConfig,
    ProcessConfig,
    RuntimeConfig,
    StreamConfig,
    WandbConfig,
)
from conf.schema.training import AutoencoderLossConfig, AutoencoderRun, ClipRun, LoraConfig, UNetRun

__all__ = [
    "DRAWN",
    "STOCHASTIC",
    "Accelerator",
    "Adversarial",
    "AutoencoderLossConfig",
    "AutoencoderRun",
    "AverageRun",
    "BackendName",
    "BatchConfig",
    "BetaSchedule",
    "BucketConfig",
    "BuildRun",
    "CacheDtype",
    "ClipRun",
    "ConditionsConfig",
    "Crop",
    "DashboardRun",
    "Degradation",
    "Device",
    "Distance",
    "Edit",
    "EditMode",
    "EditRun",
    "EmaConfig",
    "EvaluateRun",
    "EvaluationSubject",
    "ExportFormat",
    "ExportRun",
    "FilterConfig",
    "ImageConfig",
    "ImageFormat",
    "JudgeName",
    "LoopConfig",
    "LoopEvaluationConfig",
    "LoraConfig",
    "LrDecay",
    "MaskStyle",
    "MixedSource",
    "ModelRun",
    "Offload",
    "OptimConfig",
    "Perceptual",
    "PipelineRun",
    "PlanRun",
    "PlaygroundRun",
    "Precision",
    "PrecomputeRun",
    "Prediction",
    "PreviewRun",
    "ProcessConfig",
    "Reconstruction",
    "ReportRun",
    "RuntimeConfig",
    "SampleRun",
    "Sampler",
    "SamplingConfig",
    "Source",
    "Spacing",
    "StreamConfig",
    "TimestepSampling",
    "UNetRun",
    "WandbConfig",
    "WandbMode",
]
