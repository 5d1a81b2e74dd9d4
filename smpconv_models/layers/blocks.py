"""Residual blocks: RepLKNet's, for the ImageNet models, and that of the networks for sequences and small images."""
from typing import Any, Callable, Tuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from .conv_norm import ActLayer, ConvNormActBlock, NormLayer, create_act, create_norm, fold_norm, fuse_bn_conv
from .fft_conv import CausalConv1d
from .reparam import ReparamConv, ReparamLargeKernelConv


class PreNormBlock(nn.Module):
    """``x + drop_path(f(norm(x)))`` with an f that begins with a 1x1 convolution, ``pw1``; the norm is folded into it.
    """

    def __init__(
            self, dim: int, hidden: int, drop_path: float, act_layer: ActLayer, norm_layer: NormLayer,
            **dd: Any) -> None:
        super().__init__()
        self.norm = create_norm(norm_layer, dim, **dd)
        self.pw1 = pointwise(dim, hidden, norm_layer, act_layer, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    @torch.jit.ignore
    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold a batch norm into ``pw1``; the walk over the model reaches the block's own parts."""
        self.norm, self.pw1.conv = fold_norm(self.norm, self.pw1.conv, fuse_bn_conv)


class LargeKernelBlock(PreNormBlock):
    """Residual block: norm, 1x1 conv-norm-act, large kernel, act, 1x1 conv-norm.

    Args:
        dim: Number of channels.
        kernel_size, num_points, small_kernel_size, dilation: Arguments of :class:`ReparamLargeKernelConv`.
        drop_path: Probability of dropping the branch, per sample.
        act_layer, norm_layer: Activation and normalization.
    """

    def __init__(
            self, dim: int, kernel_size: int, num_points: int, small_kernel_size: int = 5, dilation: int = 1,
            drop_path: float = 0., act_layer: ActLayer = nn.ReLU, norm_layer: NormLayer = nn.BatchNorm2d,
            device: Any = None, dtype: Any = None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, dim, drop_path, act_layer, norm_layer, **dd)
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
        dim: Number of channels.
        mlp_ratio: Ratio of hidden channels to ``dim``.
        drop_path, act_layer, norm_layer: Arguments of :class:`LargeKernelBlock`.
    """

    def __init__(
            self, dim: int, mlp_ratio: float = 4., drop_path: float = 0., act_layer: ActLayer = nn.GELU,
            norm_layer: NormLayer = nn.BatchNorm2d, device: Any = None, dtype: Any = None) -> None:
        dd = {'device': device, 'dtype': dtype}
        hidden = int(dim * mlp_ratio)
        super().__init__(dim, hidden, drop_path, act_layer, norm_layer, **dd)
        self.pw2 = pointwise(hidden, dim, norm_layer, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.pw2(self.pw1(self.norm(x))))


def pointwise(
        in_channels: int, out_channels: int, norm_layer: NormLayer, act_layer: Any = None,
        **dd: Any) -> ConvNormActBlock:
    """Create a 1x1 convolution, norm and, if given, activation."""
    return ConvNormActBlock(
        nn.Conv2d(in_channels, out_channels, 1, bias=False, **dd), create_norm(norm_layer, out_channels, **dd),
        None if act_layer is None else create_act(act_layer))


class ResidualBlock(nn.Module):
    """``act(f(x) + shortcut(x))`` of two large-kernel convolutions.

    ``f`` is conv1, act, dropout, conv2, and in the networks for sequences act and dropout once more, as in a temporal
    convolutional network. The shortcut is a 1x1 convolution with a bias if the channels differ.

    Args:
        conv1: Convolution from the block's input channels to its own.
        conv2: Convolution among its own channels.
        shortcut: Convolution from the input channels to its own, or an identity.
        drop_rate: Rate of the dropout.
        is_temporal: Whether activation and dropout follow the second convolution too.
    """

    def __init__(
            self, conv1: ReparamConv, conv2: ReparamConv, shortcut: nn.Module, drop_rate: float,
            is_temporal: bool) -> None:
        super().__init__()
        self.conv1 = conv1
        self.act1 = nn.ReLU()
        self.drop1 = nn.Dropout(drop_rate)
        self.conv2 = conv2
        self.act2: nn.Module = nn.ReLU() if is_temporal else nn.Identity()
        self.drop2: nn.Module = nn.Dropout(drop_rate) if is_temporal else nn.Identity()
        self.shortcut = shortcut
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop1(self.act1(self.conv1(x)))
        y = self.drop2(self.act2(self.conv2(y)))
        return self.act(y + self.shortcut(x))


def init_module_(
        module: nn.Module, kinds: Tuple[type, ...] = (CausalConv1d, nn.Conv2d),
        trunc_normal_: Callable[..., Any] = nn.init.trunc_normal_, needs_reset: bool = False) -> None:
    """Initialize one module of a network, for ``nn.Module.apply``.

    Weights of ``kinds`` are sampled by ``trunc_normal_`` (PyTorch's or timm's) with std 0.02, and their biases are
    zero. ``needs_reset`` resets other modules too: points, norms, 1-D shortcuts.
    """
    if isinstance(module, kinds):
        layer: Any = module
        if layer.weight.is_meta:  # nothing to fill, and 6 ms for each tensor on a CPU
            return
        trunc_normal_(layer.weight, std=.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif needs_reset and callable(reset_parameters := getattr(module, 'reset_parameters', None)):
        reset_parameters()
