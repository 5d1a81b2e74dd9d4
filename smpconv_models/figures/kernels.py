"""Pictures of kernels and of the points that they are drawn from."""
import difflib
from pathlib import Path
from typing import Any, Collection, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from smpconv_models.layers import SMPLayer, smp_layers

from . import kernels_1d, kernels_2d
from .views import View, label_of, view_of

# How kernels of so many dimensions are drawn.
_OF_DIMENSIONS: Dict[int, Any] = {1: kernels_1d, 2: kernels_2d}
# Inches of a panel: a line needs more room than a square.
_WIDTHS = {1: 2.2, 2: 1.4}


def draw_kernel(
        axes: Axes,
        layer: Union[SMPLayer, View],
        channel: int,
        with_points: bool = True,
        limit: Optional[float] = None,
        filter: int = 0,
) -> None:
    """One channel's kernel with the points it is drawn from, as figure 4 of the paper shows them.

    Over an image, colours are symmetric about zero, blue negative and red positive. A dot is a point, in the colour of
    its weight; the diamond around it is its reach, an L1 ball of its radius.

    Over time it is a line, with the present, step 0, at the right. A dot is a point, at the height of its weight; the
    bar through it is its reach. Of long kernels that points reach little of, the picture shows the stretch that holds
    most of the filter's absolute kernels and can still be seen: that is at least 256 steps, and 32 times the median
    radius. :func:`draw_points` shows where it is.

    Points outside the kernel lie outside the picture.

    Args:
        axes: Where to.
        layer: Whose kernel.
        channel: Its number; of filters, that of the input channel.
        with_points: Or the kernel alone.
        limit: Value of the darkest colours, or of the highest points of the line, else as large as this kernel needs.
        filter: Number of the filter, in layers whose filters have points of their own.

    Raises:
        ValueError: There is no such filter.
    """
    view = view_of(layer, filter)
    _OF_DIMENSIONS[view.ndim].draw_kernel(axes, view, channel, with_points, limit)


def draw_points(
        axes: Axes,
        layer: Union[SMPLayer, View],
        heaviest: Optional[float] = None,
        filter: int = 0,
) -> None:
    """The points that channels share, over the area of the kernel: a depthwise layer's, or those of one filter.

    A dot is a point, the darker the more it weighs: its absolute weight, averaged over the channels. The diamonds are
    the points' reaches, as in :func:`draw_kernel`. Over time, the height is the weight.

    Args:
        axes: Where to.
        layer: Whose points.
        heaviest: Weight of the darkest or highest dots, else the largest of these points.
        filter: As in :func:`draw_kernel`.

    Raises:
        ValueError: There is no such filter.
    """
    view = view_of(layer, filter)
    _OF_DIMENSIONS[view.ndim].draw_points(axes, view, heaviest)


def choose_span(views: Sequence[View]) -> Optional[Tuple[int, int]]:
    """The elements that pictures of kernels over time show, the same of all; None over images: they show all."""
    return kernels_1d.choose_span(views) if views[0].ndim == 1 else None


def limits_of(view: View, columns: int) -> List[float]:
    """What the darkest colours of the first kernels mean, or their highest points."""
    draws = _OF_DIMENSIONS[view.ndim]
    return [draws.limit_of(view, channel, has_points(view)) for channel in range(min(columns, len(view.weights)))]


def has_points(view: View) -> bool:
    """Whether kernels beside a picture of their points show them too: a line leaves room for them."""
    return view.ndim == 1


def save_kernels(
        path: Union[str, Path],
        model: nn.Module,
        layers: Optional[Sequence[str]] = None,
        max_layers: int = 6,
        columns: int = 6,
        filter: int = 0,
) -> None:
    """A PNG like figure 4 of the paper: a row for each layer, first its points with their reaches, then kernels.

    Where filters have points of their own, a row is one filter, and its kernels are those of its input channels.

    The paper's kernels are absolute values; these have their signs, each with colours of its own scale.

    Args:
        path: Where to.
        model: Whose kernels; its channels' first ones are shown.
        layers: Names of those shown, else of at most ``max_layers``, evenly over the depth.
        max_layers: See ``layers``.
        columns: Kernels shown of each.
        filter: Number of the filter.

    Raises:
        ValueError: The model has no such layers, or none at all, or one has no such filter.
    """
    views = views_of(choose_layers(model, layers, max_layers), filter)
    columns = min(columns, max(len(view.weights) for view in views.values()))
    figure = Figure(figsize=figure_size(views.values(), 1 + columns, 0.3), layout='constrained')
    name_columns(draw_rows(figure, views, columns), next(iter(views.values())))
    figure.savefig(path, dpi=130, format='png')


def views_of(layers: Mapping[str, SMPLayer], filter: int = 0) -> Dict[str, View]:
    """Of each layer its points, or those of one filter.

    Raises:
        ValueError: A layer has no such filter.
    """
    views = {}
    for name, layer in layers.items():
        try:
            views[name] = view_of(layer, filter)
        except ValueError as error:
            raise ValueError(f'{name}: {error}') from error
    return views


def figure_size(views: Collection[View], panels: int, margin: float) -> Tuple[float, float]:
    """Inches of a figure with a row of so many panels for each view."""
    return max(_WIDTHS[view.ndim] for view in views) * panels + 0.5, 1.45 * len(views) + margin


def draw_rows(figure: Any, views: Mapping[str, View], columns: int, limits: Optional[Mapping[str, Any]] = None) -> Any:
    """A row for each view: its points, then kernels.

    Args:
        figure: Or a part of one.
        views: By the layers' names.
        columns: Kernels of each.
        limits: By the same names, the weight of the heaviest point and the kernels' limits, else each panel's own.

    Returns:
        The panels, row by row.
    """
    grid = figure.subplots(len(views), 1 + columns, squeeze=False)
    for row, (name, view) in zip(grid, views.items()):
        heaviest, highest = limits[name] if limits else (None, [None] * columns)
        draw_points(row[0], view, heaviest)
        row[0].set_ylabel(label_of(name, view), fontsize=7)
        draw_kernels(row[1:], view, has_points(view), highest)
    if any(view.ndim == 1 for view in views.values()):
        figure.supxlabel('steps (0: the present)', fontsize=8)
    return grid


def name_columns(grid: Any, view: View) -> None:
    """Titles over :func:`draw_rows`."""
    for index, axes in enumerate(grid[0]):
        axes.set_title(f'{view.kernel_name} {index - 1}' if index else 'points', fontsize=8)


def draw_kernels(row: Sequence[Axes], view: View, with_points: bool, limits: Sequence[Optional[float]]) -> None:
    """The first kernels, one in each panel; what is left of the row stays empty."""
    for channel, axes in enumerate(row):
        if channel < len(view.weights):
            draw_kernel(axes, view, channel, with_points, limits[channel])
            continue
        axes.axis('off')
        if view.ndim == 2:
            axes.set_box_aspect(1)  # or its title would stand higher than the others


def choose_layers(
        model: nn.Module,
        names: Optional[Sequence[str]] = None,
        most: int = 6,
) -> Dict[str, SMPLayer]:
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
