"""Where the kernels of a stage are: their absolute values, summed."""
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Union

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from smpconv_models.layers import SMPDepthwiseConv2d

from .squares import central_square

_STAGE = re.compile(r'(?:^|[._])stages[._](\d+)[._]')


class StageSum(NamedTuple):
    """Of the large kernels in a stage.

    Attributes:
        total: Sum of the absolute kernels of all channels and layers, ``(k, k)``, float64.
        layers: How many layers there are.
    """
    total: np.ndarray
    layers: int


def stage_sums(model: nn.Module) -> Dict[int, StageSum]:
    """The summed absolute kernels of each stage, which figure 5 of the paper shows of single layers.

    A stage is what is under a module ``stages.N``, as in most of timm's networks. Its kernels are those drawn from
    points where there are any, as they are drawn: without the parallel small ones and the norms. Else, in
    re-parameterized models and in other networks, they are the largest square ones of its depthwise ``nn.Conv2d``, with
    what is folded into them.

    Args:
        model: Any network.

    Raises:
        ValueError: It has no such kernels, or some that are not finite.
    """
    found: Dict[int, List[Tensor]] = {}
    for is_wanted in (_is_drawn, _is_depthwise):
        of_this_kind: Dict[int, List[Tensor]] = {}
        for name, module in model.named_modules():
            stage = _STAGE.search(name)
            if stage is not None and is_wanted(module):
                of_this_kind.setdefault(int(stage[1]), []).append(_kernel(module))
        found = {**of_this_kind, **found}
    if not found:
        raise ValueError('expected depthwise convolutions in modules named stages.N, found none')
    return {stage: _sum(kernels) for stage, kernels in sorted(found.items())}


def _is_drawn(module: nn.Module) -> bool:
    return isinstance(module, SMPDepthwiseConv2d)


def _is_depthwise(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d) or module.groups != module.in_channels or module.groups == 1:
        return False
    return module.kernel_size[0] == module.kernel_size[1] > 1


@torch.no_grad()
def _kernel(module: Any) -> Tensor:
    return module.kernel() if _is_drawn(module) else module.weight


def _sum(kernels: List[Tensor]) -> StageSum:
    largest = max(kernel.shape[-1] for kernel in kernels)
    kernels = [kernel for kernel in kernels if kernel.shape[-1] == largest]
    total = sum(kernel.detach().double().abs().sum((0, 1)).cpu() for kernel in kernels)
    assert isinstance(total, Tensor)
    if not total.isfinite().all():
        raise ValueError('the kernels are not finite')
    return StageSum(total.numpy(), len(kernels))


def save_stages(path: Union[str, Path], models: Mapping[str, nn.Module]) -> None:
    """A PNG of :func:`stage_sums`: a row for each network, a column for each stage, each divided by its largest value.

    The square is the smallest central one that holds half of the sum.

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
    picture: Any = None
    for row, (name, stages) in zip(grid, sums.items()):
        for axes in row[len(stages):]:
            axes.axis('off')
        for axes, (stage, found) in zip(row, stages.items()):
            picture = _draw(axes, stage, found)
        row[0].set_ylabel(name, fontsize=10, parse_math=False)
    figure.colorbar(picture, ax=grid, label='sum of absolute kernels over the largest', shrink=0.8, aspect=30)
    figure.savefig(path, dpi=130, format='png')


def _named(name: str, model: nn.Module) -> Dict[int, StageSum]:
    try:
        return stage_sums(model)
    except ValueError as error:
        raise ValueError(f'{name}: {error}') from error


def _draw(axes: Axes, stage: int, found: StageSum) -> Any:
    size = len(found.total)
    reach = size // 2  # the middle element is 0
    largest: Optional[float] = found.total.max() or None
    edges = (-reach - 0.5, reach + 0.5, -reach - 0.5, reach + 0.5)
    picture = axes.imshow(found.total / (largest or 1.), extent=edges, cmap='magma', vmin=0, vmax=1)
    layers = f'{found.layers} layer{"s" if found.layers > 1 else ""}'
    axes.set_title(f'stage {stage}: {size}x{size}, {layers}', fontsize=9)
    axes.set(xticks=[-reach, 0, reach], yticks=[])
    if largest:
        half = central_square(found.total, 0.5)
        axes.add_patch(Rectangle(
            (-half.side / 2, -half.side / 2), half.side, half.side, fill=False, edgecolor='white', linewidth=1))
        axes.set_xlabel(f'half within {half}', fontsize=9)
    return picture
