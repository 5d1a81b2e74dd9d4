"""Convolutions with points for each filter: the form of the paper's networks for sequences and small images."""
from typing import Any, Optional, Tuple

import torch
from torch import Tensor, nn

from . import points
from .checks import check_counts, check_odd
from .effective import refresh_
from .fft_conv import CausalConv1d, FFTConv2d, causal_conv1d, check_method, fft_conv2d
from .smp_depthwise import SMPLayer, clip_radius_


class _SMPConvNd(SMPLayer):
    """Filters of their own points each: equation 1 of the paper with the division by |N(x)|.

    The filter of output channel o is ``sum_i weight[o, :, i] * g_i(x) / |N(x)|`` with
    ``g_i(x) = relu(1 - |x - coords[o, i]|_1 / radius[o, i])``: its input channels share the points' places and reaches.
    Sampled on a regular grid over [-1, 1] in each dimension. In any trainer the radius that the forward pass uses lies
    within ``radius_range`` and keeps its gradient; the coordinates are free.

    Parameters: ``weight (out, in, P)``, ``coords (out, P, d)``, ``radius (out, P)`` and, if asked for, ``bias (out,)``.
    The shapes don't tell how long the kernel is that they were trained for, so a state dict does.
    """

    ndim: int

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: int,
            num_points: int,
            bias: bool,
            coords_std: float,
            init_radius: Optional[float],
            radius_range: Tuple[float, float],
            method: str,
            device: Any,
            dtype: Any,
    ) -> None:
        super().__init__()
        check_counts(in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, num_points=num_points)
        check_method(method)
        if not 0 < radius_range[0] <= radius_range[1]:
            raise ValueError(f'radius_range must be the smallest and the largest radius, got {radius_range}')
        if init_radius is not None and not radius_range[0] <= init_radius <= radius_range[1]:
            raise ValueError(f'init_radius must lie in radius_range, {radius_range}, got {init_radius}')
        if not coords_std > 0:
            raise ValueError(f'coords_std must be positive, got {coords_std}')
        dd = {'device': device, 'dtype': dtype}
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.base_size = kernel_size
        self.coords_std = coords_std
        self.init_radius = init_radius
        self.radius_range = radius_range
        self.method = method
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, num_points, **dd))
        self.coords = nn.Parameter(torch.empty(out_channels, num_points, self.ndim, **dd))
        self.radius = nn.Parameter(torch.empty(out_channels, num_points, **dd))
        self.bias = nn.Parameter(torch.empty(out_channels, **dd)) if bias else None
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        points.init_weights_(self.weight)
        self.init_coords()
        if self.init_radius is None:
            points.init_radius_(self.radius, self.base_size, self.ndim)
        else:
            nn.init.constant_(self.radius, self.init_radius)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        clip_radius_(self)

    @torch.jit.ignore
    def init_coords(self) -> None:
        """Draws the points' first places."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        """The size that the points were made for, ``base_size``, which no other tensor of a state dict tells."""
        return torch.tensor([self.base_size], device='cpu')  # whatever the default is

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ValueError unless the points to be loaded were made for kernels of this size; 0 doesn't tell."""
        size = int(state)
        if size not in (0, self.base_size):
            raise ValueError(f'expected the points of kernels of size {self.base_size}, got those of {size}')

    def kernel(self) -> Tensor:
        """The filters as a convolution takes them, ``(out, in, k)`` or ``(out, in, k, k)``."""
        radius = points.clip_radius(self.radius, self.radius_range[0], self.radius_range[1])
        size = [self.kernel_size] * (self.coords.shape[2])
        if self.kernel_size == self.base_size:
            return points.sample_kernel(self.coords, radius, self.weight, size, normalize=True)
        base = [self.base_size] * (self.coords.shape[2])
        return points.resample_kernel(self.coords, radius, self.weight, base, size, normalize=True)

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """A plain convolution with the kernel that the points draw now; trainable if any of them is."""
        refresh_(self)
        kernel = self.kernel()
        plain: Any = CausalConv1d if self.ndim == 1 else FFTConv2d
        conv = plain(
            self.in_channels, self.out_channels, self.kernel_size, bias=False, method=self.method, device='meta',
            dtype=kernel.dtype)
        is_trained = any(parameter.requires_grad for parameter in self.parameters())
        conv.weight = nn.Parameter(kernel, is_trained)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone(), is_trained)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        base = '' if self.kernel_size == self.base_size else f', base_size={self.base_size}'
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}{base}, '
            f'num_points={self.coords.shape[1]}, bias={self.bias is not None}, method={self.method!r}'
        )


class SMPConv1d(_SMPConvNd):
    """Causal convolution of sequences, in place of an ``nn.Conv1d`` with padding on the left; stride 1.

    Args:
        in_channels, out_channels: Channels.
        kernel_size: Elements k of the kernel: as many as the sequence has steps, in the paper. The last one is the
            present, at coordinate 1. A sequence may have any number of steps.
        num_points: Points P of each filter.
        bias: Whether there is a bias.
        coords_std: Of the half normal distribution of the coordinates at the start, before it is stretched to [-1, 1].
        init_radius: Radius at the start, else ``2 / k``.
        radius_range: Smallest and largest radius, in units in which the kernel has length 2.
        method: As in :func:`.long_conv.causal_conv1d`.

    Shapes: ``(N, in_channels, L)`` to ``(N, out_channels, L)``.

    Raises:
        ValueError: No channels, points or elements, a radius out of its range, an unknown method.
    """

    ndim = 1

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: int,
            num_points: int = 30,
            bias: bool = True,
            coords_std: float = 0.1,
            init_radius: Optional[float] = None,
            radius_range: Tuple[float, float] = (1e-4, 1.),
            method: str = 'auto',
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, num_points, bias, coords_std, init_radius, radius_range, method,
            device, dtype)

    @torch.jit.ignore
    def init_coords(self) -> None:
        points.init_causal_coords_(self.coords, self.coords_std)

    @torch.jit.ignore
    def resize(self, kernel_size: int) -> None:
        """Draws the same points with another number of elements from now on, for sequences of another sampling rate.

        Each point keeps the sum that it has at the size of the constructor, ``base_size``. The parameters stay as they
        are: a state dict fits at every size.

        Raises:
            ValueError: It isn't a positive whole number.
        """
        check_counts(kernel_size=kernel_size)
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        return causal_conv1d(x, self.kernel(), self.bias, self.method)


class SMPConv2d(_SMPConvNd):
    """Convolution of images, in place of an ``nn.Conv2d`` with ``padding='same'``; stride 1.

    Args:
        in_channels, out_channels: Channels.
        kernel_size: Odd side k of the kernel.
        num_points: Points P of each filter.
        bias: Whether there is a bias.
        coords_std: Standard deviation of the coordinates at the start.
        init_radius: Radius at the start, else ``4 / k``.
        radius_range: Smallest and largest radius, in units in which the kernel's side is 2.
        method: As in :func:`.long_conv.fft_conv2d`.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, H, W)``. Coordinates are (x to the right, y up).

    Raises:
        ValueError: No channels or points, an even kernel, a radius out of its range, an unknown method.
    """

    ndim = 2

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: int,
            num_points: int = 16,
            bias: bool = True,
            coords_std: float = 0.05,
            init_radius: Optional[float] = None,
            radius_range: Tuple[float, float] = (1e-4, 1.),
            method: str = 'auto',
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        check_odd(kernel_size)
        super().__init__(
            in_channels, out_channels, kernel_size, num_points, bias, coords_std, init_radius, radius_range, method,
            device, dtype)

    @torch.jit.ignore
    def init_coords(self) -> None:
        points.init_coords_(self.coords, self.coords_std)

    @torch.jit.ignore
    def resize(self, kernel_size: int) -> None:
        """As :meth:`SMPConv1d.resize`, for images of another resolution.

        Raises:
            ValueError: It is even.
        """
        check_odd(kernel_size)
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        return fft_conv2d(x, self.kernel(), self.bias, self.method)
