"""The sizes that a checkpoint's kernels were trained at, and how they are drawn at others."""
import math
from typing import Any, Dict, List, Sequence, Union

from torch import Tensor

from smpconv_models import checkpoint
from smpconv_models.layers.checks import check_odd


def resampled(
        weights: Dict[str, Tensor],
        own: Sequence[int],
        kernel_sizes: Sequence[int],
        points_divisor: int,
        kernel_scale: Union[float, Sequence[float]] = 1.,
        **kwargs: Any,
) -> Dict[str, Any]:
    """The arguments with which kernels of other sizes than the weights' are drawn from the weights' points.

    Args:
        weights: The state dict, of the original release's names or ours.
        own: The model's sizes without the user's wishes.
        kernel_sizes: The user's, of each stage.
        points_divisor: Of the constructor.
        kernel_scale: Of the constructor; must be left at 1 where the sizes are others than the weights'.

    Raises:
        ValueError: Even sizes, or sizes and a scale.
    """
    for size in kernel_sizes:
        check_odd(size)
    points = _points(weights)
    if list(kernel_sizes) == list(own) or len(kernel_sizes) != len(points) or points_divisor < 1:
        return {}
    trained = next(
        (sizes for sizes in (kernel_sizes, own, _sides(points, points_divisor))
         if [size ** 2 // points_divisor for size in sizes] == points), None)
    if trained is None or list(trained) == list(kernel_sizes):  # other weights are told when they are loaded
        return {}
    if kernel_scale != 1:
        raise ValueError(f'kernel_sizes {kernel_sizes}, other than the weights\' {trained}, contradict kernel_scale')
    return {
        'kernel_sizes': trained,
        'kernel_scale': [(size - 1) / max(base - 1, 1) for size, base in zip(kernel_sizes, trained)],
    }


def _points(weights: Dict[str, Tensor]) -> List[int]:
    """Of the kernels of each stage."""
    if checkpoint.is_original(weights):
        weights = checkpoint.convert_original(weights)
    found: List[int] = []
    while (name := f'stages.{len(found)}.blocks.0.mixer.large_kernel.large.conv.coords') in weights:
        found.append(len(weights[name]))
    return found


def _sides(points: Sequence[int], points_divisor: int) -> List[int]:
    """The smallest odd sides of kernels with as many points."""
    return [(math.isqrt(max(count * points_divisor, 1) - 1) + 1) | 1 for count in points]
