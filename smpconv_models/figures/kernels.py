"""Pictures of kernels and of the points that they are drawn from."""
import difflib
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from torch import Tensor, nn

from smpconv_models.layers import SMPDepthwiseConv2d, clip_radius, smp_layers


def draw_kernel(
        axes: Axes,
        layer: SMPDepthwiseConv2d,
        channel: int,
        with_points: bool = True,
        limit: Optional[float] = None,
) -> None:
    """One channel's kernel with the points it is drawn from, as figure 4 of the paper shows them.

    Colours are symmetric about zero, blue negative and red positive. A dot is a point, in the colour of its weight;
    the diamond around it is its reach, an L1 ball of its radius. Points outside the kernel lie outside the picture.

    Args:
        axes: Where to.
        layer: Whose kernel.
        channel: Its number.
        with_points: Or the kernel alone.
        limit: Value of the darkest colours, else the largest of this kernel.
    """
    kernel = _array(layer.kernel()[channel, 0])
    edge = _edge(layer)
    limit = limit or abs(kernel).max() or 1.
    axes.imshow(kernel, extent=(-edge, edge, -edge, edge), cmap='RdBu_r', vmin=-limit, vmax=limit)
    if with_points:
        weights = _array(layer.weight[channel])
        heaviest = abs(weights).max() or 1.
        _add_reaches(axes, layer, facecolor='none', edgecolor='0.4', linewidth=0.3, alpha=0.5)
        _add_dots(axes, layer, c=weights, s=6, cmap='RdBu_r', vmin=-heaviest, vmax=heaviest)
    axes.set(xlim=(-edge, edge), ylim=(-edge, edge), xticks=[], yticks=[])


def draw_points(axes: Axes, layer: SMPDepthwiseConv2d, heaviest: Optional[float] = None) -> None:
    """The points of a layer, which all of its channels share, over the area of the kernel.

    A dot is a point, the darker the more it weighs: its absolute weight, averaged over the channels. The diamonds are
    the points' reaches, as in :func:`draw_kernel`.

    Args:
        axes: Where to.
        layer: Whose points.
        heaviest: Weight of the darkest dots, else the largest of this layer.
    """
    weights = point_weights(layer)
    edge = _edge(layer)
    _add_reaches(axes, layer, facecolor='tab:orange', edgecolor='tab:orange', linewidth=0.4, alpha=0.12)
    _add_dots(axes, layer, c=weights, s=10, cmap='Greys', vmin=0, vmax=heaviest or weights.max() or 1.)
    axes.set(xlim=(-edge, edge), ylim=(-edge, edge), xticks=[], yticks=[], aspect='equal')


def point_weights(layer: SMPDepthwiseConv2d) -> np.ndarray:
    """Absolute weights of a layer's points, averaged over the channels, ``(P,)``."""
    return abs(_array(layer.weight)).mean(0)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _edge(layer: SMPDepthwiseConv2d) -> float:
    """Of the picture: the centres of the elements span [-1, 1]."""
    return 1 + 1 / max(layer.kernel_size - 1, 1)


def _add_reaches(axes: Axes, layer: SMPDepthwiseConv2d, **style: Any) -> None:
    coords, radius = _array(layer.coords), _array(clip_radius(layer.radius, *layer.radius_range))
    diamonds = [
        Polygon([(x + r, y), (x, y + r), (x - r, y), (x, y - r)])
        for (x, y), r in zip(coords.tolist(), radius.tolist())
    ]
    axes.add_collection(PatchCollection(diamonds, **style))


def _add_dots(axes: Axes, layer: SMPDepthwiseConv2d, **style: Any) -> None:
    coords = _array(layer.coords)
    axes.scatter(coords[:, 0], coords[:, 1], edgecolor='black', linewidth=0.3, **style)


def save_kernels(
        path: Union[str, Path],
        model: nn.Module,
        layers: Optional[Sequence[str]] = None,
        max_layers: int = 6,
        columns: int = 6,
) -> None:
    """A PNG like figure 4 of the paper: a row for each layer, first its points with their reaches, then kernels.

    The paper's kernels are absolute values; these have their signs, each with colours of its own scale.

    Args:
        path: Where to.
        model: Whose kernels; its channels' first ones are shown.
        layers: Names of those shown, else of at most ``max_layers``, evenly over the depth.
        max_layers: See ``layers``.
        columns: Kernels shown of each.

    Raises:
        ValueError: The model has no such layers, or none at all.
    """
    chosen = choose_layers(model, layers, max_layers)
    columns = min(columns, max(layer.channels for layer in chosen.values()))
    figure = Figure(figsize=(1.4 * (1 + columns) + 0.5, 1.45 * len(chosen) + 0.3), layout='constrained')
    grid = figure.subplots(len(chosen), 1 + columns, squeeze=False)
    for axes, title in zip(grid[0], ['points', *(f'channel {channel}' for channel in range(columns))]):
        axes.set_title(title, fontsize=8)
    for row, (name, layer) in zip(grid, chosen.items()):
        draw_points(row[0], layer)
        row[0].set_ylabel(short_name(name, layer), fontsize=7)
        for channel, axes in enumerate(row[1:]):
            if channel < layer.channels:
                draw_kernel(axes, layer, channel, with_points=False)
            else:
                axes.axis('off')
    figure.savefig(path, dpi=130, format='png')


def choose_layers(
        model: nn.Module,
        names: Optional[Sequence[str]] = None,
        most: int = 6,
) -> Dict[str, SMPDepthwiseConv2d]:
    """Layers of a model whose kernels are drawn from points: those named, or some over the whole depth.

    Args:
        model: Where to look.
        names: As in ``model.named_modules()``.
        most: How many, where none are named.

    Raises:
        ValueError: There are no such layers, or none at all.
    """
    found = smp_layers(model)
    if not found:
        raise ValueError(
            'the model has no kernels that are drawn from points (of re-parameterized large kernels `stages` shows the '
            'sums)')
    if names is None:
        return dict(evenly(list(found.items()), most))
    for name in names:
        check_known(name, found)
    return {name: found[name] for name in names}


def check_known(name: str, known: Any) -> None:
    """Raises ValueError unless a layer's name is among these; tells the nearest of them."""
    if name not in known:
        inside = [other for other in known if other.startswith(f'{name}.')]
        raise ValueError(
            f'no layer is named {name!r}; near are {(inside or difflib.get_close_matches(name, known, cutoff=0.))[:3]}')


def evenly(items: List[Any], most: int) -> List[Any]:
    """At most so many of the items, from the first to the last."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / max(most - 1, 1))] for i in range(most)]


def short_name(name: str, layer: SMPDepthwiseConv2d) -> str:
    """A layer's name for the margin of a picture, with its size."""
    parts = [part for part in name.split('.') if part.isdigit()]
    return f'stage {parts[0]} block {parts[1]}\n{layer.kernel_size}x{layer.kernel_size}' if len(parts) == 2 else name
