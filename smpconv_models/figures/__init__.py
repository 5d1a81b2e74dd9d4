"""Plots of learned kernels and their points, of receptive fields and heat maps, and of training runs.

matplotlib renders them without a display. `python -m smpconv_models.figures` draws plots of networks from checkpoints.
"""
try:
    import matplotlib  # noqa: F401 (names the extra to install)
except ImportError as error:
    # the name makes the error one line of python -m
    raise ImportError(
        "the figures need matplotlib: pip install 'smpconv_models[figures]'", name=__name__) from error

from ._text import drawable
from .grad_cam import heat_maps, overlay_heat_map, save_heat_maps
from .kernels import choose_layers, draw_kernel, draw_points, save_kernels
from .receptive_field import CentralSquare, central_square, effective_receptive_field, log_scaled, save_receptive_fields
from .stages import StageSum, save_stages, stage_sums
from .training import save_animation, save_confusion_matrix, save_curves, save_run

__all__ = [
    'CentralSquare', 'StageSum', 'central_square', 'choose_layers', 'draw_kernel', 'draw_points', 'drawable',
    'effective_receptive_field', 'heat_maps', 'log_scaled', 'overlay_heat_map', 'save_animation',
    'save_confusion_matrix', 'save_curves', 'save_heat_maps', 'save_kernels', 'save_receptive_fields', 'save_run',
    'save_stages', 'stage_sums',
]
