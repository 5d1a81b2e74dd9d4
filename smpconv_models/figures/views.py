"""A set of points with its kernels, as pictures need it: the same for every kind of layer."""
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Optional, Tuple, Union

import numpy as np
import torch
from torch import Tensor, nn

from smpconv_models.layers import SMPLayer, clip_radius


@dataclass(frozen=True, eq=False)
class View:
    """One set of points and the kernels that are drawn from it.

    Those are the kernels of all channels in a depthwise layer, whose channels share the points, and else one filter's,
    a kernel for each of its input channels.

    Attributes:
        layer: With these points alone.
        filter: Number of the filter; None in a depthwise layer.
        span: First element of a kernel over time that its pictures show, and the one behind the last; None where
            they are to choose.
    """
    layer: SMPLayer
    filter: Optional[int]
    span: Optional[Tuple[int, int]] = None

    @cached_property
    def coords(self) -> np.ndarray:
        """``(P, d)``."""
        return _array(self.layer.coords).reshape(-1, self.ndim)

    @cached_property
    def radius(self) -> np.ndarray:
        """``(P,)``, as the forward pass uses it."""
        return _array(clip_radius(self.layer.radius, *self.layer.radius_range)).reshape(-1)

    @cached_property
    def weights(self) -> np.ndarray:
        """``(R, P)``: of each kernel."""
        return _array(self.layer.weight).reshape(-1, self.layer.weight.shape[-1])

    @cached_property
    def kernels(self) -> np.ndarray:
        """``(R, k)`` or ``(R, k, k)``, drawn at the first use."""
        with torch.no_grad():
            kernels = self.layer.kernel()
        return _array(kernels).reshape(-1, *kernels.shape[2:])

    @property
    def ndim(self) -> int:
        """Dimensions d of the kernels: 1 over time, 2 over an image."""
        return self.layer.coords.shape[-1]

    @property
    def size(self) -> int:
        """Elements k along a kernel's side."""
        return self.layer.kernel_size

    @property
    def edge(self) -> float:
        """Coordinate where a picture ends: the centres of the elements span [-1, 1]."""
        return 1 + 1 / max(self.size - 1, 1)

    @property
    def point_weights(self) -> np.ndarray:
        """Absolute weights, averaged over the kernels, ``(P,)``."""
        return abs(self.weights).mean(0)

    @property
    def kernel_name(self) -> str:
        """What a single kernel is of."""
        return 'channel' if self.filter is None else 'input channel'

    def __str__(self) -> str:
        return size_text(self.size, self.ndim)


def view_of(layer: Union[SMPLayer, View], filter: int = 0) -> View:
    """A layer's points with their kernels: of one filter, where each has points of its own. A view stays as it is.

    Raises:
        ValueError: There is no such filter.
    """
    if isinstance(layer, View):
        return layer
    if layer.coords.ndim == 2:
        if filter != 0:
            raise ValueError(f'filter must be 0 in a depthwise layer, whose channels share their points, got {filter}')
        return View(layer, None)
    if not 0 <= filter < len(layer.coords):
        raise ValueError(f'filter must lie in [0, {len(layer.coords) - 1}], got {filter}')
    return View(_alone(layer, filter), filter)


def _alone(layer: Any, filter: int) -> SMPLayer:
    """A layer of this filter only: the kernels of all others would be drawn for nothing, of up to 16,000 steps each."""
    alone = type(layer)(
        layer.in_channels, 1, layer.base_size, layer.coords.shape[1], bias=False, radius_range=layer.radius_range,
        device='meta')
    alone.resize(layer.kernel_size)
    for name in ('weight', 'coords', 'radius'):
        setattr(alone, name, nn.Parameter(getattr(layer, name)[filter:filter + 1].detach()))
    return alone


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def size_text(size: int, ndim: int) -> str:
    """A kernel's size in words."""
    return f'{size} steps' if ndim == 1 else f'{size}x{size}'


# Where a convolution of the networks with points per filter is.
_PLACES = (
    (r'^stages\.(\d+)\.(\d+)\.', r'stage \1 block \2 '),
    (r'^blocks\.(\d+)\.', r'block \1 '),
    (r'(?:\.large)?\.conv$', ''),
)


def label_of(name: str, view: View) -> str:
    """A layer's name for the margin of a picture, with its size."""
    if view.filter is None:
        parts = [part for part in name.split('.') if part.isdigit()]
        return f'stage {parts[0]} block {parts[1]}\n{view}' if len(parts) == 2 else name
    for pattern, words in _PLACES:
        name = re.sub(pattern, words, name)
    return f'{name}\nfilter {view.filter}, {view}'.lstrip()
