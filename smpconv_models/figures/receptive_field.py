"""Effective receptive field: contribution of each pixel to the middle of the last feature map, and its area."""
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from tqdm import tqdm

# Shares of the contributions that RepLKNet tabulates.
SHARES = (0.2, 0.3, 0.5, 0.99)
_COLORS = ('#d62728', '#ff7f0e', '#2ca02c', '#1f77b4')


def effective_receptive_field(model: nn.Module, images: Tensor) -> np.ndarray:
    """Return how much each pixel contributes to the middle of the last feature map, by the gradient.

    The definition is RepLKNet's (https://arxiv.org/abs/2203.06717, appendix), after Luo et al. 2016
    (https://arxiv.org/abs/1701.04128): the positive part of the gradient of ``sum_c relu(y[c, H' // 2, W' // 2])`` with
    respect to the image, summed over the image's channels and averaged over the images. y is the output of
    ``forward_features``, which timm networks have, or of the model if it has no such method.

    Args:
        model: Model in evaluation mode. No gradient is left in its parameters.
        images: Inputs of the model, ``(N, C, H, W)``; processed one by one.

    Returns:
        Map of shape ``(H, W)`` in float64, not negative.

    Raises:
        ValueError: If the model is in training mode, cannot take the images or has no feature map ``(N, C, H', W')``;
            if there are no images; if features or gradient are not finite, or no pixel contributes.
    """
    check_inputs(model, images)
    total = torch.zeros(images.shape[-2:], dtype=torch.float64)
    for image in tqdm(images, desc='receptive field', unit='image', leave=False, disable=None):
        total += _contributions(model, image[None]).double().cpu()
    if not total.isfinite().all():
        raise ValueError('the gradient is not finite')
    if not total.any():
        raise ValueError('nothing contributes to the middle of the last feature map: its activations are not positive')
    return (total / len(images)).numpy()


def log_scaled(field: np.ndarray) -> np.ndarray:
    """Return ``log10(1 + field)`` over its largest value, the scale of RepLKNet's plots and areas."""
    scaled = np.log10(field + 1)
    return scaled / scaled.max()


class CentralSquare(NamedTuple):
    """Smallest central square that holds a share of a map.

    Attributes:
        side: Side in elements, odd; 1 is the central element alone.
        area: Part of the map's area that the square covers, in (0, 1].
    """
    side: int
    area: float

    def __str__(self) -> str:
        return f'{self.side}x{self.side}'


def central_square(values: np.ndarray, share: float) -> CentralSquare:
    """Return the smallest square about the element ``(H // 2, W // 2)`` that holds at least this share of the sum.

    The square is cropped at the borders of the map. For the map of :func:`effective_receptive_field`, scaled by
    :func:`log_scaled`, its area is RepLKNet's high-contribution area ratio; RepLKNet's squares start at a side of 3.

    Args:
        values: Map of shape ``(H, W)``, not negative.
        share: Share of the sum, in (0, 1].

    Raises:
        ValueError: If the share or the shape is another, or values are negative, infinite or all zero.
    """
    if not 0 < share <= 1:
        raise ValueError(f'share must lie in (0, 1], got {share}')
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f'expected a map of shape (H, W), got {values.shape}')
    if not np.isfinite(values).all() or values.min() < 0 or values.max() <= 0:
        raise ValueError('expected a map of finite values that are not negative, and not all zero')
    height, width = values.shape
    rows, columns = abs(np.arange(height) - height // 2), abs(np.arange(width) - width // 2)
    distance = np.maximum(rows[:, None], columns[None])
    cumulative = np.bincount(distance.ravel(), weights=values.ravel()).cumsum()
    # its last element is the whole sum, whatever the rounding
    half_side = min(int(np.searchsorted(cumulative, share * cumulative[-1])), len(cumulative) - 1)
    return CentralSquare(2 * half_side + 1, float((distance <= half_side).mean()))


def save_receptive_fields(path: Union[str, Path], fields: Mapping[str, np.ndarray]) -> None:
    """Save a PNG of effective receptive fields side by side, with the central squares that hold shares of them.

    Colors are logarithmic, from the largest value of each field down to a ten-thousandth of it.

    Args:
        path: Path of the file to write.
        fields: Maps of :func:`effective_receptive_field` by label.

    Raises:
        ValueError: If a map has another shape, or values that are negative, infinite or all zero.
    """
    figure = Figure(figsize=(4.2 * len(fields) + 1, 5.2), layout='compressed')
    grid = figure.subplots(1, len(fields), squeeze=False)
    picture: Any = None
    for axes, (name, field) in zip(grid[0], fields.items()):
        picture = axes.imshow(
            np.maximum(field / field.max(), 1e-4), cmap='Greys', norm=LogNorm(1e-4, 1), interpolation='nearest')
        height, width = field.shape
        for share, color in zip(SHARES, _COLORS):
            square = central_square(field, share)
            corner = (width // 2 - square.side / 2, height // 2 - square.side / 2)
            axes.add_patch(Rectangle(
                corner, square.side, square.side, fill=False, edgecolor=color, linewidth=1.5,
                label=f'{100 * share:.0f} % of the contributions in {square}: {100 * square.area:.1f} % of the area'))
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
        axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.01), fontsize=8, handlelength=1, frameon=False)
        axes.set_title(f'{name} ({height}x{width} pixels)', fontsize=10, parse_math=False)
    figure.colorbar(picture, ax=grid, label='contribution over the largest', shrink=0.8)
    figure.savefig(path, dpi=130, format='png')


def check_inputs(model: nn.Module, images: Tensor) -> None:
    """Raise ValueError if the model is in training mode or there are no images."""
    if model.training:
        raise ValueError('the model must be in evaluation mode: call model.eval()')
    if len(images) == 0:
        raise ValueError('expected at least one image, got none')


def forward_or_raise(function: Callable[[Tensor], Any], images: Tensor) -> Any:
    """Return ``function(images)``; raise ValueError if the network cannot take images of this shape."""
    try:
        return function(images)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as error:  # networks report an unsupported size by these
        shape = tuple(images.shape[1:])
        raise ValueError(f'the model cannot take images of {shape}: {str(error).splitlines()[0]}') from error


def _contributions(model: Any, image: Tensor) -> Tensor:
    image = image.detach().clone().requires_grad_()
    with torch.enable_grad():
        features = forward_or_raise(getattr(model, 'forward_features', model), image)
        channels = getattr(model, 'num_features', None)
        if not isinstance(features, Tensor) or features.ndim != 4 or channels not in (None, features.shape[1]):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f'expected a last feature map of shape (N, {channels or "C"}, H, W), got {got}')
        height, width = features.shape[2:]
        middle = F.relu(features[:, :, height // 2, width // 2]).sum()
        if not middle.isfinite():
            raise ValueError('the features are not finite')
        gradient, = torch.autograd.grad(middle, image)
    return F.relu(gradient).sum((0, 1))
