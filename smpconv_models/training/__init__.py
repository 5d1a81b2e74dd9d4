"""Training on timm's parts, and what they lack: radii at their own rate and in their range, exact resume."""
from ..utils.atomic_io import atomic_write
from . import cli, config
from .data_config import Digits
from .distributed import DistributedContext
from .errors import describe_error
from .metrics import evaluate
from .optim import param_groups
from .signals import TrainingInterrupted
from .train import train
from .trainer import build_trainer
from .validate import measure, save_confusion_matrix, save_per_class_results, save_results, series, validate

__all__ = [
    'Digits',
    'DistributedContext',
    'TrainingInterrupted',
    'atomic_write',
    'build_trainer',
    'cli',
    'config',
    'describe_error',
    'evaluate',
    'measure',
    'param_groups',
    'save_confusion_matrix',
    'save_per_class_results',
    'save_results',
    'series',
    'train',
    'validate',
]
