"""The config of a run: frozen dataclasses, read from one YAML file and checked before anything is built."""

from .conditioners import ConditionersConfig, Network
from .schema import (
    AutoencoderConfig,
    DataConfig,
    DataOptions,
    DoctorConfig,
    LoopConfig,
    ObjectiveConfig,
    OptimConfig,
    PathName,
    PredictionType,
    ReconstructionConfig,
    RunConfig,
    SamplerConfig,
    SourceName,
    SpaceConfig,
    StageConfig,
    ValidationConfig,
)

__all__ = [
    "AutoencoderConfig",
    "ConditionersConfig",
    "DataConfig",
    "DataOptions",
    "DoctorConfig",
    "LoopConfig",
    "Network",
    "ObjectiveConfig",
    "OptimConfig",
    "PathName",
    "PredictionType",
    "ReconstructionConfig",
    "RunConfig",
    "SamplerConfig",
    "SourceName",
    "SpaceConfig",
    "StageConfig",
    "ValidationConfig",
]
