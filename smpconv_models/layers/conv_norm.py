"""Convolution, normalization, activation; and their folding into one convolution.

Folding takes the effective values of pruned, weight-normed and parametrized tensors. Its arithmetic is in float32 at
least, and the results have the dtype of the convolution's weight.
"""
import logging
import sys
from contextlib import nullcontext
from typing import Any, Callable, List, Literal, Optional, Tuple, Union

import torch
from timm.layers import get_act_layer, get_norm_layer, to_2tuple
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from smpconv_models.ops import depthwise_conv1d, depthwise_conv2d, validate_options

from .checks import check_counts

_logger = logging.getLogger(__name__)

NormLayer = Union[str, Callable[[int], nn.Module]]
ActLayer = Union[str, Callable[[], nn.Module]]


def create_norm(norm_layer: NormLayer, channels: int, device: Any = None, dtype: Any = None) -> nn.Module:
    """Create ``norm_layer(channels)`` on the given device; the layer is any callable, or one of timm's names."""
    with nullcontext() if device is None else torch.device(device):  # meta takes no memory for a million channels
        norm = _by_name(norm_layer, get_norm_layer, 'norm_layer')(channels)
    return norm.to(device=device, dtype=dtype)


def create_act(act_layer: ActLayer) -> nn.Module:
    """Create ``act_layer()``; the layer is any callable, or one of timm's names."""
    return _by_name(act_layer, get_act_layer, 'act_layer')()


def _by_name(layer: Any, look_up: Callable[[str], Any], argument: str) -> Callable[..., nn.Module]:
    if not isinstance(layer, str):
        return layer
    try:
        return look_up(layer)
    except KeyError:
        raise ValueError(f"{argument} must be a callable or one of timm's names, got {layer!r}") from None


class CountedConv(nn.Module):
    """Convolution that thop and ptflops count like the ``nn.Conv1d`` or ``nn.Conv2d`` that it equals.

    Both walk a model by ``nn.Module.apply`` and look up the exact type of each module in a table, which gets an entry.
    """

    def products_per_output(self: Any) -> int:
        """Return the number of products in one output element: input channels of a group times kernel elements."""
        return self.weight[0].numel()

    def apply(self, fn: Callable[[nn.Module], Any]) -> Any:
        counter = getattr(fn, '__module__', None)
        if counter in _COUNTER_TABLES:
            table, formula = _COUNTER_TABLES[counter]
            getattr(sys.modules[counter], table, {}).setdefault(type(self), formula)  # other versions may have no table
        return super().apply(fn)


def _count_for_thop(layer: Any, inputs: Any, output: Tensor) -> None:
    layer.total_ops += layer.products_per_output() * output.numel()


def _count_for_ptflops(layer: Any, inputs: Any, output: Tensor) -> None:
    has_bias = getattr(layer, 'bias', None) is not None  # ptflops counts additions of the bias
    layer.__flops__ += (layer.products_per_output() + has_bias) * output.numel()


_COUNTER_TABLES = {
    'thop.profile': ('register_hooks', _count_for_thop),
    'ptflops.pytorch_engine': ('MODULES_MAPPING', _count_for_ptflops),
}


class _DepthwiseConvNd(CountedConv):
    """Base of the layers that use the operation for depthwise convolutions."""

    @torch.jit.unused
    def _takes_operation(self: Any) -> bool:
        """Return whether the operation computes this convolution; called each time, as attributes may change."""
        reasons = unsupported_arguments(self)
        if reasons and self.backend != 'auto':
            raise ValueError(
                f'backend {self.backend!r} computes depthwise convolutions with zero padding, got '
                f"{', '.join(reasons)}; only backend 'auto' leaves such a convolution to PyTorch's")
        return not reasons

    def extra_repr(self: Any) -> str:
        return f'{super().extra_repr()}, backend={self.backend!r}'


class DepthwiseConv2d(_DepthwiseConvNd, nn.Conv2d):
    """``nn.Conv2d`` that computes depthwise convolutions by :func:`smpconv_models.depthwise_conv2d`.

    Same arguments, same parameters, same state dict, same function. The operation takes one group for each channel,
    as many outputs as inputs, and zero padding. With ``backend='auto'`` ``conv2d`` computes other convolutions, so that
    libraries can create layers of this class, as LoRA does.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: As
            in ``nn.Conv2d``.
        backend: Name of a backend, see :func:`smpconv_models.depthwise_conv2d`.

    Raises:
        ValueError: The backend is unknown, ``nn.Conv2d`` refuses the arguments, or the backend is not ``'auto'`` and
            the operation cannot compute the convolution.
    """

    def __init__(
            self, in_channels: int, out_channels: int, kernel_size: Union[int, Tuple[int, int]],
            stride: Union[int, Tuple[int, int]] = 1, padding: Union[str, int, Tuple[int, int]] = 0,
            dilation: Union[int, Tuple[int, int]] = 1, groups: int = 1, bias: bool = True,
            padding_mode: Literal['zeros', 'reflect', 'replicate', 'circular'] = 'zeros', device: Any = None,
            dtype: Any = None, backend: str = 'auto') -> None:
        check_counts(in_channels=in_channels, out_channels=out_channels, groups=groups)
        validate_options(stride=stride, padding=padding, dilation=dilation, backend=backend)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype)
        self.backend = backend
        self._takes_operation()

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting() or not self._takes_operation():  # scripted, the operation is conv2d too
            return self._conv_forward(input, self.weight, self.bias)
        padding = self.padding if isinstance(self.padding, str) else to_2tuple(self.padding)
        return depthwise_conv2d(
            input, self.weight, self.bias, stride=to_2tuple(self.stride), padding=padding,
            dilation=to_2tuple(self.dilation), backend=self.backend)


class DepthwiseConv1d(_DepthwiseConvNd, nn.Conv1d):
    """``nn.Conv1d`` that computes depthwise convolutions by :func:`smpconv_models.depthwise_conv1d`.

    Same arguments, same parameters, same state dict, same function; see :class:`DepthwiseConv2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: As
            in ``nn.Conv1d``.
        backend: Name of a backend, see :func:`smpconv_models.depthwise_conv2d`.

    Raises:
        ValueError: The backend is unknown, ``nn.Conv1d`` refuses the arguments, or the backend is not ``'auto'`` and
            the operation cannot compute the convolution.
    """

    def __init__(
            self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1,
            padding: Union[str, int] = 0, dilation: int = 1, groups: int = 1, bias: bool = True,
            padding_mode: Literal['zeros', 'reflect', 'replicate', 'circular'] = 'zeros', device: Any = None,
            dtype: Any = None, backend: str = 'auto') -> None:
        check_counts(in_channels=in_channels, out_channels=out_channels, groups=groups)
        stride, padding, dilation = _number(stride), _number(padding), _number(dilation)
        if not isinstance(padding, str) and type(padding) is not int:
            raise ValueError(f'padding must be one integer or a word, got {padding!r}')
        validate_options(stride=stride, padding=padding, dilation=dilation, backend=backend, dims=1)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype)
        self.backend = backend
        self._takes_operation()

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting() or not self._takes_operation():
            return self._conv_forward(input, self.weight, self.bias)
        return depthwise_conv1d(
            input, self.weight, self.bias, stride=_number(self.stride), padding=_number(self.padding),
            dilation=_number(self.dilation), backend=self.backend)


def _number(value: Any) -> Any:
    """Return the number of a tuple of one, as ``nn.Conv1d`` stores it, and anything else as it is."""
    return value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value


def unsupported_arguments(conv: Union[nn.Conv1d, nn.Conv2d]) -> List[str]:
    """Return all arguments of a convolution that the operation does not support; none if it can compute it."""
    reasons = []
    if conv.groups != conv.in_channels:
        reasons.append(f'groups {conv.groups} for {conv.in_channels} input channels')
    if conv.out_channels != conv.in_channels:
        reasons.append(
            f'channel multiplier {conv.out_channels // conv.in_channels}' if conv.groups == conv.in_channels else
            f'{conv.out_channels} output channels')
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
        """Sample a kernel of points and fold a batch norm into the convolution. In place, idempotent.

        Pruned, weight-normed and parametrized weights are folded with their effective values. Other normalizations
        stay. So does a norm beside a convolution that is no plain ``nn.Conv2d`` or ``nn.Conv1d`` (an adapter's
        wrapper), which is logged.
        """
        if callable(fuse := getattr(self.conv, 'fuse', None)):
            self.conv = fuse()
        self.norm, self.conv = fold_norm(self.norm, self.conv, fuse_conv_bn)


# --- folding ---


def fold_norm(norm: nn.Module, conv: nn.Module, fuse: Callable[..., Tuple[Tensor, Tensor]]) -> Tuple[Any, Any]:
    """Fold a batch norm into the convolution beside it, in place if its parameters are ordinary; return both.

    The folded norm becomes an identity. A norm that is no batch norm stays, and so does one beside a convolution that
    is not plain. ``fuse`` is :func:`fuse_conv_bn` or :func:`fuse_bn_conv`.
    """
    plain = plain_conv(conv)
    affine = batch_norm_affine(norm)
    if plain is None:
        if affine is not None:
            _logger.warning(
                '%r is not folded: the convolution beside it is a %s.%s, not a plain nn.Conv1d or nn.Conv2d. '
                'Merge or remove what wraps it first.', norm, type(conv).__module__, type(conv).__qualname__)
        return norm, conv
    if affine is None:
        return norm, plain
    set_weight_bias(plain, *fuse(plain.weight, plain.bias, *affine))
    return nn.Identity().train(norm.training), plain


def fuse_conv_bn(weight: Tensor, bias: Optional[Tensor], scale: Tensor, shift: Tensor) -> Tuple[Tensor, Tensor]:
    """Return kernel and bias of ``scale * conv(x) + shift``; scale and shift are per output channel."""
    fused = at_least_float32(weight) * scale.view(-1, *[1] * (weight.ndim - 1))
    fused_bias = shift if bias is None else shift + at_least_float32(bias) * scale
    return fused.to(weight.dtype), fused_bias.to(weight.dtype)


def fuse_bn_conv(weight: Tensor, bias: Optional[Tensor], scale: Tensor, shift: Tensor) -> Tuple[Tensor, Tensor]:
    """Return kernel and bias of ``conv(scale * x + shift)``; scale and shift are per input channel.

    Holds for a convolution without groups and without padding (1x1): padding adds zeros after the shift.
    """
    fused = at_least_float32(weight) * scale.view(1, -1, 1, 1)
    fused_bias = (at_least_float32(weight) * shift.view(1, -1, 1, 1)).sum((1, 2, 3))
    if bias is not None:
        fused_bias = fused_bias + at_least_float32(bias)
    return fused.to(weight.dtype), fused_bias.to(weight.dtype)


def batch_norm_affine(norm: Any) -> Optional[Tuple[Tensor, Tensor]]:
    """Return what ``norm`` does in evaluation as (scale, shift) per channel in float32 at least, or None.

    Supported are batch norms with running statistics, also frozen ones, but no subclasses that do more (an activation).
    """
    kind = _unparametrized_type(norm)
    frozen = kind.__name__ == 'FrozenBatchNorm2d'
    if not frozen and kind not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm):
        return None
    if norm.running_mean is None:
        return None
    with torch.no_grad():
        refresh_(norm)
        scale = (at_least_float32(norm.running_var) + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * at_least_float32(norm.weight)
        shift = -at_least_float32(norm.running_mean) * scale
        if norm.bias is not None:
            shift = shift + at_least_float32(norm.bias)
        return scale, shift


def set_weight_bias(conv: Any, weight: Tensor, bias: Tensor) -> None:
    """Give ``conv`` new values, as parameters that keep its weight's layout and ``requires_grad``."""
    requires_grad = conv.weight.requires_grad
    # a copy into the old weight's strides keeps channels_last
    conv.weight = nn.Parameter(torch.empty_like(conv.weight).copy_(weight), requires_grad)
    conv.bias = nn.Parameter(bias.detach().clone(), requires_grad)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32, and keep wider dtypes."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# --- effective values ---

_RECOMPUTING_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)


def refresh_(module: nn.Module, name: Optional[str] = None) -> None:
    """Recompute the tensors of ``module`` that pruning, weight norm or spectral norm recompute before each forward.

    ``name`` is the attribute of one tensor; by default all are recomputed.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _RECOMPUTING_HOOKS):
            hook_name = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
            if name in (None, hook_name):
                hook(module, None)


def _unparametrized_type(module: nn.Module) -> type:
    """Return the class of ``module`` without the subclass that ``torch.nn.utils.parametrize`` gives it."""
    return type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)


@torch.no_grad()
def plain_conv(conv: nn.Module) -> Optional[Union[nn.Conv1d, nn.Conv2d]]:
    """Return the convolution with its effective weight and bias as ordinary parameters: itself if it has them.

    Otherwise it is a new module: ``remove_parametrizations`` on a deep copy would break the original, as both share a
    class. The result is None if ``conv`` is no ``nn.Conv1d`` or ``nn.Conv2d``, or has modules of its own: an adapter's
    wrapper, for example.
    """
    if not isinstance(conv, (nn.Conv1d, nn.Conv2d)) or set(conv._modules) - {'parametrizations'}:
        return None
    if set(conv._parameters) == {'weight', 'bias'}:
        return conv
    refresh_(conv)
    is_trained = any(parameter.requires_grad for parameter in conv.parameters())
    kind: Any = _unparametrized_type(conv)
    plain = kind.__new__(kind)
    hooks = {key: hook for key, hook in conv._forward_pre_hooks.items() if not isinstance(hook, _RECOMPUTING_HOOKS)}
    own = {name: value for name, value in vars(conv).items() if name not in ('weight', 'bias')}
    vars(plain).update(
        own, _parameters={}, _buffers={}, _modules={}, _forward_pre_hooks=type(conv._forward_pre_hooks)(hooks))
    for name in ('weight', 'bias'):
        value = getattr(conv, name)
        plain.register_parameter(name, None if value is None else nn.Parameter(value.detach().clone(), is_trained))
    return plain
