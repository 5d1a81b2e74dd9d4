"""Training on timm's parts, and what they lack: radii at their own rate and in their range, an embedded data set."""
from .data import Digits
from .evaluate import evaluate, validate
from .optim import param_groups
from .train import create_folder, set_up, train

__all__ = ['Digits', 'create_folder', 'evaluate', 'param_groups', 'set_up', 'train', 'validate']
