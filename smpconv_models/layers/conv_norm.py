"""Convolution, normalization, activation; and their folding into one convolution."""
from contextlib import nullcontext
from typing import Any, Callable, List, Literal, Optional, Tuple, Union

import torch
from timm.layers import get_act_layer, get_norm_layer, to_2tuple
from torch import Tensor, nn

from smpconv_models.ops import depthwise_conv2d, validate_options

from . import fuse
from .checks import check_counts
from .counted import CountedConv
from .effective import plain_conv, refresh_, unparametrized_type, warn_not_folded

NormLayer = Union[str, Callable[[int], nn.Module]]
ActLayer = Union[str, Callable[[], nn.Module]]


def create_norm(norm_layer: NormLayer, channels: int, device: Any = None, dtype: Any = None) -> nn.Module:
    """``norm_layer(channels)`` on the given device: the layer may be any callable, or one of timm's names."""
    with nullcontext() if device is None else torch.device(device):  # of a million channels, none on the way
        norm = _by_name(norm_layer, get_norm_layer, 'norm_layer')(channels)
    return norm.to(device=device, dtype=dtype)


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


class DepthwiseConv2d(nn.Conv2d, CountedConv):
    """``nn.Conv2d`` that computes depthwise convolutions by :func:`smpconv_models.ops.depthwise_conv2d`.

    Same arguments, same parameters, same state dict, same function. The operation takes one group for each channel,
    as many outputs as inputs, stride 1, an odd kernel and "same" zero padding. With ``backend='auto'`` anything else is
    left to ``conv2d``, so that libraries can make further layers of this class, as LoRA does. Inputs of the operation
    have a batch dimension.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: As
            in ``nn.Conv2d``.
        backend: As in :func:`smpconv_models.ops.depthwise_conv2d`.

    Raises:
        ValueError: An unknown backend, arguments that ``nn.Conv2d`` refuses, or a convolution that the operation can't
            compute with any other backend than ``'auto'``.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: Union[int, Tuple[int, int]],
            stride: Union[int, Tuple[int, int]] = 1,
            padding: Union[str, int, Tuple[int, int]] = 0,
            dilation: Union[int, Tuple[int, int]] = 1,
            groups: int = 1,
            bias: bool = True,
            padding_mode: Literal['zeros', 'reflect', 'replicate', 'circular'] = 'zeros',
            device: Any = None,
            dtype: Any = None,
            backend: str = 'auto',
    ) -> None:
        check_counts(in_channels=in_channels, out_channels=out_channels, groups=groups)
        validate_options(dilation, backend)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype)
        self.backend = backend
        self._takes_operation()

    @torch.jit.unused
    def _takes_operation(self) -> bool:
        """Whether the operation computes this convolution; asked at each call, as attributes may be set afterwards."""
        reasons = why_not_expressed(self)
        if reasons and self.backend != 'auto':
            raise ValueError(
                f'backend {self.backend!r} computes depthwise convolutions of stride 1 with odd kernels and "same" '
                f"zero padding, got {', '.join(reasons)}; only backend 'auto' leaves such a convolution to conv2d")
        return not reasons

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # where the operation is conv2d too
            return self._conv_forward(input, self.weight, self.bias)
        if not self._takes_operation():
            return self._conv_forward(input, self.weight, self.bias)
        return depthwise_conv2d(
            input, self.weight, self.bias, dilation=to_2tuple(self.dilation), backend=self.backend)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, backend={self.backend!r}'


def why_not_expressed(conv: nn.Conv2d) -> List[str]:
    """Return what the operation lacks of a convolution's arguments: all reasons, none if it can compute it."""
    reasons = []
    if conv.groups != conv.in_channels:
        reasons.append(f'groups {conv.groups} for {conv.in_channels} input channels')
    if conv.out_channels != conv.in_channels:
        reasons.append(
            f'channel multiplier {conv.out_channels // conv.in_channels}' if conv.groups == conv.in_channels else
            f'{conv.out_channels} output channels')
    stride = to_2tuple(conv.stride)
    if tuple(stride) != (1, 1):
        reasons.append(f'stride {times(stride)}')
    dilation = to_2tuple(conv.dilation)
    same = (dilation[0] * (conv.kernel_size[0] // 2), dilation[1] * (conv.kernel_size[1] // 2))
    if conv.kernel_size[0] % 2 == 0 or conv.kernel_size[1] % 2 == 0:
        reasons.append(f'even kernel {times(conv.kernel_size)}')
    elif conv.padding != 'same':
        padding = (0, 0) if conv.padding == 'valid' else tuple(to_2tuple(conv.padding))
        if padding != same:
            reasons.append(f'padding {times(padding)}, where same is {times(same)}')
    if conv.padding_mode != 'zeros':
        reasons.append(f'padding_mode {conv.padding_mode!r}')
    return reasons


def times(sizes: Tuple[int, ...]) -> str:
    """Return sizes as text: ``3x5``."""
    return 'x'.join(map(str, sizes))


class ConvNormActBlock(nn.Module):
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

        Pruned, weight-normed and parametrized weights are folded with their effective values. Other normalizations
        stay, and so does a norm beside a convolution that is no plain ``nn.Conv2d`` or ``nn.Conv1d`` (an adapter's
        wrapper), which is logged.
        """
        if callable(fuse_conv := getattr(self.conv, 'fuse', None)):
            self.conv = fuse_conv()
        conv = plain_conv(self.conv)
        affine = batch_norm_affine(self.norm)
        if conv is not None:
            self.conv = conv
        elif affine is not None:
            warn_not_folded(self.norm, self.conv)
        if affine is not None and conv is not None:
            set_weight_bias(conv, *fuse.fold_after(conv.weight, conv.bias, *affine))
            self.norm = nn.Identity().train(self.training)


def batch_norm_affine(norm: Any) -> Optional[Tuple[Tensor, Tensor]]:
    """What ``norm`` does in evaluation as (scale, shift) per channel, or None where it can't be written so.

    Batch norms with running statistics can, frozen ones too. Subclasses that do more (an activation) can't.
    """
    kind = unparametrized_type(norm)
    frozen = kind.__name__ == 'FrozenBatchNorm2d'
    if not frozen and kind not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm):
        return None
    if norm.running_mean is None:
        return None
    with torch.no_grad():
        refresh_(norm)
        return fuse.norm_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def set_weight_bias(conv: Any, weight: Tensor, bias: Tensor) -> None:
    """Gives ``conv`` new values, as parameters that keep its weight's layout and ``requires_grad``."""
    requires_grad = conv.weight.requires_grad
    # a copy into the old weight's strides keeps channels_last
    conv.weight = nn.Parameter(torch.empty_like(conv.weight).copy_(weight), requires_grad)
    conv.bias = nn.Parameter(bias.detach().clone(), requires_grad)
