"""Pictures of kernels over an image, and of their points in it."""
from typing import Any, Optional

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.patches import Polygon

from .views import View


def draw_kernel(axes: Axes, view: View, channel: int, with_points: bool, limit: Optional[float]) -> None:
    """One kernel in colours, blue negative and red positive."""
    limit = limit or limit_of(view, channel, with_points)
    edge = view.edge
    axes.imshow(view.kernels[channel], extent=(-edge, edge, -edge, edge), cmap='RdBu_r', vmin=-limit, vmax=limit)
    if with_points:
        weights = view.weights[channel]
        heaviest = abs(weights).max() or 1.
        _add_reaches(axes, view, facecolor='none', edgecolor='0.4', linewidth=0.3, alpha=0.5)
        _add_dots(axes, view, c=weights, s=6, cmap='RdBu_r', vmin=-heaviest, vmax=heaviest)
    axes.set(xlim=(-edge, edge), ylim=(-edge, edge), xticks=[], yticks=[])


def limit_of(view: View, channel: int, with_points: bool) -> float:
    """Value of the darkest colours: the dots have a scale of their own."""
    return float(abs(view.kernels[channel]).max()) or 1.


def draw_points(axes: Axes, view: View, heaviest: Optional[float]) -> None:
    """All points over the area of the kernel, the darker the heavier."""
    weights = view.point_weights
    edge = view.edge
    _add_reaches(axes, view, facecolor='tab:orange', edgecolor='tab:orange', linewidth=0.4, alpha=0.12)
    _add_dots(axes, view, c=weights, s=10, cmap='Greys', vmin=0, vmax=heaviest or weights.max() or 1.)
    axes.set(xlim=(-edge, edge), ylim=(-edge, edge), xticks=[], yticks=[], aspect='equal')


def _add_reaches(axes: Axes, view: View, **style: Any) -> None:
    diamonds = [
        Polygon([(x + r, y), (x, y + r), (x - r, y), (x, y - r)])
        for (x, y), r in zip(view.coords.tolist(), view.radius.tolist())
    ]
    axes.add_collection(PatchCollection(diamonds, **style))


def _add_dots(axes: Axes, view: View, **style: Any) -> None:
    axes.scatter(view.coords[:, 0], view.coords[:, 1], edgecolor='black', linewidth=0.3, **style)
