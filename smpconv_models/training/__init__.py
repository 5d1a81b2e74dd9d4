"""Training on timm's parts, with what they lack: a learning rate and a range of the radii, and exact resuming."""
from ..data.images import Digits
from ..utils.atomic_io import atomic_write
from . import cli
from .config import (
    AugmentationOptions,
    CheckpointOptions,
    DataOptions,
    DebugOptions,
    DeviceOptions,
    EMAOptions,
    LoggingOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    ScheduleOptions,
    TrainOptions,
    ineffective_options,
)
from .distributed import DistributedContext, TrainingInterrupted
from .factory import param_groups
from .logger import describe_error
from .trainer import Trainer, build_trainer
from .validate import (
    EvalOptions,
    evaluate,
    evaluate_model,
    expand_model_list,
    save_confusion_matrix,
    save_per_class_results,
    save_results,
)

__all__ = [
    'AugmentationOptions', 'CheckpointOptions', 'DataOptions', 'DebugOptions', 'DeviceOptions', 'Digits',
    'DistributedContext', 'EMAOptions', 'EvalOptions', 'LoggingOptions', 'ModelOptions', 'OptimizerOptions',
    'RunOptions', 'ScheduleOptions', 'TrainOptions', 'Trainer', 'TrainingInterrupted', 'atomic_write',
    'build_trainer', 'cli', 'describe_error', 'evaluate', 'evaluate_model', 'expand_model_list',
    'ineffective_options', 'param_groups', 'save_confusion_matrix', 'save_per_class_results', 'save_results',
]
