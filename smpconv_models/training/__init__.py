"""Training on timm's parts, and what they lack: radii at their own rate and in their range, exact resume."""
from . import config, options
from .data import Digits
from .evaluate import evaluate
from .failures import explain
from .optim import param_groups
from .output import replacing
from .run import set_up
from .signals import Stopped
from .train import train
from .validate import measure, save_classes, save_confusion, save_results, series, validate
from .world import World

__all__ = [
    'Digits', 'Stopped', 'World', 'config', 'evaluate', 'explain', 'measure', 'options', 'param_groups', 'replacing',
    'save_classes', 'save_confusion', 'save_results', 'series', 'set_up', 'train', 'validate',
]
