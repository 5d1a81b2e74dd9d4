"""Pictures of training runs: losses and accuracy, and kernels."""
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Union

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from smpconv_models.layers import smp_layers

from .kernels import draw_kernels, draw_rows, evenly, name_columns, views_of
from .views import View, label_of

Row = Dict[str, Any]


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
        max_layers: Layers shown at most, evenly over the depth; of those with points per filter, the first filter.
        columns: Channels shown of each; over time half as many panels, twice as wide, the first for all points.
    """
    views = views_of(dict(evenly(list(smp_layers(model).items()), max_layers)))
    height = 3.2 + 1.5 * len(views)
    figure = Figure(figsize=(10, height), layout='constrained')
    parts: Any = figure.subfigures(2, 1, height_ratios=(3.2, max(1.5 * len(views), 1e-3)))
    curves, kernels = parts
    _draw_curves(curves.subplots(1, 2), rows)
    if views:
        _draw_kernels(kernels, views, columns)
    figure.savefig(path, dpi=130, format='png')


def _draw_kernels(figure: Any, views: Mapping[str, View], columns: int) -> None:
    first = next(iter(views.values()))
    owner = 'channels of' if first.filter is None else 'input channels of a filter in'
    figure.suptitle(f'Kernels and their points: the first {owner} some layers', fontsize=10)
    if any(view.ndim == 1 for view in views.values()):
        name_columns(draw_rows(figure, views, max(columns // 2 - 1, 1)), first)  # panels twice as wide
        return
    for row, (name, view) in zip(figure.subplots(len(views), columns, squeeze=False), views.items()):
        row[0].set_ylabel(label_of(name, view), fontsize=7)
        draw_kernels(row, view, True, [None] * columns)


def save_curves(path: Union[str, Path], rows: Sequence[Row]) -> None:
    """A PNG of losses and accuracy over the epochs, of the rows of a run's ``summary.csv``."""
    figure = Figure(figsize=(10, 3.2), layout='constrained')
    _draw_curves(figure.subplots(1, 2), rows)
    figure.savefig(path, dpi=130, format='png')


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
