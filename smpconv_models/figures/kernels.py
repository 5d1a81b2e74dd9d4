"""Plots of kernels and of the points that they are interpolated from."""
import difflib
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Collection, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon
from torch import Tensor, nn

from smpconv_models.layers import SMPLayer, clip_radius, smp_layers
from smpconv_models.utils.errors import error_prefix

from ._text import drawable

# Panel width in inches by the kernels' dimensions: a line needs more room than a square.
_PANEL_WIDTHS = {1: 2.2, 2: 1.4}
# Number of steps that a panel of two inches can resolve.
_RESOLVABLE_STEPS = 256
# A range of long kernels covers at least this multiple of the median radius.
_MIN_RADII_SHOWN = 32
# Replacements that turn the name of a convolution with points per filter into a label.
_LABEL_RULES = (
    (r'^stages\.(\d+)\.(\d+)\.', r'stage \1 block \2 '),
    (r'^blocks\.(\d+)\.', r'block \1 '),
    (r'(?:\.large)?\.conv$', ''),
)


# Number of entries in a legend, and width of one in inches.
_LEGEND_ENTRIES, _LEGEND_ENTRY_WIDTH = 4, 2.6


@dataclass(frozen=True, eq=False)
class KernelView:
    """A set of points and the kernels that are interpolated from it, for every kind of layer.

    For a depthwise layer, whose channels share the points, these are the kernels of all channels. Otherwise they are
    the kernels of one filter, one for each input channel.
    """
    layer: SMPLayer  # layer that has these points alone
    filter: Optional[int]  # index of the filter; None for a depthwise layer
    # first and one past the last element that plots of a 1-D kernel show; None to choose them by :func:`visible_range`
    span: Optional[Tuple[int, int]] = None

    @cached_property
    def coords(self) -> np.ndarray:
        """Positions of the points, ``(P, d)``."""
        return _to_numpy(self.layer.coords).reshape(-1, self.ndim)

    @cached_property
    def radius(self) -> np.ndarray:
        """Radii of the points as clipped by the forward pass, ``(P,)``."""
        return _to_numpy(clip_radius(self.layer.radius, *self.layer.radius_range)).reshape(-1)

    @cached_property
    def weights(self) -> np.ndarray:
        """Weights of the points for each kernel, ``(R, P)``."""
        return _to_numpy(self.layer.weight).reshape(-1, self.layer.weight.shape[-1])

    @cached_property
    def kernels(self) -> np.ndarray:
        """Sampled kernels, ``(R, k)`` or ``(R, k, k)``."""
        with torch.no_grad():
            kernels = self.layer.kernel()
        return _to_numpy(kernels).reshape(-1, *kernels.shape[2:])

    @property
    def ndim(self) -> int:
        """Number of dimensions d of the kernels, 1 over time or 2 over an image."""
        return self.layer.coords.shape[-1]

    @property
    def size(self) -> int:
        """Elements k along a kernel's side."""
        return self.layer.kernel_size

    @property
    def edge(self) -> float:
        """Coordinate of a plot's border; the centers of the elements span [-1, 1]."""
        return 1 + 1 / max(self.size - 1, 1)

    @property
    def point_weights(self) -> np.ndarray:
        """Absolute weights, averaged over the kernels, ``(P,)``."""
        return abs(self.weights).mean(0)

    @property
    def visible(self) -> Tuple[int, int]:
        """First and one past the last element that plots of a 1-D kernel show."""
        return self.span or visible_range([self])

    def __str__(self) -> str:
        return size_label(self.size, self.ndim)


# --- public functions ---


def draw_kernel(
        axes: Axes, layer: Union[SMPLayer, KernelView], channel: int, with_points: bool = True,
        limit: Optional[float] = None, filter: int = 0) -> None:
    """Draw one channel's kernel with its points, as in figure 4 of the paper.

    A 2-D kernel is an image with colors symmetric about zero, blue negative and red positive. A dot is a point, in the
    color of its weight; the diamond around it is its support, an L1 ball of its radius.

    A 1-D kernel is a line, with the present, step 0, at the right. A dot is a point, at the height of its weight; the
    bar through it is its support. If the supports are short compared with the kernel, the plot shows only the range
    that holds most of the filter's absolute kernels: at least 256 steps, and 32 times the median radius.
    :func:`draw_points` marks this range.

    Points outside the kernel lie outside the plot.

    Args:
        axes: Axes to draw on.
        layer: Layer with the kernel.
        channel: Index of the channel; for points per filter, of the input channel.
        with_points: Whether to draw the points too.
        limit: Absolute value of the darkest colors, or of the top of the line's axis; by default the kernel's own.
        filter: Index of the filter, for layers with points per filter.

    Raises:
        ValueError: If the layer has no such filter.
    """
    view = kernel_view(layer, filter)
    draw = _draw_kernel_1d if view.ndim == 1 else _draw_kernel_2d
    draw(axes, view, channel, with_points, limit or value_limit(view, channel, with_points))


def draw_points(
        axes: Axes, layer: Union[SMPLayer, KernelView], heaviest: Optional[float] = None, filter: int = 0) -> None:
    """Draw a depthwise layer's points, or those of one filter, over the whole area of the kernel.

    A dot is a point. It is darker, or over time higher, for a larger absolute weight, averaged over the channels.
    Supports are drawn as in :func:`draw_kernel`.

    Args:
        axes: Axes to draw on.
        layer: Layer with the points.
        heaviest: Weight of the darkest or highest dots; by default the largest of these points.
        filter: Index of the filter, for layers with points per filter.

    Raises:
        ValueError: If the layer has no such filter.
    """
    view = kernel_view(layer, filter)
    draw = _draw_points_1d if view.ndim == 1 else _draw_points_2d
    draw(axes, view, heaviest or float(view.point_weights.max()) or 1.)


def save_kernels(
        path: Union[str, Path], model: nn.Module, layers: Optional[Sequence[str]] = None, max_layers: int = 6,
        columns: int = 6, filter: int = 0) -> None:
    """Save a PNG like figure 4 of the paper: a row per layer, with its points, their supports and its kernels.

    If filters have points of their own, a row shows one filter and the kernels of its first input channels.

    The paper shows absolute values. This plot keeps the signs, and each kernel has its own color scale.

    Args:
        path: Path of the file to write.
        model: Model with SMP layers.
        layers: Names of the layers to show; by default at most ``max_layers``, evenly over the depth.
        max_layers: Maximum number of layers if ``layers`` is None.
        columns: Number of kernels per layer.
        filter: Index of the filter, for layers with points per filter.

    Raises:
        ValueError: If the model has no SMP layers, or lacks one of these layers or the filter.
    """
    views = kernel_views(choose_layers(model, layers, max_layers), filter)
    columns = min(columns, max(len(view.weights) for view in views.values()))
    figure = Figure(figsize=figure_size(views.values(), 1 + columns, 0.3), layout='constrained')
    draw_rows(figure, views, columns)
    figure.savefig(path, dpi=130, format='png')


def choose_layers(model: nn.Module, names: Optional[Sequence[str]] = None, most: int = 6) -> Dict[str, SMPLayer]:
    """Return SMP layers of a model by name: the given ones, or some over the whole depth.

    Args:
        model: Model to search.
        names: Names as in ``model.named_modules()``.
        most: Maximum number of layers if ``names`` is None.

    Raises:
        ValueError: If the model has no SMP layers, or none of a given name.
    """
    found = smp_layers(model)
    if not found:
        raise ValueError(
            'the model has no kernels that are sampled from points (for re-parameterized kernels, use `stages`)')
    if names is None:
        return dict(evenly_spaced(list(found.items()), most))
    for name in names:
        check_layer_name(name, found)
    return {name: found[name] for name in names}


# --- views, labels and choices ---


def kernel_view(layer: Union[SMPLayer, KernelView], filter: int = 0) -> KernelView:
    """Return the points of a layer, or of one filter if each has its own; a view is returned unchanged.

    A filter that the layer lacks is a ValueError.
    """
    if isinstance(layer, KernelView):
        return layer
    if layer.coords.ndim == 2:
        if filter != 0:
            raise ValueError(f'filter must be 0 for a depthwise layer, whose channels share their points, got {filter}')
        return KernelView(layer, None)
    if not 0 <= filter < len(layer.coords):
        raise ValueError(f'filter must lie in [0, {len(layer.coords) - 1}], got {filter}')
    # a layer of this filter alone: the others' kernels, of up to 16,000 steps each, need not be sampled
    kind: Any = type(layer)
    alone = kind(
        layer.in_channels, 1, layer.base_size, layer.coords.shape[1], bias=False, radius_range=layer.radius_range,
        device='meta')
    alone.resize(layer.kernel_size)
    for name in ('weight', 'coords', 'radius'):
        setattr(alone, name, nn.Parameter(getattr(layer, name)[filter:filter + 1].detach()))
    return KernelView(alone, filter)


def kernel_views(layers: Mapping[str, SMPLayer], filter: int = 0) -> Dict[str, KernelView]:
    """Return :func:`kernel_view` of each layer; an error starts with the layer's name."""
    views = {}
    for name, layer in layers.items():
        with error_prefix(name):
            views[name] = kernel_view(layer, filter)
    return views


def check_layer_name(name: str, known: Any) -> None:
    """Raise ValueError with the nearest names if there is no layer of this name."""
    if name not in known:
        near = [other for other in known if other.startswith(f'{name}.')]
        near = near or difflib.get_close_matches(name, known, cutoff=0.)
        raise ValueError(f'no layer is named {name!r}; the nearest names are {near[:3]}')


def evenly_spaced(items: List[Any], most: int) -> List[Any]:
    """Return at most ``most`` of the items, from the first to the last."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / max(most - 1, 1))] for i in range(most)]


def size_label(size: int, ndim: int) -> str:
    return f'{size} steps' if ndim == 1 else f'{size}x{size}'


def layer_label(name: str, view: KernelView) -> str:
    """Return a layer's name and size for the margin of a plot."""
    if view.filter is None:
        parts = [part for part in name.split('.') if part.isdigit()]
        return f'stage {parts[0]} block {parts[1]}\n{view}' if len(parts) == 2 else name
    for pattern, words in _LABEL_RULES:
        name = re.sub(pattern, words, name)
    return f'{name}\nfilter {view.filter}, {view}'.lstrip()


def visible_range(views: Sequence[KernelView]) -> Tuple[int, int]:
    """Return the first and one past the last element that plots of 1-D kernels of one size share.

    The range has the largest absolute sum. All elements are shown if there are less than twice as many as a panel can
    resolve. Of ranges with equal sums, the one that ends at the present is chosen, otherwise the middle one.
    """
    size = views[0].size
    radius = float(np.median([view.radius for view in views])) * (size - 1) / 2
    length = max(_RESOLVABLE_STEPS, math.ceil(_MIN_RADII_SHOWN * radius))
    if 2 * length > size:
        return 0, size
    cumulative = sum((_cumulative_share(view) for view in views), np.zeros(size + 1))
    if not cumulative[-1]:
        return 0, size
    sums = cumulative[length:] - cumulative[:-length]
    best = np.flatnonzero(sums >= sums.max() * (1 - 1e-9))  # many, if all other elements are zero
    ends_at_present = best[-1] == len(sums) - 1
    start = int(best[-1] if ends_at_present else best[len(best) // 2])
    return start, start + length


def value_limit(view: KernelView, channel: int, with_points: bool) -> float:
    """Return the largest absolute value that a kernel's plot has to show, or 1 if all are zero.

    Over time these are the visible elements and the weights of the visible points. Over an image these are the elements
    alone, because dots have a color scale of their own.
    """
    kernel = abs(view.kernels[channel])
    if view.ndim == 2:
        return float(kernel.max()) or 1.
    start, stop = view.visible
    largest = float(kernel[start:stop].max())
    if with_points:
        elements = _point_steps(view) + view.size - 1
        inside = abs(view.weights[channel][(start - 0.5 <= elements) & (elements <= stop - 0.5)])
        largest = max(largest, float(inside.max(initial=0.)))
    return largest or 1.


# --- rows of panels ---


def figure_size(views: Collection[KernelView], panels: int, margin: float) -> Tuple[float, float]:
    """Return the size in inches of a figure with a legend and a row of ``panels`` panels for each view."""
    width = max(_PANEL_WIDTHS[view.ndim] for view in views) * panels + 0.5
    return width, 1.45 * len(views) + margin + legend_height(width)


def draw_rows(
        figure: Any, views: Mapping[str, KernelView], columns: int, limits: Optional[Mapping[str, Any]] = None,
        with_titles: bool = True) -> None:
    """Draw a row for each view: its points, then its first kernels.

    ``limits`` are the weight of the heaviest point and the kernels' limits by the views' names; by default each panel
    has its own.
    """
    grid = figure.subplots(len(views), 1 + columns, squeeze=False)
    for row, (name, view) in zip(grid, views.items()):
        heaviest, highest = limits[name] if limits else (None, [None] * columns)
        draw_points(row[0], view, heaviest)
        (label,), style = drawable([layer_label(name, view)])
        row[0].set_ylabel(label, fontsize=7, **style)
        draw_kernel_row(row[1:], view, view.ndim == 1, highest)  # a line leaves room for the points
    if with_titles:
        channel = 'channel' if next(iter(views.values())).filter is None else 'input channel'
        for index, axes in enumerate(grid[0]):
            axes.set_title(f'{channel} {index - 1}' if index else 'points', fontsize=8)
    add_legend(figure, views.values(), with_points=False)


def add_legend(figure: Any, views: Collection[KernelView], with_points: bool) -> None:
    """Add a legend of elements, points and supports below the panels of a figure or subfigure.

    Args:
        figure: Figure or subfigure to draw on.
        views: Views of the panels.
        with_points: Whether 2-D kernels are drawn with their points; otherwise the points have panels of their own.
    """
    width = figure.get_figure(root=True).get_size_inches()[0]
    entries = [entry for ndim in sorted({view.ndim for view in views}) for entry in _legend_entries(ndim, with_points)]
    figure.legend(
        handles=entries, loc='outside lower center', ncols=_legend_columns(width), fontsize=7, frameon=False,
        borderaxespad=0.2, columnspacing=1.2)


def legend_height(width: float) -> float:
    """Return the height in inches of the legend in a figure of this width."""
    return 0.15 * math.ceil(_LEGEND_ENTRIES / _legend_columns(width)) + 0.1


def _legend_columns(width: float) -> int:
    return max(1, min(_LEGEND_ENTRIES, int(width / _LEGEND_ENTRY_WIDTH)))


def _legend_entries(ndim: int, with_points: bool) -> List[Artist]:
    if ndim == 1:
        return [
            Line2D([], [], color='tab:blue', linewidth=0.9, label='kernel over the steps (0: the present)'),
            _marker('o', 'point: its height is its weight (left: mean absolute)', 'tab:orange', 'black'),
            Line2D([], [], color='tab:orange', linewidth=1., label='support of a point: its radius')]
    colors = colormaps['RdBu_r']
    points = [
        _marker('o', 'point: its color is its weight, its size is fixed', 'white', 'black'),
        _marker('D', 'support of a point: its radius', 'none', '0.4'),
    ] if with_points else [
        _marker('o', 'point: darker for a larger mean absolute weight', '0.5', 'black'),
        _marker('D', 'support of a point: its radius', to_rgba('tab:orange', 0.4), 'tab:orange')]
    return [
        Patch(facecolor=colors(0.15), label='negative element of a kernel'),
        Patch(facecolor=colors(0.85), label='positive element (scaled per kernel)'),
        *points]


def _marker(marker: str, label: str, face: Any, edge: str) -> Line2D:
    return Line2D(
        [], [], linestyle='none', marker=marker, markersize=5, markeredgewidth=0.5, markerfacecolor=face,
        markeredgecolor=edge, label=label)


def draw_kernel_row(
        row: Sequence[Axes], view: KernelView, with_points: bool, limits: Sequence[Optional[float]]) -> None:
    """Draw the first kernels, one per panel; the rest of the row stays empty."""
    for channel, axes in enumerate(row):
        if channel < len(view.weights):
            draw_kernel(axes, view, channel, with_points, limits[channel])
            continue
        axes.axis('off')
        if view.ndim == 2:
            axes.set_box_aspect(1)  # otherwise its title would stand higher than the others


# --- over an image ---


def _draw_kernel_2d(axes: Axes, view: KernelView, channel: int, with_points: bool, limit: float) -> None:
    edge = view.edge
    axes.imshow(view.kernels[channel], extent=(-edge, edge, -edge, edge), cmap='RdBu_r', vmin=-limit, vmax=limit)
    if with_points:
        weights = view.weights[channel]
        heaviest = abs(weights).max() or 1.
        _add_diamonds(axes, view, facecolor='none', edgecolor='0.4', linewidth=0.3, alpha=0.5)
        _add_dots(axes, view, c=weights, s=6, cmap='RdBu_r', vmin=-heaviest, vmax=heaviest)
    axes.set(xlim=(-edge, edge), ylim=(-edge, edge), xticks=[], yticks=[])


def _draw_points_2d(axes: Axes, view: KernelView, heaviest: float) -> None:
    edge = view.edge
    _add_diamonds(axes, view, facecolor='tab:orange', edgecolor='tab:orange', linewidth=0.4, alpha=0.12)
    _add_dots(axes, view, c=view.point_weights, s=10, cmap='Greys', vmin=0, vmax=heaviest)
    axes.set(xlim=(-edge, edge), ylim=(-edge, edge), xticks=[], yticks=[], aspect='equal')


def _add_diamonds(axes: Axes, view: KernelView, **style: Any) -> None:
    diamonds = [
        Polygon([(x + r, y), (x, y + r), (x - r, y), (x, y - r)])
        for (x, y), r in zip(view.coords.tolist(), view.radius.tolist())]
    axes.add_collection(PatchCollection(diamonds, **style))


def _add_dots(axes: Axes, view: KernelView, **style: Any) -> None:
    axes.scatter(view.coords[:, 0], view.coords[:, 1], edgecolor='black', linewidth=0.3, **style)


# --- over time ---


def _draw_kernel_1d(axes: Axes, view: KernelView, channel: int, with_points: bool, limit: float) -> None:
    start, stop = view.visible
    steps = np.arange(start, stop) - (view.size - 1)
    values = view.kernels[channel, start:stop]
    axes.axhline(0, color='0.7', linewidth=0.5, zorder=0)
    axes.fill_between(steps, values, color='tab:blue', alpha=0.2, linewidth=0)
    axes.plot(steps, values, color='tab:blue', linewidth=0.9, marker='.' if len(steps) == 1 else None)
    if with_points:
        _add_bars(axes, view, view.weights[channel], size=7)
    axes.set(ylim=(-1.1 * limit, 1.45 * limit), yticks=[])  # with room for the text
    axes.text(0.02, 0.97, f'±{limit:.2g}', transform=axes.transAxes, fontsize=6, color='0.35', va='top')
    _set_step_axis(axes, steps[0], steps[-1])


def _draw_points_1d(axes: Axes, view: KernelView, heaviest: float) -> None:
    """Draw all points over the whole kernel; the range that its kernels are shown of is shaded."""
    weights = view.point_weights
    axes.vlines(_point_steps(view), 0, weights, color='0.6', linewidth=0.6, zorder=1)
    _add_bars(axes, view, weights, size=9)
    axes.axhline(0, color='0.7', linewidth=0.5, zorder=0)
    axes.set(ylim=(-0.06 * heaviest, 1.12 * heaviest), yticks=[])
    _set_step_axis(axes, 1 - view.size, 0)
    start, stop = view.visible
    if stop - start < view.size:
        axes.axvspan(
            start - view.size + 0.5, stop - view.size + 0.5, color='tab:blue', alpha=0.2, linewidth=0, zorder=0)
        share = _cumulative_share(view)
        axes.set_xlabel(f'shaded: {100 * (share[stop] - share[start]):.0f} % of the kernels', fontsize=6)


def _add_bars(axes: Axes, view: KernelView, heights: np.ndarray, size: float) -> None:
    steps, radius = _point_steps(view), view.radius * (view.size - 1) / 2
    axes.hlines(heights, steps - radius, steps + radius, color='tab:orange', linewidth=1., alpha=0.7, zorder=2)
    axes.scatter(steps, heights, s=size, color='tab:orange', edgecolor='black', linewidth=0.3, zorder=3)


def _set_step_axis(axes: Axes, first: int, last: int) -> None:
    ticks = sorted({first, (first + last) // 2, last})
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.set_xticks(ticks, [f'{step:,}'.replace('-', '\N{MINUS SIGN}') for step in ticks], fontsize=6)
    if len(ticks) > 1:
        labels = axes.get_xticklabels()
        labels[0].set_horizontalalignment('left')
        labels[-1].set_horizontalalignment('right')
    axes.tick_params(axis='x', length=2, pad=1.5)


def _point_steps(view: KernelView) -> np.ndarray:
    """Return the points' positions in steps from the present; the past is negative."""
    return (view.coords[:, 0] - 1) / 2 * (view.size - 1)


def _cumulative_share(view: KernelView) -> np.ndarray:
    """Return the share of the absolute kernels before each element, ``(k + 1,)``; zeros if the kernels are zero."""
    total = np.concatenate([[0.], abs(view.kernels).sum(0, dtype=np.float64).cumsum()])
    return total / (total[-1] or 1.)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
