"""Training on timm's parts, and what they lack: radii at their own rate and in their range, exact resume."""
from .data import Digits
from .evaluate import evaluate
from .failures import explain
from .optim import param_groups
from .run import set_up
from .signals import Stopped
from .train import train
from .validate import validate
from .world import World

__all__ = ['Digits', 'Stopped', 'World', 'evaluate', 'explain', 'param_groups', 'set_up', 'train', 'validate']
