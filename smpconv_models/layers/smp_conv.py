"""Convolutions with separate points for each filter, as in the paper's networks for sequences and small images."""
from typing import Any, Optional, Tuple

import torch
from torch import Tensor, nn

from .checks import check_counts, check_kernel_size
from .fft_conv import CausalConv1d, FFTConv2d, causal_conv1d, check_method, fft_conv2d
from .smp_depthwise import SMPLayer


class _SMPConvNd(SMPLayer):
    """Filters with separate points: equation 1 of the paper with the division by ``|N(x)|``.

    The filter of output channel o is ``sum_i weight[o, :, i] * g_i(x) / |N(x)|`` with
    ``g_i(x) = relu(1 - |x - coords[o, i]|_1 / radius[o, i])``: its input channels share the points' positions and
    radii. Sampled on a regular grid over [-1, 1] in each dimension; see :class:`.SMPLayer`.

    Parameters: ``weight (out, in, P)``, ``coords (out, P, d)``, ``radius (out, P)`` and optionally ``bias (out,)``.
    Their shapes do not depend on the size of the kernel that they were trained for, so a state dict holds the size.
    """

    _plain: type  # not Any, which TorchScript on Python 3.10 takes for Final

    def __init__(
            self, in_channels: int, out_channels: int, kernel_size: int, num_points: int, bias: bool, coords_std: float,
            init_radius: Optional[float], radius_range: Tuple[float, float], method: str, device: Any,
            dtype: Any) -> None:
        check_counts(in_channels=in_channels, out_channels=out_channels, num_points=num_points)
        check_kernel_size(kernel_size, self.ndim)
        check_method(method)
        if not 0 < radius_range[0] <= radius_range[1]:
            raise ValueError(f'radius_range must be the smallest and the largest radius, got {radius_range}')
        if init_radius is not None and not radius_range[0] <= init_radius <= radius_range[1]:
            raise ValueError(f'init_radius must lie in radius_range, {radius_range}, got {init_radius}')
        if not coords_std > 0:
            raise ValueError(f'coords_std must be positive, got {coords_std}')
        super().__init__(
            kernel_size, (out_channels, in_channels, num_points), (out_channels, num_points, self.ndim), True,
            coords_std, init_radius, radius_range, device, dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.method = method
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def get_extra_state(self) -> Tensor:
        """Return ``base_size``, the size that the points were made for, which no other tensor of a state dict holds."""
        return torch.tensor([self.base_size], device='cpu')  # also within `with torch.device('meta')`

    def set_extra_state(self, state: Tensor) -> None:
        """Raise ValueError unless the points to load were made for kernels of this size; 0 stands for an unknown size.
        """
        size = int(state)
        if size not in (0, self.base_size):
            raise ValueError(f'expected the points of kernels of size {self.base_size}, got those of {size}')

    @torch.jit.ignore
    def _create_plain(self, **kwargs: Any) -> Any:
        return self._plain(self.in_channels, self.out_channels, self.kernel_size, method=self.method, **kwargs)

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, {self.out_channels}, {super().extra_repr()}, bias={self.bias is not None}, '
            f'method={self.method!r}')


class SMPConv1d(_SMPConvNd):
    """Causal convolution of sequences, in place of an ``nn.Conv1d`` with padding on the left; stride 1.

    Args:
        in_channels, out_channels: Numbers of channels.
        kernel_size: Number of kernel elements k: as many as the sequence has steps, in the paper. The last element is
            the present, at coordinate 1. A sequence may have any number of steps.
        num_points: Number of points P of each filter.
        bias: Whether the layer has a bias.
        coords_std: Standard deviation of the half normal of the initial coordinates, before it is stretched to [-1, 1].
        init_radius: Initial radius, by default ``2 / k``.
        radius_range: Smallest and largest radius, in units in which the kernel has length 2.
        method: Name of an algorithm, see :func:`.fft_conv.causal_conv1d`.

    Shapes: ``(N, in_channels, L)`` to ``(N, out_channels, L)``.

    Raises:
        ValueError: No channels, points or elements, a radius out of its range, an unknown method.
    """

    ndim = 1
    _plain = CausalConv1d

    def __init__(
            self, in_channels: int, out_channels: int, kernel_size: int, num_points: int = 30, bias: bool = True,
            coords_std: float = 0.1, init_radius: Optional[float] = None,
            radius_range: Tuple[float, float] = (1e-4, 1.), method: str = 'auto', device: Any = None,
            dtype: Any = None) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, num_points, bias, coords_std, init_radius, radius_range, method,
            device, dtype)

    @torch.jit.ignore
    @torch.no_grad()
    def init_coords(self) -> None:
        """Sample half a normal that ends at the present, position 1: in (-1, 0), then stretched (appendix A.1)."""
        nn.init.trunc_normal_(self.coords, std=self.coords_std, a=-1., b=0.).mul_(2).add_(1)

    def forward(self, x: Tensor) -> Tensor:
        return causal_conv1d(x, self.kernel(), self.bias, self.method)


class SMPConv2d(_SMPConvNd):
    """Convolution of images, in place of an ``nn.Conv2d`` with ``padding='same'``; stride 1.

    Args:
        in_channels, out_channels: Numbers of channels.
        kernel_size: Odd side k of the kernel.
        num_points: Number of points P of each filter.
        bias: Whether the layer has a bias.
        coords_std: Standard deviation of the initial coordinates.
        init_radius: Initial radius, by default ``4 / k``.
        radius_range: Smallest and largest radius, in units in which the kernel's side is 2.
        method: Name of an algorithm, see :func:`.fft_conv.fft_conv2d`.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, out_channels, H, W)``. Coordinates are (x to the right, y up).

    Raises:
        ValueError: No channels or points, an even kernel, a radius out of its range, an unknown method.
    """

    ndim = 2
    _plain = FFTConv2d

    def __init__(
            self, in_channels: int, out_channels: int, kernel_size: int, num_points: int = 16, bias: bool = True,
            coords_std: float = 0.05, init_radius: Optional[float] = None,
            radius_range: Tuple[float, float] = (1e-4, 1.), method: str = 'auto', device: Any = None,
            dtype: Any = None) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, num_points, bias, coords_std, init_radius, radius_range, method,
            device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return fft_conv2d(x, self.kernel(), self.bias, self.method)
