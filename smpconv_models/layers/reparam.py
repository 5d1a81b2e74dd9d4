"""A large kernel with a small one in parallel, which train better than either alone and end as one kernel."""
import math
from numbers import Real
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_small_kernel
from .conv_norm import ConvNormActBlock, DepthwiseConv2d, NormLayer, create_norm, plain_conv, set_weight_bias
from .smp_depthwise import SMPDepthwiseConv2d


class ReparamConv(nn.Module):
    """``large(x) + small(x)``, each with its norm: the re-parameterization trick of section 3.3 of the paper.

    Args:
        large: Convolution with the large kernel.
        small: Convolution with a smaller kernel, aligned to the large one's middle (1-D: to its end, the present), or
            None.
        norm: Function that creates the norm of a branch.
    """

    def __init__(self, large: nn.Module, small: Optional[nn.Module], norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.large = ConvNormActBlock(large, norm())
        self.small = None if small is None else ConvNormActBlock(small, norm())

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x)
        if self.small is not None:
            y = y + self.small(x)
        return y

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Sample the kernel once, and return a single convolution if the norms can be folded, otherwise this module.

        Works in place, so that all users of the module share the result; a second call returns the same.
        """
        branches = [branch for branch in (self.large, self.small) if branch is not None]
        for branch in branches:
            branch.reparameterize()
        if not all(isinstance(branch.norm, nn.Identity) and plain_conv(branch.conv) for branch in branches):
            return self
        merged: Any = self.large.conv
        if self.small is not None:
            small: Any = self.small.conv
            bias = sum(conv.bias for conv in (merged, small) if conv.bias is not None)
            bias = bias + merged.weight.new_zeros(merged.out_channels)  # neither has a bias without a norm
            set_weight_bias(merged, merge_kernels(merged.weight, small.weight), bias)
            self.small = None
        return merged


def merge_kernels(large: Tensor, small: Tensor) -> Tensor:
    """Return one kernel for the sum of two "same" convolutions (2-D), or of two causal ones that end together (1-D)."""
    if large.ndim == 3:
        return large + F.pad(small, (large.shape[2] - small.shape[2], 0))
    rows, columns = large.shape[2] - small.shape[2], large.shape[3] - small.shape[3]
    return large + F.pad(small, (columns // 2, columns // 2, rows // 2, rows // 2))


class ReparamLargeKernelConv(ReparamConv):
    """A large SMP depthwise convolution and a small plain one in parallel, each with its norm, summed.

    Args:
        channels: Number of input and output channels.
        kernel_size: Odd side of the large kernel.
        num_points: Number of points of the large kernel.
        small_kernel_size: Odd side of the small kernel, not above ``kernel_size``; 0 for none.
        dilation: Spacing between kernel elements, of both kernels.
        norm_layer: Normalization of each branch.

    Raises:
        ValueError: Even kernel sizes, a small kernel larger than the large one, no points.
    """

    def __init__(
            self, channels: int, kernel_size: int, num_points: int, small_kernel_size: int = 5, dilation: int = 1,
            norm_layer: NormLayer = nn.BatchNorm2d, device: Any = None, dtype: Any = None) -> None:
        check_small_kernel(small_kernel_size, kernel_size)
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            SMPDepthwiseConv2d(channels, kernel_size, num_points, dilation, **dd),
            DepthwiseConv2d(
                channels, channels, small_kernel_size, padding='same', dilation=dilation, groups=channels, bias=False,
                **dd) if small_kernel_size else None,
            lambda: create_norm(norm_layer, channels, **dd))
        self.small_kernel_size = small_kernel_size

    @torch.jit.ignore
    def scaled_size(self, scale: float) -> int:
        """Return ``1 + 2 * round(scale * (k - 1) / 2)``, the side of the large kernel at a scale.

        Args:
            scale: Density of the elements, relative to that at the ``kernel_size`` k of the constructor.

        Raises:
            ValueError: The scale is no positive number, or the kernel would be smaller than the small one or larger
                than 4095.
        """
        if not isinstance(scale, Real) or not 0 < scale < math.inf:
            raise ValueError(f'a kernel must be scaled by a positive number, got {scale!r}')
        large: Any = self.large.conv
        size = 1 + 2 * round(scale * (large.base_size - 1) / 2)
        if not max(self.small_kernel_size, 1) <= size <= 4095:
            raise ValueError(
                f'a kernel of {large.base_size} must be scaled to {max(self.small_kernel_size, 1)} to 4095 elements, '
                f'got {size} (scale {scale})')
        return size
