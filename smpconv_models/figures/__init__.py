"""Pictures: learned kernels and their points, what a network looks at, training runs. Drawn off screen, by matplotlib.

`python -m smpconv_models.figures` draws those of networks from checkpoints.
"""
try:
    import matplotlib  # noqa: F401 (says what is missing where it is)
except ImportError as error:
    raise ImportError("the figures need matplotlib: pip install 'smpconv_models[figures]'") from error

from .animation import save_animation
from .confusion import save_confusion_matrix
from .grad_cam import heat_maps, save_heat_maps
from .kernels import choose_layers, draw_kernel, draw_points, save_kernels
from .receptive_field import effective_receptive_field, log_scaled, save_receptive_fields
from .squares import CentralSquare, central_square
from .stages import StageSum, save_stages, stage_sums
from .training import save_curves, save_run

__all__ = [
    'CentralSquare', 'StageSum', 'central_square', 'choose_layers', 'draw_kernel', 'draw_points',
    'effective_receptive_field', 'heat_maps', 'log_scaled', 'save_animation', 'save_confusion_matrix', 'save_curves',
    'save_heat_maps', 'save_kernels', 'save_receptive_fields', 'save_run', 'save_stages', 'stage_sums',
]
