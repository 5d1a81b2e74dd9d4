"""Sums of kernels over time, by how far back they look."""
from typing import Any, List

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

# Of a whole axis; far steps share one, as a picture has no room for each.
_BINS = 100


def draw_lags(axes: Axes, total: np.ndarray) -> List[Any]:
    """A sum of absolute kernels over the steps back from the present, on a logarithmic scale.

    Args:
        axes: Where to.
        total: ``(k,)``, not negative, the present last.

    Returns:
        What to explain in a legend.
    """
    back = total[::-1]  # the first is the present
    edges = np.unique(np.geomspace(1, len(back) + 1, _BINS).round().astype(int))
    means = np.add.reduceat(back, edges[:-1] - 1) / np.diff(edges)
    drawn: List[Any] = [axes.stairs(
        means / (means.max() or 1.), edges, fill=True, color='tab:purple', alpha=0.6,
        label='sum of absolute kernels over the largest')]
    if back.any():
        held = back.cumsum() / back.sum()
        drawn += axes.plot(
            np.arange(1, len(back) + 1), held, color='black', linewidth=1, label='share of it in the steps since')
        half = half_within(total)
        axes.axvline(half, color='0.5', linewidth=0.8, linestyle=':')
        axes.set_xlabel(f'half within {half:,} step{"s" if half > 1 else ""}', fontsize=9)
    axes.set(xscale='log', xlim=(len(back) + 1, 1), ylim=(0, 1.03), yticks=[0, 1])
    _set_ticks(axes, len(back))
    return drawn


def half_within(total: np.ndarray) -> int:
    """How many of the last steps hold half of a sum."""
    held = total[::-1].cumsum()
    # the last sum is all of it, whatever the rounding
    return min(int(np.searchsorted(held, held[-1] / 2)), len(held) - 1) + 1


def _set_ticks(axes: Axes, size: int) -> None:
    """Powers of ten, and the kernel's size unless it is too near to the last of them."""
    ticks = [10 ** power for power in range(len(str(size)))]
    if size > 2.5 * ticks[-1]:
        ticks.append(size)
    axes.set_xticks(ticks, [f'{tick:,}' for tick in ticks], fontsize=7)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis='y', labelsize=7)
