"""Convolutions whose kernels are drawn from self-moving points."""
import math
import warnings
from typing import Any, Dict, Tuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from smpconv_models.ops import depthwise_conv2d, validate_options

from . import points
from .checks import check_counts, check_odd
from .conv_norm import DepthwiseConv2d
from .counted import CountedConv, warn_of_parameter_counter
from .effective import refresh_


class SMPLayer(CountedConv):
    """What all layers with points have: their parameters' names, the radii's range, and the kernel as it is now.

    Attributes:
        coords: Parameter ``(..., P, d)``.
        radius: Parameter ``(..., P)``.
        weight: Parameter ``(..., P)``.
        radius_range: Smallest and largest radius that the forward pass uses.
        kernel_size: Elements along each side.
    """

    coords: nn.Parameter
    radius: nn.Parameter
    weight: nn.Parameter
    radius_range: Tuple[float, float]
    kernel_size: int

    def kernel(self) -> Tensor:
        """The kernel as a convolution takes it."""
        raise NotImplementedError

    def products_per_output(self) -> int:
        return math.prod(self.weight.shape[1:-1]) * self.kernel_size ** self.coords.shape[-1]

    def register_forward_hook(self, hook: Any, **kwargs: Any) -> Any:
        warn_of_parameter_counter(hook)
        return super().register_forward_hook(hook, **kwargs)


class SMPDepthwiseConv2d(SMPLayer):
    """Depthwise convolution with one set of points for all channels, the form of the ImageNet models.

    The kernel of channel c is ``sum_i weight[c, i] * relu(1 - |x - coords[i]|_1 / radius[i])`` sampled on a regular
    grid over [-1, 1]^2: equation 1 of the paper without the division by |N(x)|. Stride 1, zero padding, output as
    large as the input, no bias.

    In any trainer the radius that the forward pass uses lies within ``radius_range`` and keeps its gradient; the
    coordinates are free.

    The points are a function, which can be drawn at another size too: see :meth:`resize`.

    Args:
        channels: Input and output channels C.
        kernel_size: Odd side length k of the kernel.
        num_points: Points P, shared by all channels.
        dilation: Spacing between kernel elements.
        coords_std: Standard deviation of the coordinates at the start.
        radius_range: Smallest and largest radius, in units in which the kernel's side is 2.
        backend: As in :func:`smpconv_models.ops.depthwise_conv2d`.

    Parameters: ``weight (C, P)``, ``coords (P, 2)`` as (x to the right, y up), ``radius (P,)``.

    Raises:
        ValueError: Even ``kernel_size``, or no positive whole ``num_points``.
    """

    def __init__(
            self,
            channels: int,
            kernel_size: int,
            num_points: int,
            dilation: int = 1,
            coords_std: float = 0.2,
            radius_range: Tuple[float, float] = (1e-3, 1.),
            backend: str = 'auto',
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        super().__init__()
        check_odd(kernel_size)
        validate_options(dilation, backend)
        check_counts(num_points=num_points)
        self.channels = channels
        self.kernel_size = kernel_size
        self.base_size = kernel_size
        self.dilation = dilation
        self.coords_std = coords_std
        self.radius_range = radius_range
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(channels, num_points, device=device, dtype=dtype))
        self.coords = nn.Parameter(torch.empty(num_points, 2, device=device, dtype=dtype))
        self.radius = nn.Parameter(torch.empty(num_points, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        points.init_weights_(self.weight)
        points.init_coords_(self.coords, std=self.coords_std)
        points.init_radius_(self.radius, self.base_size, ndim=2)
        clip_radius_(self)  # 3x3 kernels would start beyond the range

    def kernel(self) -> Tensor:
        """The kernel as ``conv2d`` takes it, ``(C, 1, k, k)``."""
        radius = points.clip_radius(self.radius, self.radius_range[0], self.radius_range[1])
        size = [self.kernel_size, self.kernel_size]
        if self.kernel_size == self.base_size:
            kernel = points.sample_kernel(self.coords, radius, self.weight, size, normalize=False)
        else:
            kernel = points.resample_kernel(
                self.coords, radius, self.weight, [self.base_size, self.base_size], size)
        return kernel.unsqueeze(1)

    @torch.jit.ignore
    def resize(self, kernel_size: int) -> None:
        """Draws the same points on another grid from now on, for images of another resolution.

        Each point keeps the sum that it has at the size of the constructor, ``base_size``, and so the kernel its
        response to a constant image. The parameters stay as they are: a state dict fits at every size.

        Args:
            kernel_size: Odd side length of the kernel.

        Raises:
            ValueError: It is even.
        """
        check_odd(kernel_size)
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.kernel(), dilation=self.dilation, backend=self.backend)

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> DepthwiseConv2d:
        """A plain convolution with the kernel that the points draw now; trainable if any of them is."""
        refresh_(self)
        kernel = self.kernel()
        conv = DepthwiseConv2d(
            self.channels, self.channels, self.kernel_size, padding='same', dilation=self.dilation,
            groups=self.channels, bias=False, device='meta', dtype=kernel.dtype, backend=self.backend)
        conv.weight = nn.Parameter(kernel, any(parameter.requires_grad for parameter in self.parameters()))
        return conv.train(self.training)

    def extra_repr(self) -> str:
        base = '' if self.kernel_size == self.base_size else f', base_size={self.base_size}'
        return (
            f'{self.channels}, kernel_size={self.kernel_size}{base}, num_points={self.coords.shape[0]}, '
            f'dilation={self.dilation}, backend={self.backend!r}'
        )


def smp_layers(model: nn.Module) -> Dict[str, SMPLayer]:
    """The layers of a model whose kernels are drawn from points, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SMPLayer)}


@torch.no_grad()
def clip_radius_(model: nn.Module) -> None:
    """Clips every radius parameter in ``model`` to its layer's range, as the paper does after each optimizer step.

    Without it the forward pass still uses radii within the range, but the parameters may leave it. Of a pruned radius
    the values before the mask are clipped. A parametrized one is assigned its clipped value, if it left its range, and
    a radius that can't be assigned is warned of.
    """
    for name, layer in smp_layers(model).items():
        for stored in ('radius', 'radius_orig'):  # torch.nn.utils.prune's name
            if stored in layer._parameters:
                layer._parameters[stored].clamp_(*layer.radius_range)  # type: ignore[union-attr]
        refresh_(layer, 'radius')
        if 'radius' not in layer._parameters and 'radius_orig' not in layer._parameters:
            _clip_computed_radius_(name, layer)


def _clip_computed_radius_(name: str, layer: SMPLayer) -> None:
    """Assigns a radius that is computed from other parameters its clipped value, where it is out of the range."""
    clipped = layer.radius.clamp(*layer.radius_range)
    if torch.equal(layer.radius, clipped):
        return
    reason = 'it is computed before each forward pass'
    if parametrize.is_parametrized(layer, 'radius'):
        try:
            layer.radius = clipped  # type: ignore[assignment]
            if torch.allclose(layer.radius, clipped, rtol=16 * torch.finfo(clipped.dtype).eps):
                return
            reason = 'its parametrization does not reproduce the value that it is assigned'
        except (RuntimeError, NotImplementedError):  # torch raises the first, a parametrization the second
            reason = 'its parametrization has no right_inverse'
    warnings.warn(
        f'radius of {name or type(layer).__name__!r} is out of its range {layer.radius_range} and cannot be clipped: '
        f'{reason}. The forward pass still uses radii within the range.', stacklevel=3)
