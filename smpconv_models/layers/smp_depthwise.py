"""Convolutions whose kernels are sampled from self-moving points: the shared base, and the depthwise layer.

The walk from parameter to convolution: ``forward`` calls ``kernel``; :meth:`SMPLayer.sample` clips the radii and calls
:func:`.points.sample_kernel`, or :func:`.points.resample_kernel` after ``resize``, which evaluates the points on a
grid; the convolution is :func:`smpconv_models.depthwise_conv2d`, or a function of :mod:`.fft_conv`.
"""
import math
import warnings
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from smpconv_models.ops import depthwise_conv2d, validate_options

from . import points
from .checks import check_counts, check_kernel_size
from .conv_norm import CountedConv, DepthwiseConv2d, refresh_

# FLOP counters that cannot count a layer with points by the names of its parameters, by the module of their hooks.
_COUNTERS_BY_PARAMETERS = {
    'torchinfo.torchinfo':
        'torchinfo counts multiply-adds by the shapes of parameters, and points are fewer than kernel elements, so its '
        'total is too low',
    'torchsummary.torchsummary':
        'torchsummary counts the parameters "weight" and "bias" only, not the positions and radii of points',
}


class SMPLayer(CountedConv):
    """Base of layers with points: parameters, kernel, resizing, and re-parameterization.

    In any trainer the radius that the forward pass uses lies within ``radius_range`` and keeps its gradient; the
    coordinates are free. The points are a function, which can be sampled at another size too: see :meth:`resize`.

    Attributes:
        coords: Parameter ``(..., P, d)``.
        radius: Parameter ``(..., P)``.
        weight: Parameter ``(..., P)``.
        radius_range: Smallest and largest radius that the forward pass uses, in units in which the kernel's side is 2.
        base_size: Elements along each side of the constructor's kernel.
        kernel_size: Elements along each side.
    """

    ndim: int

    def __init__(
            self, kernel_size: int, weight_size: Tuple[int, ...], coords_size: Tuple[int, ...], normalize: bool,
            coords_std: float, init_radius: Optional[float], radius_range: Tuple[float, float], device: Any,
            dtype: Any) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.base_size = kernel_size
        self.normalize = normalize
        self.coords_std = coords_std
        self.init_radius = init_radius
        self.radius_range = radius_range
        self.weight = nn.Parameter(torch.empty(weight_size, device=device, dtype=dtype))
        self.coords = nn.Parameter(torch.empty(coords_size, device=device, dtype=dtype))
        self.radius = nn.Parameter(torch.empty(coords_size[:-1], device=device, dtype=dtype))

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.init_coords()
        # by default about the distance of two kernel elements in L1 (appendix A.1)
        nn.init.constant_(self.radius, 2 * self.ndim / self.base_size if self.init_radius is None else self.init_radius)
        clip_radius_(self)  # 3x3 kernels would start beyond the range

    @torch.jit.ignore
    def init_coords(self) -> None:
        """Sample the initial coordinates; the points start near the middle (appendix A.2)."""
        nn.init.trunc_normal_(self.coords, std=self.coords_std, a=-1., b=1.)

    def sample(self) -> Tensor:
        """Sample the kernel ``(..., k, ...)`` from the points."""
        radius = points.clip_radius(self.radius, self.radius_range[0], self.radius_range[1])
        ndim = self.coords.shape[-1]
        size = [self.kernel_size] * ndim
        if self.kernel_size == self.base_size:
            return points.sample_kernel(self.coords, radius, self.weight, size, self.normalize)
        return points.resample_kernel(self.coords, radius, self.weight, [self.base_size] * ndim, size, self.normalize)

    def kernel(self) -> Tensor:
        """Return the kernel as a convolution takes it."""
        return self.sample()

    @torch.jit.ignore
    def resize(self, kernel_size: int) -> None:
        """Sample the kernel on another grid from now on, for inputs of another resolution or sampling rate.

        Each point keeps the sum that it has at ``base_size``, and so the kernel its response to a constant input. The
        parameters stay unchanged: a state dict fits at every size.

        Args:
            kernel_size: Elements along each side; odd for images.

        Raises:
            ValueError: The size is even for images, or no positive whole number.
        """
        check_kernel_size(kernel_size, self.ndim)
        self.kernel_size = kernel_size

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Return a plain convolution with the kernel as sampled now; trainable if any parameter of the points is."""
        refresh_(self)
        kernel = self.kernel()
        conv = self._create_plain(bias=False, device='meta', dtype=kernel.dtype)
        is_trained = any(parameter.requires_grad for parameter in self.parameters())
        conv.weight = nn.Parameter(kernel, is_trained)
        if (bias := getattr(self, 'bias', None)) is not None:
            conv.bias = nn.Parameter(bias.detach().clone(), is_trained)
        return conv.train(self.training)

    @torch.jit.ignore
    def _create_plain(self, **kwargs: Any) -> Any:
        """Create the plain convolution that :meth:`fuse` fills."""
        raise NotImplementedError

    def products_per_output(self) -> int:
        return math.prod(self.weight.shape[1:-1]) * self.kernel_size ** self.coords.shape[-1]

    def register_forward_hook(self, hook: Any, **kwargs: Any) -> Any:
        reason = _COUNTERS_BY_PARAMETERS.get(getattr(hook, '__module__', ''))
        if reason is not None:
            warnings.warn(
                f'{reason}. Count timm.utils.reparameterize_model(model), or use another counter.', stacklevel=2)
        return super().register_forward_hook(hook, **kwargs)

    def extra_repr(self) -> str:
        base = '' if self.kernel_size == self.base_size else f', base_size={self.base_size}'
        return f'kernel_size={self.kernel_size}{base}, num_points={self.coords.shape[-2]}'


class SMPDepthwiseConv2d(SMPLayer):
    """Depthwise convolution with one set of points for all channels, the form of the ImageNet models.

    The kernel of channel c is ``sum_i weight[c, i] * relu(1 - |x - coords[i]|_1 / radius[i])`` sampled on a regular
    grid over [-1, 1]^2: equation 1 of the paper without the division by ``|N(x)|``. Stride 1, zero padding, output as
    large as the input, no bias. Radii, coordinates and resizing: see :class:`SMPLayer`.

    Args:
        channels: Number of input and output channels C.
        kernel_size: Odd side length k of the kernel.
        num_points: Number of points P, shared by all channels.
        dilation: Spacing between kernel elements.
        coords_std: Standard deviation of the initial coordinates.
        radius_range: Smallest and largest radius, in units in which the kernel's side is 2.
        backend: Name of a backend, see :func:`smpconv_models.depthwise_conv2d`.

    Parameters: ``weight (C, P)``, ``coords (P, 2)`` as (x to the right, y up), ``radius (P,)``.

    Raises:
        ValueError: Even ``kernel_size``, or no positive whole ``num_points``.
    """

    ndim = 2

    def __init__(
            self, channels: int, kernel_size: int, num_points: int, dilation: int = 1, coords_std: float = 0.2,
            radius_range: Tuple[float, float] = (1e-3, 1.), backend: str = 'auto', device: Any = None,
            dtype: Any = None) -> None:
        check_kernel_size(kernel_size, ndim=2)
        validate_options(dilation=dilation, backend=backend)
        check_counts(num_points=num_points)
        super().__init__(
            kernel_size, (channels, num_points), (num_points, 2), False, coords_std, None, radius_range, device, dtype)
        self.channels = channels
        self.dilation = dilation
        self.backend = backend
        self.reset_parameters()

    # The size that the points were made for stands beside the state dict, in PyTorch's `_metadata`: a tensor of its own
    # would change the keys of the released weights. A file without it, such as safetensors, is loaded unchecked.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, '_metadata', {}).get(prefix[:-1])
        if metadata is not None:
            metadata['base_size'] = self.base_size

    def _load_from_state_dict(
            self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any,
            unexpected_keys: Any, error_msgs: Any,
    ) -> None:
        size = local_metadata.get('base_size', self.base_size)
        if size != self.base_size:
            error_msgs.append(
                f'the points of {prefix[:-1] or "the layer"} are for kernels of size {size!r:.20}, not of '
                f'{self.base_size}')
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def kernel(self) -> Tensor:
        """Return the kernel as ``conv2d`` takes it, ``(C, 1, k, k)``."""
        return self.sample().unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.kernel(), dilation=self.dilation, backend=self.backend)

    @torch.jit.ignore
    def _create_plain(self, **kwargs: Any) -> DepthwiseConv2d:
        return DepthwiseConv2d(
            self.channels, self.channels, self.kernel_size, padding='same', dilation=self.dilation,
            groups=self.channels, backend=self.backend, **kwargs)

    def extra_repr(self) -> str:
        return f'{self.channels}, {super().extra_repr()}, dilation={self.dilation}, backend={self.backend!r}'


def smp_layers(model: nn.Module) -> Dict[str, SMPLayer]:
    """Return the layers of a model whose kernels are sampled from points, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SMPLayer)}


@torch.no_grad()
def clip_radius_(model: nn.Module) -> None:
    """Clip every radius parameter in ``model`` to its layer's range, as the paper does after each optimizer step.

    Without the call the forward pass still uses radii within the range, but the parameters may leave it. Of a pruned
    radius the values before the mask are clipped. A parametrized radius is assigned its clipped value if it left its
    range. A radius that cannot be assigned causes a warning.
    """
    for name, layer in smp_layers(model).items():
        for stored in ('radius', 'radius_orig'):  # torch.nn.utils.prune's name
            if stored in layer._parameters:
                layer._parameters[stored].clamp_(*layer.radius_range)  # type: ignore[union-attr]
        refresh_(layer, 'radius')
        if 'radius' not in layer._parameters and 'radius_orig' not in layer._parameters:
            _clip_computed_radius_(name, layer)


def _clip_computed_radius_(name: str, layer: SMPLayer) -> None:
    """Assign a radius that is computed from other parameters its clipped value, if it is out of the range."""
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
