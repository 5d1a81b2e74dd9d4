"""Pictures of confusion matrices."""
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Union

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor


def save_confusion_matrix(
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
