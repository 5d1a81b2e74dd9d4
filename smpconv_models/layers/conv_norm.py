"""Convolution, normalization, activation; and their folding into one convolution."""
from typing import Any, Callable, Optional, Tuple, Union

import torch
from timm.layers import get_act_layer, get_norm_layer
from torch import Tensor, nn

from smpconv_models.ops import check_options, depthwise_conv2d

from . import fuse
from .checks import check_odd_sides

NormLayer = Union[str, Callable[[int], nn.Module]]
ActLayer = Union[str, Callable[[], nn.Module]]


def create_norm(norm_layer: NormLayer, channels: int, device: Any = None, dtype: Any = None) -> nn.Module:
    """``norm_layer(channels)`` on the given device: the layer may be any callable, or one of timm's names."""
    return _by_name(norm_layer, get_norm_layer, 'norm_layer')(channels).to(device=device, dtype=dtype)


def create_act(act_layer: ActLayer) -> nn.Module:
    """``act_layer()``: any callable, or one of timm's names."""
    return _by_name(act_layer, get_act_layer, 'act_layer')()


def _by_name(layer: Any, look_up: Callable[[str], Any], argument: str) -> Callable[..., nn.Module]:
    if not isinstance(layer, str):
        return layer
    try:
        return look_up(layer)
    except KeyError:
        raise ValueError(f"{argument} must be a callable or one of timm's names, got {layer!r}") from None


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d(C, C, kernel_size, padding='same', groups=C)`` on :func:`smpconv_models.ops.depthwise_conv2d`.

    Same parameters, same state dict. Inputs have a batch dimension.

    Args:
        channels: Input and output channels C.
        kernel_size: Odd, one number or (height, width).
        dilation: One number or (height, width).
        bias: Whether there is a bias ``(C,)``.
        backend: As in :func:`smpconv_models.ops.depthwise_conv2d`.

    Raises:
        ValueError: No channels, an even kernel size, a dilation below 1, an unknown backend.
    """

    def __init__(
            self,
            channels: int,
            kernel_size: Union[int, Tuple[int, int]],
            dilation: Union[int, Tuple[int, int]] = 1,
            bias: bool = True,
            backend: str = 'auto',
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        if not isinstance(channels, int) or channels < 1:
            raise ValueError(f'channels must be a whole number of at least 1, got {channels!r}')
        sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        check_odd_sides(sides, kernel_size)
        check_options(dilation, backend)
        super().__init__(
            channels, channels, kernel_size, padding='same', dilation=dilation, groups=channels, bias=bias,
            device=device, dtype=dtype,
        )
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        dilation = (self.dilation[0], self.dilation[1])
        return depthwise_conv2d(input, self.weight, self.bias, dilation=dilation, backend=self.backend)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, backend={self.backend!r}'


class ConvNormAct(nn.Module):
    """``act(norm(conv(x)))``.

    Args:
        conv: Any convolution module with a weight ``(out, in / groups, ...)``.
        norm: A normalization of its output channels.
        act: An activation, or None.
    """

    def __init__(self, conv: nn.Module, norm: nn.Module, act: Optional[nn.Module] = None) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Draws the kernel if it is of points and folds a batch norm into it. In place, idempotent.

        What can't be folded stays: other normalizations, and convolutions that are neither ``nn.Conv2d`` nor
        ``nn.Conv1d``.
        """
        if callable(fuse_conv := getattr(self.conv, 'fuse', None)):
            self.conv = fuse_conv()
        conv: Any = self.conv
        affine = batch_norm_affine(self.norm)
        if affine is not None and isinstance(conv, (nn.Conv1d, nn.Conv2d)):
            set_weight_bias(conv, *fuse.fold_after(conv.weight, conv.bias, *affine))
            self.norm = nn.Identity().train(self.training)


def batch_norm_affine(norm: Any) -> Optional[Tuple[Tensor, Tensor]]:
    """What ``norm`` does in evaluation as (scale, shift) per channel, or None where it can't be written so.

    Batch norms with running statistics can, frozen ones too. Subclasses that do more (an activation) can't.
    """
    frozen = type(norm).__name__ == 'FrozenBatchNorm2d'
    if not frozen and type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm):
        return None
    if norm.running_mean is None:
        return None
    with torch.no_grad():
        return fuse.norm_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def set_weight_bias(conv: Any, weight: Tensor, bias: Tensor) -> None:
    """Gives ``conv`` new values, as parameters that keep its weight's layout and ``requires_grad``."""
    requires_grad = conv.weight.requires_grad
    # a copy into the old weight's strides keeps channels_last
    conv.weight = nn.Parameter(torch.empty_like(conv.weight).copy_(weight), requires_grad)
    conv.bias = nn.Parameter(bias.detach().clone(), requires_grad)
