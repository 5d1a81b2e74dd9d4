"""Pictures of learned kernels and of training runs. Needs matplotlib; draws off screen."""
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from torch import Tensor, nn

from smpconv_models.layers import SMPDepthwiseConv2d, clip_radius, smp_layers

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


def save_confusion(
        path: Union[str, Path],
        confusion: Tensor,
        names: Optional[Sequence[str]] = None,
) -> None:
    """A PNG of a confusion matrix: how each class's images are divided among the predictions.

    Colours go by the square root of the share, so that rare mistakes show; a class without images is gray. Up to 40
    classes are named, cells of up to 20 have their counts.

    Args:
        path: Where to.
        confusion: Counts of shape ``(classes, classes)``, row the class, column the prediction.
        names: Of the classes by index, else their indices are shown.
    """
    counts = confusion.cpu().numpy()
    images = counts.sum(1, keepdims=True)
    shares = np.ma.array(100 * counts / np.maximum(images, 1), mask=np.broadcast_to(images == 0, counts.shape))
    side = min(max(3., 0.35 * len(counts)), 12.)
    figure = Figure(figsize=(side + 2, side + 1), layout='constrained')
    axes = figure.add_subplot(facecolor='0.8')
    colors: Any = dict(cmap='Blues', norm=PowerNorm(0.5, 0, 100))
    picture = axes.imshow(shares, interpolation='nearest', **colors)
    figure.colorbar(picture, label="% of a class's images", shrink=0.8)
    axes.set(xlabel='predicted', ylabel='class')
    axes.set_title(f'top-1 {100 * counts.trace() / images.sum():.2f} % of {images.sum()} images')
    if len(counts) <= 40:
        _name_classes(axes, [str(name) for name in names or range(len(counts))])
    if len(counts) <= 20:
        _number_cells(axes, counts, shares)
    if len(counts) > 250:
        _enlarge_cells(axes, shares, colors)
    figure.savefig(path, dpi=130, format='png')


def _name_classes(axes: Axes, names: Sequence[str]) -> None:
    labels = [name if len(name) <= 32 else f'{name[:31]}…' for name in names]
    axes.set_xticks(range(len(labels)), labels, rotation=90 if max(map(len, labels)) > 2 else 0, parse_math=False)
    axes.set_yticks(range(len(labels)), labels, parse_math=False)


def _number_cells(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    for row, column in np.argwhere(counts).tolist():
        color = 'white' if shares[row, column] > 40 else 'black'
        axes.text(column, row, str(counts[row, column]), ha='center', va='center', fontsize=8, color=color)


def _enlarge_cells(axes: Axes, shares: np.ndarray, colors: Dict[str, Any]) -> None:
    """Squares larger than the cells, the largest shares on top, or nothing beside the diagonal would be seen."""
    rows, columns = np.ma.filled(shares, 0).nonzero()
    order = shares[rows, columns].argsort()
    rows, columns = rows[order], columns[order]
    found = shares[rows, columns]
    sizes = np.where(rows == columns, 5, 5 + found / 2)
    axes.scatter(columns, rows, c=found, s=sizes, marker='s', linewidth=0, **colors)


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
