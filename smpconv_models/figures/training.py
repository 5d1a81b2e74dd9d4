"""Figures of training runs: losses and accuracy, kernels, the confusion matrix, and animations of the points."""
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from smpconv_models.layers import SMPLayer, smp_layers

from ._text import drawable
from .kernels import (
    KernelView,
    add_legend,
    draw_kernel_row,
    draw_rows,
    evenly_spaced,
    figure_size,
    kernel_view,
    kernel_views,
    layer_label,
    legend_height,
    value_limit,
    visible_range,
)

Row = Dict[str, Any]
Layers = Mapping[str, SMPLayer]
# Numbers of classes up to which a confusion matrix names the classes, shows the counts, and needs no enlarged cells.
_MAX_NAMED, _MAX_COUNTED, _MAX_VISIBLE = 40, 20, 250
# Prefixes of the columns of summary.csv, and their labels; a series has the same color in all plots.
_SERIES = {'train': 'training', 'eval': 'validation', 'ema': 'validation, EMA weights'}
# The axis of top-1 is logarithmic in the difference to this percentage, so that 100 % has a place on it.
_TOP1_LIMIT = 100.1

# Pillow's formats of animations by file extension.
ANIMATION_FORMATS = {'.gif': 'GIF', '.png': 'PNG', '.apng': 'PNG'}
_LAST_FRAME_S = 2.


def save_run(
        path: Union[str, Path], rows: Sequence[Row], model: nn.Module, max_layers: int = 6, columns: int = 6) -> None:
    """Save a PNG of a training run: losses and accuracy over the epochs, and kernels of the SMP layers below them.

    Args:
        path: Path of the file to write.
        rows: Metrics of each epoch, with the keys of the run's ``summary.csv``.
        model: Model with the kernels; a model without SMP layers has the curves alone.
        max_layers: Maximum number of layers, evenly over the depth; for points per filter, their first filter.
        columns: Number of channels per layer; over time half as many panels, twice as wide, the first for all points.
    """
    views = kernel_views(dict(evenly_spaced(list(smp_layers(model).items()), max_layers)))
    heights = (3.2, 1.5 * len(views) + legend_height(10) if views else 1e-3)
    figure = Figure(figsize=(10, sum(heights)), layout='constrained')
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    curves, kernels = parts
    _draw_curves(curves.subplots(1, 2), rows)
    if views:
        _draw_kernels(kernels, views, columns)
    figure.savefig(path, dpi=130, format='png')


def save_curves(path: Union[str, Path], rows: Sequence[Row]) -> None:
    """Save a PNG of losses and accuracy over the epochs, from the rows of a run's ``summary.csv``.

    The axis of top-1 is logarithmic in the error.
    """
    figure = Figure(figsize=(10, 3.2), layout='constrained')
    _draw_curves(figure.subplots(1, 2), rows)
    figure.savefig(path, dpi=130, format='png')


def save_confusion_matrix(path: Union[str, Path], confusion: Tensor, names: Optional[Sequence[str]] = None) -> None:
    """Save a PNG of a confusion matrix: the distribution of each class's images over the predictions.

    Colors follow the square root of the share, so that rare mistakes are visible. A class without images is gray. Up to
    40 classes are named, with their indices if shortened names are equal. Up to 20 classes have their counts in the
    cells.

    Args:
        path: Path of the file to write.
        confusion: Counts of shape ``(classes, classes)``, row the class, column the prediction.
        names: Names of the classes by index; by default their indices.
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
    if len(counts) <= _MAX_NAMED:
        labels, style = drawable([str(name) for name in names or range(len(counts))])
        labels = [label if len(label) <= 32 else f'{label[:31]}…' for label in labels]
        if len(set(labels)) < len(labels):
            labels = [f'{index}: {label}' for index, label in enumerate(labels)]
        axes.set_xticks(range(len(labels)), labels, rotation=90 if max(map(len, labels)) > 2 else 0, **style)
        axes.set_yticks(range(len(labels)), labels, **style)
    if len(counts) <= _MAX_COUNTED:
        for row, column in np.argwhere(counts).tolist():
            color = 'white' if shares[row, column] > 40 else 'black'
            axes.text(column, row, str(counts[row, column]), ha='center', va='center', fontsize=8, color=color)
    if len(counts) > _MAX_VISIBLE:
        _enlarge_cells(axes, shares, colors)
    figure.savefig(path, dpi=130, format='png')


def _draw_kernels(figure: Any, views: Mapping[str, KernelView], columns: int) -> None:
    first = next(iter(views.values()))
    owner = 'channels of' if first.filter is None else 'input channels of a filter in'
    figure.suptitle(f'Kernels and their points: the first {owner} some layers', fontsize=10)
    if any(view.ndim == 1 for view in views.values()):
        draw_rows(figure, views, max(columns // 2 - 1, 1))  # panels twice as wide
        return
    for row, (name, view) in zip(figure.subplots(len(views), columns, squeeze=False), views.items()):
        (label,), style = drawable([layer_label(name, view)])
        row[0].set_ylabel(label, fontsize=7, **style)
        draw_kernel_row(row, view, True, [None] * columns)
    add_legend(figure, views.values(), with_points=True)


def _draw_curves(axes: Sequence[Axes], rows: Sequence[Row]) -> None:
    _set_top1_scale(axes[1], [value for row in rows for key, value in row.items() if key.endswith('_top1')])
    for panel, metric, ylabel in zip(axes, ('loss', 'top1'), ('loss', 'top-1 (%)')):
        for index, (prefix, label) in enumerate(_SERIES.items()):
            key = f'{prefix}_{metric}'
            if key in rows[0]:
                values = [row.get(key, math.nan) for row in rows]
                panel.plot(
                    [row['epoch'] for row in rows], values, label=label, color=f'C{index}',
                    marker='o' if len(rows) == 1 else None, markersize=4)
        panel.set(xlabel='epoch', ylabel=ylabel)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)


def _top1_height(top1: Any) -> Any:
    return -np.log10(_TOP1_LIMIT - top1)


def _top1_of_height(height: Any) -> Any:
    return _TOP1_LIMIT - 10 ** -height


def _set_top1_scale(axes: Axes, top1s: Sequence[float]) -> None:
    """Give an axis of top-1 the logarithmic scale of the error, which separates 99.2 % from 99.7 %."""
    low, high = _top1_height(min(top1s)), _top1_height(max(top1s))
    margin = max(0.06 * (high - low), 0.01)
    axes.set_ylim(_top1_of_height(low - margin), _top1_of_height(high + margin))  # before the scale: it has no others
    axes.set_yscale('function', functions=(_top1_height, _top1_of_height))
    ticks = _top1_ticks(low - margin, high + margin)
    axes.set_yticks(ticks, [f'{tick:g}' for tick in ticks])
    axes.minorticks_off()


def _top1_ticks(low: float, high: float) -> List[float]:
    """Return round values of top-1 between two heights, the roundest first, with room for their labels."""
    ticks: List[float] = []
    for step in (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01):
        first, last = (max(0., min(100., _top1_of_height(height))) / step for height in (low, high))
        for index in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1):
            heights = _top1_height(np.array(ticks))
            if (abs(heights - _top1_height(index * step)) >= (high - low) / 9).all():
                ticks.append(index * step)
    return sorted(ticks)


def _enlarge_cells(axes: Axes, shares: np.ndarray, colors: Dict[str, Any]) -> None:
    """Draw squares larger than the cells, the largest shares on top; cells off the diagonal would be invisible."""
    rows, columns = np.ma.filled(shares, 0).nonzero()
    order = shares[rows, columns].argsort()
    rows, columns = rows[order], columns[order]
    found = shares[rows, columns]
    sizes = np.where(rows == columns, 5, 5 + found / 2)
    axes.scatter(columns, rows, c=found, s=sizes, marker='s', linewidth=0, **colors)


# --- animations of points: their positions, weights and radii over the checkpoints of a run ---


class _Scale(NamedTuple):
    """Largest weight of a layer's points, and limits of its kernels, over all frames."""
    weight: float
    kernels: List[float]


def save_animation(
        path: Union[str, Path], snapshots: Sequence[Tuple[str, Layers]], columns: int = 5, fps: float = 5.,
        format: Optional[str] = None, filter: int = 0) -> None:
    """Save an animated GIF or PNG with a frame per snapshot: layers' points with their supports, and kernels.

    A row is a layer or a filter, as in :func:`save_kernels`. A kernel has the same color scale in all frames,
    and all frames show the same range of a long 1-D kernel. The last frame stays for at least two seconds.

    Args:
        path: Path of the file to write.
        snapshots: Titles and layers by name, in order, with the same layers in each, such as those of
            :func:`choose_layers`.
        columns: Number of kernels per layer.
        fps: Frames per second.
        format: 'GIF' or 'PNG'; by default chosen by the extension of the path: .gif, .png, .apng.
        filter: Index of the filter, for layers with points per filter.

    Raises:
        ValueError: If there are fewer than two snapshots, their layers differ, the format or the frame rate is not
            supported, or a layer has no such filter.
    """
    format = format or ANIMATION_FORMATS.get(Path(path).suffix.lower())
    if format not in ANIMATION_FORMATS.values():
        raise ValueError(f'the extension of an animation must be one of {tuple(ANIMATION_FORMATS)}, got {path}')
    if not 0.1 <= fps <= 50:  # a GIF counts 16 bits of 10 ms
        raise ValueError(f'fps must lie in [0.1, 50], got {fps}')
    _check_same_layers(snapshots)
    first = kernel_views(snapshots[0][1], filter)
    columns = min(columns, max(len(view.weights) for view in first.values()))
    spans, scales = {}, {}
    for name, view in first.items():
        layers = [snapshot[name] for _, snapshot in snapshots]
        spans[name] = visible_range([kernel_view(layer, filter) for layer in layers]) if view.ndim == 1 else None
        scales[name] = _scale(layers, filter, spans[name], columns)
    frames = []
    for title, snapshot in tqdm(snapshots, desc='drawing', unit='frame', leave=False, disable=None):
        views = {name: replace(view, span=spans[name]) for name, view in kernel_views(snapshot, filter).items()}
        figure = draw_frame(title, views, scales, columns)
        figure.set_dpi(100)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert('RGB'))
    durations = [round(1000 / fps)] * (len(frames) - 1) + [round(1000 * max(_LAST_FRAME_S, 1 / fps))]
    frames[0].save(path, format=format, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def draw_frame(title: str, views: Mapping[str, KernelView], scales: Mapping[str, _Scale], columns: int) -> Figure:
    """Return the figure of one frame."""
    figure = Figure(figsize=figure_size(views.values(), 1 + columns, 0.4), layout='constrained')
    (title,), style = drawable([title])
    figure.suptitle(title, fontsize=10, **style)
    draw_rows(figure, views, columns, scales, with_titles=next(iter(views.values())).filter is not None)
    return figure


def _check_same_layers(snapshots: Sequence[Tuple[str, Layers]]) -> None:
    if len(snapshots) < 2:
        raise ValueError(f'an animation needs at least 2 checkpoints, got {len(snapshots)}')
    described = [
        [f'{name} ({len(view.weights)}, {view})' for name, view in kernel_views(layers).items()]
        for _, layers in snapshots]
    for (title, _), found in zip(snapshots, described):
        if not found or found != described[0]:
            raise ValueError(
                f'the layers must be the same in all snapshots: {snapshots[0][0]} has {described[0]}, {title} has '
                f'{found}')


def _scale(layers: Sequence[SMPLayer], filter: int, span: Optional[Tuple[int, int]], columns: int) -> _Scale:
    heaviest, limits = 0., []
    for layer in layers:  # one at a time, as their kernels take memory
        view = replace(kernel_view(layer, filter), span=span)
        heaviest = max(heaviest, float(view.point_weights.max()))
        limits.append([
            value_limit(view, channel, with_points=view.ndim == 1)
            for channel in range(min(columns, len(view.weights)))])
    return _Scale(heaviest, np.max(limits, 0).tolist())
