"""The blocks of the ImageNet models: RepLKNet's structure with kernels drawn from points."""
import math
from numbers import Real
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from . import fuse
from .checks import check_small_kernel
from .conv_norm import (
    ActLayer,
    ConvNormActBlock,
    DepthwiseConv2d,
    NormLayer,
    batch_norm_affine,
    create_act,
    create_norm,
    set_weight_bias,
)
from .effective import plain_conv, warn_not_folded
from .parallel import ReparamConv
from .smp_depthwise import SMPDepthwiseConv2d


class ReparamLargeKernelConv(ReparamConv):
    """A large SMP depthwise convolution and a small plain one in parallel, each with its norm, summed.

    Args:
        channels: Input and output channels.
        kernel_size: Odd side of the large kernel.
        num_points: Points of the large kernel.
        small_kernel_size: Odd side of the small kernel, not above ``kernel_size``; 0 for none.
        dilation: Of both.
        norm_layer: Normalization of each branch.

    Raises:
        ValueError: Even kernel sizes, a small kernel larger than the large one, no points.
    """

    def __init__(
            self,
            channels: int,
            kernel_size: int,
            num_points: int,
            small_kernel_size: int = 5,
            dilation: int = 1,
            norm_layer: NormLayer = nn.BatchNorm2d,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        check_small_kernel(small_kernel_size, kernel_size)
        large = ConvNormActBlock(
            SMPDepthwiseConv2d(channels, kernel_size, num_points, dilation, **dd),
            create_norm(norm_layer, channels, **dd),
        )
        small = ConvNormActBlock(
            DepthwiseConv2d(
                channels, channels, small_kernel_size, padding='same', dilation=dilation, groups=channels, bias=False,
                **dd),
            create_norm(norm_layer, channels, **dd),
        ) if small_kernel_size else None
        super().__init__(large, small)
        self.small_kernel_size = small_kernel_size

    @torch.jit.ignore
    def is_drawn_from_points(self) -> bool:
        """Whether it isn't re-parameterized yet."""
        return isinstance(self.large.conv, SMPDepthwiseConv2d)

    @torch.jit.ignore
    def rescale(self, scale: float) -> None:
        """Draws the large kernel with :meth:`scaled_size` elements a side from now on.

        Raises:
            ValueError: As :meth:`scaled_size`.
        """
        large: Any = self.large.conv
        large.resize(self.scaled_size(scale))

    @torch.jit.ignore
    def scaled_size(self, scale: float) -> int:
        """``1 + 2 * round(scale * (k - 1) / 2)``, the side of the large kernel at a scale.

        Args:
            scale: How many times as densely as at the ``kernel_size`` k of the constructor.

        Raises:
            ValueError: It is no number, or the kernel would be smaller than the small one or larger than 4095.
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


class PreNormBlock(nn.Module):
    """``x + drop_path(f(norm(x)))`` where f begins with a 1x1 convolution, ``pw1``, into which the norm folds."""

    def __init__(self, norm: nn.Module, pw1: ConvNormActBlock, drop_path: float) -> None:
        super().__init__()
        self.norm = norm
        self.pw1 = pw1
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    @torch.jit.ignore
    @torch.no_grad()
    def reparameterize(self) -> None:
        """Folds a batch norm into ``pw1``; its own parts are reached by the walk over the model."""
        affine = batch_norm_affine(self.norm)
        if affine is None:
            return
        conv = plain_conv(self.pw1.conv)
        if conv is None:
            warn_not_folded(self.norm, self.pw1.conv)
        else:
            self.pw1.conv = conv
            set_weight_bias(conv, *fuse.fold_before(conv.weight, conv.bias, *affine))
            self.norm = nn.Identity().train(self.training)


class LargeKernelBlock(PreNormBlock):
    """Residual block: norm, 1x1 conv-norm-act, large kernel, act, 1x1 conv-norm.

    Args:
        dim: Channels.
        kernel_size, num_points, small_kernel_size, dilation: As in :class:`ReparamLargeKernelConv`.
        drop_path: Probability of dropping the branch, per sample.
        act_layer, norm_layer: Activation and normalization.
    """

    def __init__(
            self,
            dim: int,
            kernel_size: int,
            num_points: int,
            small_kernel_size: int = 5,
            dilation: int = 1,
            drop_path: float = 0.,
            act_layer: ActLayer = nn.ReLU,
            norm_layer: NormLayer = nn.BatchNorm2d,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            create_norm(norm_layer, dim, **dd),
            pointwise(dim, dim, norm_layer, act_layer, **dd),
            drop_path,
        )
        self.large_kernel = ReparamLargeKernelConv(
            dim, kernel_size, num_points, small_kernel_size, dilation, norm_layer, **dd)
        self.act = create_act(act_layer)
        self.pw2 = pointwise(dim, dim, norm_layer, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pw1(self.norm(x))
        y = self.act(self.large_kernel(y))
        return x + self.drop_path(self.pw2(y))


class ConvFFN(PreNormBlock):
    """Residual block: norm, 1x1 conv-norm, act, 1x1 conv-norm.

    Args:
        dim: Channels.
        mlp_ratio: Hidden channels over ``dim``.
        drop_path: Probability of dropping the branch, per sample.
        act_layer, norm_layer: Activation and normalization.
    """

    def __init__(
            self,
            dim: int,
            mlp_ratio: float = 4.,
            drop_path: float = 0.,
            act_layer: ActLayer = nn.GELU,
            norm_layer: NormLayer = nn.BatchNorm2d,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        hidden = int(dim * mlp_ratio)
        super().__init__(
            create_norm(norm_layer, dim, **dd),
            pointwise(dim, hidden, norm_layer, act_layer, **dd),
            drop_path,
        )
        self.pw2 = pointwise(hidden, dim, norm_layer, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.pw2(self.pw1(self.norm(x))))


def pointwise(
        in_channels: int,
        out_channels: int,
        norm_layer: NormLayer,
        act_layer: Any = None,
        device: Any = None,
        dtype: Any = None,
) -> ConvNormActBlock:
    """1x1 convolution, norm and, if given, activation."""
    return ConvNormActBlock(
        nn.Conv2d(in_channels, out_channels, 1, bias=False, device=device, dtype=dtype),
        create_norm(norm_layer, out_channels, device=device, dtype=dtype),
        None if act_layer is None else create_act(act_layer),
    )
