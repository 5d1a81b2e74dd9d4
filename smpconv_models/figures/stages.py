"""Plots of the absolute kernels of a stage or block, summed."""
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Union

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator
from torch import Tensor, nn

from smpconv_models.layers import CausalConv1d, FFTConv2d, SMPLayer
from smpconv_models.utils.errors import error_prefix

from ._text import drawable
from .kernels import size_label
from .receptive_field import central_square

# Names of the modules whose kernels are summed together, by the kernels' dimensions, and the word for such a module.
_GROUPS = {
    1: (re.compile(r'(?:^|[._])blocks[._](\d+)[._]'), 'block'),
    2: (re.compile(r'(?:^|[._])stages[._](\d+)[._]'), 'stage'),
}
# Maximum number of bars over the steps of a sequence.
_MAX_BARS = 100


class StageSum(NamedTuple):
    """Summed large kernels of a stage, or of a block of a sequence network.

    Attributes:
        total: Sum of the absolute kernels of all channels and layers, ``(k, k)``, over time ``(k,)``; float64.
        layers: Number of layers.
    """
    total: np.ndarray
    layers: int


def stage_sums(model: nn.Module) -> Dict[int, StageSum]:
    """Return the summed absolute kernels of each stage; figure 5 of the paper shows those of single layers.

    A stage is a module ``stages.N``, as in most timm networks; for kernels over time it is a module ``blocks.N``. Only
    its largest kernels are summed. In SMP layers these are the kernels sampled from points, without the parallel small
    kernels and the norms. If a stage has no SMP layers, as after re-parameterization or in other networks, these are
    the square kernels of its depthwise ``nn.Conv2d``, and the convolutions that replace layers with points per filter,
    with everything that is folded into them.

    Args:
        model: Any network.

    Raises:
        ValueError: If the network has no such kernels, or some are not finite.
    """
    found: Dict[int, List[Tensor]] = {}
    for is_wanted in (_is_smp_layer, _is_plain_conv):
        by_stage: Dict[int, List[Tensor]] = {}
        for name, module in model.named_modules():
            if is_wanted(module):
                conv: Any = module
                ndim = conv.coords.shape[-1] if _is_smp_layer(conv) else conv.weight.ndim - 2
                stage = _GROUPS[ndim][0].search(name)
                if stage:
                    by_stage.setdefault(int(stage[1]), []).append(_absolute_sum(conv))
        found = {**by_stage, **found}
    if not found:
        raise ValueError(
            'expected depthwise convolutions in modules named stages.N, found none, nor layers with points per filter '
            'in stages.N or, over time, in blocks.N')
    return {stage: _sum_largest(kernels) for stage, kernels in sorted(found.items())}


def save_stages(path: Union[str, Path], models: Mapping[str, nn.Module]) -> None:
    """Save a PNG of :func:`stage_sums`: a row per network, a column per stage, each divided by its largest value.

    The square is the smallest central one that holds half of the sum. Sums over time are curves over the steps back
    from the present, which is at the right, on a logarithmic scale. A second curve shows the share of the sum in the
    most recent steps.

    Args:
        path: Path of the file to write.
        models: Networks by label.

    Raises:
        ValueError: If :func:`stage_sums` raises it; the message starts with the network's label.
    """
    sums = {}
    for name, model in models.items():
        with error_prefix(name):
            sums[name] = stage_sums(model)
    columns = max(map(len, sums.values()))
    figure = Figure(figsize=(2.4 * columns + 1.2, 2.9 * len(sums)), layout='compressed')
    grid = figure.subplots(len(sums), columns, squeeze=False)
    picture, curves = None, None
    for row, (name, stages) in zip(grid, sums.items()):
        for axes in row[len(stages):]:
            axes.axis('off')
        for axes, (stage, found) in zip(row, stages.items()):
            size, ndim = len(found.total), found.total.ndim
            layers = f'{found.layers} layer{"s" if found.layers > 1 else ""}'
            axes.set_title(f'{_GROUPS[ndim][1]} {stage}: {size_label(size, ndim)}, {layers}', fontsize=9)
            if ndim == 1:
                curves = draw_step_sum(axes, found.total)
            else:
                picture = _draw_square_sum(axes, found.total)
        (label,), style = drawable([name])
        row[0].set_ylabel(label, fontsize=10, **style)
    if curves is not None:
        figure.supxlabel('steps back (1: the present)', fontsize=9)
        figure.legend(handles=curves, loc='outside upper center', ncols=min(columns, 2), fontsize=8, frameon=False)
    if picture is not None:
        line = '\n' if len(sums) == 1 else ' '  # a single row would cut off the end
        figure.colorbar(picture, ax=grid, label=f'sum of absolute kernels{line}over the largest', shrink=0.8, aspect=30)
    figure.savefig(path, dpi=130, format='png')


def draw_step_sum(axes: Axes, total: np.ndarray) -> List[Any]:
    """Draw absolute kernels, summed to ``(k,)``, over the steps back from the present; return handles for a legend."""
    back = total[::-1]  # the first is the present
    edges = np.unique(np.geomspace(1, len(back) + 1, _MAX_BARS).round().astype(int))
    means = np.add.reduceat(back, edges[:-1] - 1) / np.diff(edges)
    handles: List[Any] = [axes.stairs(
        means / (means.max() or 1.), edges, fill=True, color='tab:purple', alpha=0.6,
        label='sum of absolute kernels over the largest')]
    if back.any():
        share = back.cumsum() / back.sum()
        handles += axes.plot(
            np.arange(1, len(back) + 1), share, color='black', linewidth=1, label='share of it in the steps since')
        half = steps_with_half(total)
        axes.axvline(half, color='0.5', linewidth=0.8, linestyle=':')
        axes.set_xlabel(f'half within {half:,} step{"s" if half > 1 else ""}', fontsize=9)
    axes.set(xscale='log', xlim=(len(back) + 1, 1), ylim=(0, 1.03), yticks=[0, 1])
    ticks = [10 ** power for power in range(len(str(len(back))))]
    if len(back) > 2.5 * ticks[-1]:  # otherwise the two labels would overlap
        ticks.append(len(back))
    axes.set_xticks(ticks, [f'{tick:,}' for tick in ticks], fontsize=7)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis='y', labelsize=7)
    return handles


def steps_with_half(total: np.ndarray) -> int:
    """Return the number of most recent steps that hold half of a sum."""
    cumulative = total[::-1].cumsum()
    # its last element is the whole sum, whatever the rounding
    return min(int(np.searchsorted(cumulative, cumulative[-1] / 2)), len(cumulative) - 1) + 1


def _is_smp_layer(module: nn.Module) -> bool:
    return isinstance(module, SMPLayer)


def _is_plain_conv(module: nn.Module) -> bool:
    if isinstance(module, (CausalConv1d, FFTConv2d)):
        return True
    if not isinstance(module, nn.Conv2d) or module.groups != module.in_channels or module.groups == 1:
        return False
    return module.kernel_size[0] == module.kernel_size[1] > 1


@torch.no_grad()
def _absolute_sum(conv: Any) -> Tensor:
    """Return the sum of a layer's absolute kernels; all kernels of 16,000 steps at once would fill the memory."""
    kernel = conv.kernel() if _is_smp_layer(conv) else conv.weight
    return kernel.detach().abs().sum((0, 1), dtype=torch.float64).cpu()


def _sum_largest(kernels: List[Tensor]) -> StageSum:
    largest = max(kernel.shape[-1] for kernel in kernels)
    kernels = [kernel for kernel in kernels if kernel.shape[-1] == largest]
    total = torch.stack(kernels).sum(0)
    if not total.isfinite().all():
        raise ValueError('the kernels are not finite')
    return StageSum(total.numpy(), len(kernels))


def _draw_square_sum(axes: Axes, total: np.ndarray) -> Any:
    half_side = len(total) // 2  # the middle element is 0
    largest = total.max()
    edges = (-half_side - 0.5, half_side + 0.5, -half_side - 0.5, half_side + 0.5)
    picture = axes.imshow(total / (largest or 1.), extent=edges, cmap='magma', vmin=0, vmax=1)
    axes.set(xticks=[-half_side, 0, half_side], yticks=[])
    if largest:
        half = central_square(total, 0.5)
        axes.add_patch(Rectangle(
            (-half.side / 2, -half.side / 2), half.side, half.side, fill=False, edgecolor='white', linewidth=1))
        axes.set_xlabel(f'half within {half}', fontsize=9)
    return picture
