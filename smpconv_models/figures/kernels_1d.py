"""Pictures of kernels over time, and of their points in it: the present, step 0, is at the right."""
import math
from typing import Optional, Sequence, Tuple

import numpy as np
from matplotlib.axes import Axes

from .views import View

# Steps that a panel of two inches can tell apart.
_TOLD_APART = 256
# A longer stretch is shown where points reach far: as many of their radii.
_RADII = 32


def choose_span(views: Sequence[View]) -> Tuple[int, int]:
    """The stretch of long kernels that a panel can show element by element: where most of their sum is.

    All of it where that is less than twice as long. Of stretches that hold as much it is the one up to the present,
    else the middle one.

    Args:
        views: Of one size, those that share the stretch.

    Returns:
        Its first element and the one behind its last.
    """
    size = views[0].size
    reach = float(np.median([view.radius for view in views])) * (size - 1) / 2
    length = max(_TOLD_APART, math.ceil(_RADII * reach))
    if 2 * length > size:
        return 0, size
    held = sum((_held(view) for view in views), np.zeros(size + 1))
    if not held[-1]:
        return 0, size
    sums = held[length:] - held[:-length]
    best = np.flatnonzero(sums >= sums.max() * (1 - 1e-9))  # many, where all else is zero
    reaches_present = best[-1] == len(sums) - 1
    start = int(best[-1] if reaches_present else best[len(best) // 2])
    return start, start + length


def _shown(view: View) -> Tuple[int, int]:
    return view.span or choose_span([view])


def _held(view: View) -> np.ndarray:
    """Share of the absolute kernels before each element, and of all: 1 unless they are zero."""
    held = np.concatenate([[0.], abs(view.kernels).sum(0, dtype=np.float64).cumsum()])
    return held / (held[-1] or 1.)


def draw_kernel(axes: Axes, view: View, channel: int, with_points: bool, limit: Optional[float]) -> None:
    """One kernel as a line over a stretch of it, with the points at their places and weights."""
    start, stop = _shown(view)
    limit = limit or limit_of(view, channel, with_points)
    steps = np.arange(start, stop) - (view.size - 1)
    values = view.kernels[channel, start:stop]
    axes.axhline(0, color='0.7', linewidth=0.5, zorder=0)
    axes.fill_between(steps, values, color='tab:blue', alpha=0.2, linewidth=0)
    axes.plot(steps, values, color='tab:blue', linewidth=0.9, marker='.' if len(steps) == 1 else None)
    if with_points:
        _add_points(axes, view, view.weights[channel], size=7)
    axes.set(ylim=(-1.1 * limit, 1.45 * limit), yticks=[])  # with room for the text
    axes.text(0.02, 0.97, f'±{limit:.2g}', transform=axes.transAxes, fontsize=6, color='0.35', va='top')
    _set_steps(axes, steps[0], steps[-1])


def limit_of(view: View, channel: int, with_points: bool) -> float:
    """What a picture of this kernel must have room for: its largest absolute value, and the weights of its points."""
    start, stop = _shown(view)
    largest = float(abs(view.kernels[channel, start:stop]).max())
    if with_points:
        elements = _steps(view) + view.size - 1
        inside = abs(view.weights[channel][(start - 0.5 <= elements) & (elements <= stop - 0.5)])
        largest = max(largest, float(inside.max(initial=0.)))
    return largest or 1.


def draw_points(axes: Axes, view: View, heaviest: Optional[float]) -> None:
    """All points over the whole kernel, the higher the heavier; the stretch that its kernels are shown of is shaded."""
    weights = view.point_weights
    heaviest = heaviest or float(weights.max()) or 1.
    axes.vlines(_steps(view), 0, weights, color='0.6', linewidth=0.6, zorder=1)
    _add_points(axes, view, weights, size=9)
    axes.axhline(0, color='0.7', linewidth=0.5, zorder=0)
    axes.set(ylim=(-0.06 * heaviest, 1.12 * heaviest), yticks=[])
    _set_steps(axes, 1 - view.size, 0)
    start, stop = _shown(view)
    if stop - start < view.size:
        axes.axvspan(
            start - view.size + 0.5, stop - view.size + 0.5, color='tab:blue', alpha=0.2, linewidth=0, zorder=0)
        held = _held(view)
        axes.set_xlabel(f'shaded: {100 * (held[stop] - held[start]):.0f} % of the kernels', fontsize=6)


def _steps(view: View) -> np.ndarray:
    """Where the points are, in steps from the present; negative in the past."""
    return (view.coords[:, 0] - 1) / 2 * (view.size - 1)


def _add_points(axes: Axes, view: View, heights: np.ndarray, size: float) -> None:
    steps, reach = _steps(view), view.radius * (view.size - 1) / 2
    axes.hlines(heights, steps - reach, steps + reach, color='tab:orange', linewidth=1., alpha=0.7, zorder=2)
    axes.scatter(steps, heights, s=size, color='tab:orange', edgecolor='black', linewidth=0.3, zorder=3)


def _set_steps(axes: Axes, first: int, last: int) -> None:
    """The axis, in whole steps."""
    ticks = sorted({first, (first + last) // 2, last})
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.set_xticks(ticks, [f'{step:,}'.replace('-', '\N{MINUS SIGN}') for step in ticks], fontsize=6)
    if len(ticks) > 1:
        labels = axes.get_xticklabels()
        labels[0].set_horizontalalignment('left')
        labels[-1].set_horizontalalignment('right')
    axes.tick_params(axis='x', length=2, pad=1.5)
