"""The effective receptive field: how much each pixel of an image contributes to the middle of the last feature map."""
from pathlib import Path
from typing import Any, Mapping, Union

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from tqdm import tqdm

from .forward import applied
from .squares import central_square

# Those that RepLKNet tabulates.
SHARES = (0.2, 0.3, 0.5, 0.99)
_COLORS = ('#d62728', '#ff7f0e', '#2ca02c', '#1f77b4')


def effective_receptive_field(model: nn.Module, images: Tensor) -> np.ndarray:
    """How much each pixel contributes to the middle of the last feature map, by the gradient.

    The definition is RepLKNet's (https://arxiv.org/abs/2203.06717, appendix), of Luo et al. 2016
    (https://arxiv.org/abs/1701.04128): the positive part of the gradient of ``sum_c relu(y[c, H' // 2, W' // 2])`` with
    respect to the image, summed over the image's channels, averaged over the images. y is the output of
    ``forward_features``, as timm's networks have it, or else of the model.

    Args:
        model: In evaluation mode. No gradient is left in its parameters.
        images: As the model takes them, ``(N, C, H, W)``; taken one by one.

    Returns:
        Map of shape ``(H, W)`` in float64, not negative.

    Raises:
        ValueError: The model is in training mode, can't take the images or has no feature map ``(N, C, H', W')``; there
            are no images; features or gradient aren't finite, or nothing contributes.
    """
    if model.training:
        raise ValueError('the model must be in evaluation mode: model.eval()')
    if len(images) == 0:
        raise ValueError('expected at least one image, got none')
    total = torch.zeros(images.shape[-2:], dtype=torch.float64)
    for image in tqdm(images, desc='receptive field', unit='image', leave=False, disable=None):
        total += _contributions(model, image[None]).double().cpu()
    if not total.isfinite().all():
        raise ValueError('the gradient is not finite')
    if not total.any():
        raise ValueError('nothing contributes to the middle of the last feature map: its activations are not positive')
    return (total / len(images)).numpy()


def _contributions(model: nn.Module, image: Tensor) -> Tensor:
    image = image.detach().clone().requires_grad_()
    with torch.enable_grad():
        features = _features(model, image)
        height, width = features.shape[2:]
        middle = F.relu(features[:, :, height // 2, width // 2]).sum()
        if not middle.isfinite():
            raise ValueError('the features are not finite')
        gradient, = torch.autograd.grad(middle, image)
    return F.relu(gradient).sum((0, 1))


def _features(model: Any, image: Tensor) -> Tensor:
    features = applied(getattr(model, 'forward_features', model), image)
    channels = getattr(model, 'num_features', None)
    if not isinstance(features, Tensor) or features.ndim != 4 or channels not in (None, features.shape[1]):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f'expected a last feature map of shape (N, {channels or "C"}, H, W), got {got}')
    return features


def log_scaled(field: np.ndarray) -> np.ndarray:
    """``log10(1 + field)`` over its largest value: what RepLKNet shows and takes the areas of."""
    scaled = np.log10(field + 1)
    return scaled / scaled.max()


def save_receptive_fields(path: Union[str, Path], fields: Mapping[str, np.ndarray]) -> None:
    """A PNG of effective receptive fields beside each other, with the central squares that hold shares of them.

    Colours are logarithmic, from the largest value of each down to a ten-thousandth.

    Args:
        path: Where to.
        fields: Of :func:`effective_receptive_field`, by what to call them.

    Raises:
        ValueError: They are no such maps.
    """
    figure = Figure(figsize=(4.2 * len(fields) + 1, 5.2), layout='compressed')
    grid = figure.subplots(1, len(fields), squeeze=False)
    picture: Any = None
    for axes, (name, field) in zip(grid[0], fields.items()):
        picture = axes.imshow(
            np.maximum(field / field.max(), 1e-4), cmap='Greys', norm=LogNorm(1e-4, 1), interpolation='nearest')
        _outline(axes, field)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f'{name} ({field.shape[0]}x{field.shape[1]} pixels)', fontsize=10, parse_math=False)
    figure.colorbar(picture, ax=grid, label='contribution over the largest', shrink=0.8)
    figure.savefig(path, dpi=130, format='png')


def _outline(axes: Axes, field: np.ndarray) -> None:
    height, width = field.shape
    for share, color in zip(SHARES, _COLORS):
        square = central_square(field, share)
        corner = (width // 2 - square.side / 2, height // 2 - square.side / 2)
        axes.add_patch(Rectangle(
            corner, square.side, square.side, fill=False, edgecolor=color, linewidth=1.5,
            label=f'{100 * share:.0f} % of the contributions in {square}: {100 * square.area:.1f} % of the area'))
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.01), fontsize=8, handlelength=1, frameon=False)
