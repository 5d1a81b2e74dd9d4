"""Pictures of learned kernels and of training runs. Needs matplotlib; draws off screen."""
from pathlib import Path
from typing import Any, Dict, List, Sequence, Union

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from torch import Tensor, nn

from smpconv_models.layers import SMPDepthwiseConv2d, clip_radius
from smpconv_models.layers.smp_conv import smp_layers

Row = Dict[str, Any]


def draw_kernel(axes: Axes, layer: SMPDepthwiseConv2d, channel: int) -> None:
    """One channel's kernel with the points it is drawn from, as figure 4 of the paper shows them.

    Colours are symmetric about zero, blue negative and red positive. A dot is a point, in the colour of its weight;
    the diamond around it is its reach, an L1 ball of its radius. Points outside the kernel lie outside the picture.
    """
    kernel = _array(layer.kernel()[channel, 0])
    coords = _array(layer.coords)
    radius = _array(clip_radius(layer.radius, *layer.radius_range))
    weights = _array(layer.weight[channel])
    edge = 1 + 1 / max(layer.kernel_size - 1, 1)  # elements' centres span [-1, 1]
    limit = abs(kernel).max() or 1.
    axes.imshow(kernel, extent=(-edge, edge, -edge, edge), cmap='RdBu_r', vmin=-limit, vmax=limit)
    diamonds = [
        Polygon([(x + r, y), (x, y + r), (x - r, y), (x, y - r)])
        for (x, y), r in zip(coords.tolist(), radius.tolist())
    ]
    axes.add_collection(PatchCollection(diamonds, facecolor='none', edgecolor='0.4', linewidth=0.3, alpha=0.5))
    heaviest = abs(weights).max() or 1.
    axes.scatter(
        coords[:, 0], coords[:, 1], c=weights, s=6, cmap='RdBu_r', vmin=-heaviest, vmax=heaviest, edgecolor='black',
        linewidth=0.3,
    )
    axes.set(xlim=(-edge, edge), ylim=(-edge, edge), xticks=[], yticks=[])


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def save_run(
        path: Union[str, Path],
        rows: Sequence[Row],
        model: nn.Module,
        max_layers: int = 6,
        columns: int = 6,
) -> None:
    """A PNG of a training run: losses and accuracy over the epochs, below them kernels of the SMP layers.

    Args:
        path: Where to.
        rows: An epoch each, with the keys of the run's ``summary.csv``.
        model: Whose kernels to show; without SMP layers there are the curves only.
        max_layers: Layers shown at most, evenly over the depth.
        columns: Channels shown of each.
    """
    layers = _evenly(list(smp_layers(model).items()), max_layers)
    height = 3.2 + 1.5 * len(layers)
    figure = Figure(figsize=(10, height), layout='constrained')
    parts: Any = figure.subfigures(2, 1, height_ratios=(3.2, max(1.5 * len(layers), 1e-3)))
    curves, kernels = parts
    _draw_curves(curves.subplots(1, 2), rows)
    if layers:
        kernels.suptitle('Kernels and their points: the first channels of some layers', fontsize=10)
        grid = kernels.subplots(len(layers), columns, squeeze=False)
        for row, (name, layer) in zip(grid, layers):
            row[0].set_ylabel(_short(name, layer), fontsize=7)
            for channel, axes in enumerate(row):
                if channel < layer.channels:
                    draw_kernel(axes, layer, channel)
                else:
                    axes.axis('off')
    figure.savefig(path, dpi=130, format='png')


def save_curves(path: Union[str, Path], rows: Sequence[Row]) -> None:
    """A PNG of losses and accuracy over the epochs, of the rows of a run's ``summary.csv``."""
    figure = Figure(figsize=(10, 3.2), layout='constrained')
    _draw_curves(figure.subplots(1, 2), rows)
    figure.savefig(path, dpi=130, format='png')


def _evenly(items: List[Any], most: int) -> List[Any]:
    """At most so many of the items, from the first to the last."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _short(name: str, layer: SMPDepthwiseConv2d) -> str:
    parts = [part for part in name.split('.') if part.isdigit()]
    return f'stage {parts[0]} block {parts[1]}\n{layer.kernel_size}x{layer.kernel_size}' if len(parts) == 2 else name


def _draw_curves(axes: Sequence[Axes], rows: Sequence[Row]) -> None:
    epochs = [row['epoch'] for row in rows]
    labels = {'train_loss': 'training', 'eval_loss': 'held out', 'ema_loss': 'held out, averaged weights'}
    _draw_lines(axes[0], epochs, rows, labels, 'loss')
    labels = {'eval_top1': 'held out', 'ema_top1': 'held out, averaged weights'}
    _draw_lines(axes[1], epochs, rows, labels, 'top-1 (%)')


def _draw_lines(axes: Axes, epochs: List[int], rows: Sequence[Row], labels: Dict[str, str], ylabel: str) -> None:
    for key, label in labels.items():
        if key in rows[0]:
            axes.plot(epochs, [row[key] for row in rows], label=label, marker='.' if len(rows) == 1 else None)
    axes.set(xlabel='epoch', ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
