"""Where the kernels of a stage or block are: their absolute values, summed."""
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Union

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from smpconv_models.layers import CausalConv1d, FFTConv2d, SMPLayer

from .lags import draw_lags
from .squares import central_square
from .views import size_text

# Where kernels of so many dimensions belong together, and what that is called.
_PLACES = {1: re.compile(r'(?:^|[._])blocks[._](\d+)[._]'), 2: re.compile(r'(?:^|[._])stages[._](\d+)[._]')}
_NAMES = {1: 'block', 2: 'stage'}


class StageSum(NamedTuple):
    """Of the large kernels in a stage, or in a block of a network for sequences.

    Attributes:
        total: Sum of the absolute kernels of all channels and layers, ``(k, k)``, over time ``(k,)``; float64.
        layers: How many layers there are.
    """
    total: np.ndarray
    layers: int


def stage_sums(model: nn.Module) -> Dict[int, StageSum]:
    """The summed absolute kernels of each stage, which figure 5 of the paper shows of single layers.

    A stage is what is under a module ``stages.N``, as in most of timm's networks; of kernels over time, what is under
    ``blocks.N``. Its kernels are those drawn from points where there are any, as they are drawn: without the parallel
    small ones and the norms. Else, in re-parameterized models and in other networks, they are the largest square ones
    of its depthwise ``nn.Conv2d``, or the largest of what takes the place of layers with points per filter, with what
    is folded into them.

    Args:
        model: Any network.

    Raises:
        ValueError: It has no such kernels, or some that are not finite.
    """
    found: Dict[int, List[Tensor]] = {}
    for is_wanted in (_is_drawn, _is_plain):
        of_this_kind: Dict[int, List[Tensor]] = {}
        for name, module in model.named_modules():
            if is_wanted(module) and (stage := _place(name, module)):
                of_this_kind.setdefault(int(stage[1]), []).append(_absolute(module))
        found = {**of_this_kind, **found}
    if not found:
        raise ValueError(
            'expected depthwise convolutions in modules named stages.N, found none, nor layers with points per filter '
            'in stages.N or, over time, in blocks.N')
    return {stage: _sum(kernels) for stage, kernels in sorted(found.items())}


def _is_drawn(module: nn.Module) -> bool:
    return isinstance(module, SMPLayer)


def _is_plain(module: nn.Module) -> bool:
    if isinstance(module, (CausalConv1d, FFTConv2d)):
        return True
    if not isinstance(module, nn.Conv2d) or module.groups != module.in_channels or module.groups == 1:
        return False
    return module.kernel_size[0] == module.kernel_size[1] > 1


def _place(name: str, module: Any) -> Optional[re.Match]:
    ndim = module.coords.shape[-1] if _is_drawn(module) else module.weight.ndim - 2
    return _PLACES[ndim].search(name)


@torch.no_grad()
def _absolute(module: Any) -> Tensor:
    """Its absolute kernels, summed at once: those of 16,000 steps would fill the memory together."""
    kernel = module.kernel() if _is_drawn(module) else module.weight
    return kernel.detach().abs().sum((0, 1), dtype=torch.float64).cpu()


def _sum(kernels: List[Tensor]) -> StageSum:
    largest = max(kernel.shape[-1] for kernel in kernels)
    kernels = [kernel for kernel in kernels if kernel.shape[-1] == largest]
    total = torch.stack(kernels).sum(0)
    if not total.isfinite().all():
        raise ValueError('the kernels are not finite')
    return StageSum(total.numpy(), len(kernels))


def save_stages(path: Union[str, Path], models: Mapping[str, nn.Module]) -> None:
    """A PNG of :func:`stage_sums`: a row for each network, a column for each stage, each divided by its largest value.

    The square is the smallest central one that holds half of the sum. Sums over time are curves over the steps back
    from the present, which is at the right, on a logarithmic scale; a second curve tells what share of the sum the last
    steps hold.

    Args:
        path: Where to.
        models: By what to call them.

    Raises:
        ValueError: As :func:`stage_sums`, with the network's name.
    """
    sums = {name: _named(name, model) for name, model in models.items()}
    columns = max(map(len, sums.values()))
    figure = Figure(figsize=(2.4 * columns + 1.2, 2.9 * len(sums)), layout='compressed')
    grid = figure.subplots(len(sums), columns, squeeze=False)
    picture, curves = None, None
    for row, (name, stages) in zip(grid, sums.items()):
        for axes in row[len(stages):]:
            axes.axis('off')
        for axes, (stage, found) in zip(row, stages.items()):
            axes.set_title(_title(stage, found), fontsize=9)
            if found.total.ndim == 1:
                curves = draw_lags(axes, found.total)
            else:
                picture = _draw(axes, found)
        row[0].set_ylabel(name, fontsize=10, parse_math=False)
    if curves is not None:
        figure.supxlabel('steps back (1: the present)', fontsize=9)
        figure.legend(
            handles=curves, loc='outside upper center', ncols=min(columns, 2), fontsize=8, frameon=False)
    if picture is not None:
        line = '\n' if len(sums) == 1 else ' '  # on a single one the end would be cut off
        figure.colorbar(
            picture, ax=grid, label=f'sum of absolute kernels{line}over the largest', shrink=0.8, aspect=30)
    figure.savefig(path, dpi=130, format='png')


def _title(stage: int, found: StageSum) -> str:
    layers = f'{found.layers} layer{"s" if found.layers > 1 else ""}'
    return f'{_NAMES[found.total.ndim]} {stage}: {size_text(len(found.total), found.total.ndim)}, {layers}'


def _named(name: str, model: nn.Module) -> Dict[int, StageSum]:
    try:
        return stage_sums(model)
    except ValueError as error:
        raise ValueError(f'{name}: {error}') from error


def _draw(axes: Axes, found: StageSum) -> Any:
    size = len(found.total)
    reach = size // 2  # the middle element is 0
    largest: Optional[float] = found.total.max() or None
    edges = (-reach - 0.5, reach + 0.5, -reach - 0.5, reach + 0.5)
    picture = axes.imshow(found.total / (largest or 1.), extent=edges, cmap='magma', vmin=0, vmax=1)
    axes.set(xticks=[-reach, 0, reach], yticks=[])
    if largest:
        half = central_square(found.total, 0.5)
        axes.add_patch(Rectangle(
            (-half.side / 2, -half.side / 2), half.side, half.side, fill=False, edgecolor='white', linewidth=1))
        axes.set_xlabel(f'half within {half}', fontsize=9)
    return picture
