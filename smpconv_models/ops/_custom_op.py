"""The operation as PyTorch's dispatcher knows it: schemas, fake kernels, autograd, autocast, FLOP formulas. Torch only.

Two operators close the algebra, so that gradients of any order exist:

    y  = depthwise_conv2d(x, w)                 dx = depthwise_conv2d(dy, w rotated by 180 degrees)
    dw = depthwise_conv2d_weight_grad(dy, x)    bilinear in dy and x, so its own gradients are convolutions again

Results keep the input's layout: channels_last if the input is, otherwise contiguous.
"""
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from . import _backends

_CONV1D, _CONV2D = torch.conv1d, torch.conv2d  # F has the same objects unless somebody replaced them


def convolve(input: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: List[int], backend: str) -> Tensor:
    """Autocast as ``conv2d`` does, select the backend, and call the operator, or the backend if nothing watches.

    The operator's own time, some 50 microseconds, is that of a small layer.
    """
    if _is_autocast(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = _autocast(input, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    if not input.dtype == weight.dtype == (weight.dtype if bias is None else bias.dtype):
        raise ValueError(
            f'input, weight and bias must have one dtype, got {input.dtype}, {weight.dtype} and '
            f'{None if bias is None else bias.dtype}'
        )
    if torch.compiler.is_compiling():
        return _conv(input, weight, bias, dilation, backend, '')
    if backend == 'auto' and is_counted(knows_operator=True):
        selected = 'reference'
    else:
        needs_weight_grad = torch.is_grad_enabled() and weight.requires_grad
        selected = _backends.select(backend, input, weight.shape[2:], dilation, needs_weight_grad)
    if selected == 'reference' or not _needs_dispatch(input, weight, bias):
        return _forward(input, weight, bias, dilation, backend, selected)
    return _conv(input, weight, bias, dilation, backend, selected)


def _needs_dispatch(*tensors: Optional[Tensor]) -> bool:
    """Return whether autograd, a dispatch mode or a tensor's own type has to see the operator."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in given)
    )


def _forward(
        input: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: List[int], backend: str,
        selected: str) -> Tensor:
    with _without_autocast(input.device.type):
        output = _backends.run(backend, selected, 'forward', input, weight, bias, dilation)
    return output.contiguous(memory_format=_memory_format(input))


def _is_autocast(device_type: str) -> bool:
    return has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _without_autocast(device_type: str) -> AbstractContextManager:
    """Keep the operands' dtype, which a backward pass within autocast must not lower again."""
    return torch.autocast(device_type, enabled=False) if _is_autocast(device_type) else nullcontext()


def _memory_format(input: Tensor) -> torch.memory_format:
    channels_last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


# `selected` is the backend that :func:`convolve` has selected, for the gradients too. A compiled graph passes
# '' and leaves the selection to run time; the weight then counts as trained.


@torch.library.custom_op('smpconv_models::depthwise_conv2d', mutates_args=())
def _conv(
        input: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: List[int], backend: str,
        selected: str) -> Tensor:
    selected = selected or _backends.select(backend, input, weight.shape[2:], dilation)
    return _forward(input, weight, bias, dilation, backend, selected)


@_conv.register_fake
def _(
        input: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: List[int], backend: str,
        selected: str) -> Tensor:
    if backend != 'auto' and not selected:
        _backends.select(backend, input, weight.shape[2:], dilation)  # one that cannot run raises on meta tensors too
    return input.new_empty(input.shape).contiguous(memory_format=_memory_format(input))


@torch.library.custom_op('smpconv_models::depthwise_conv2d_weight_grad', mutates_args=())
def _weight_grad(
        grad: Tensor, input: Tensor, kernel_size: List[int], dilation: List[int], backend: str,
        selected: str) -> Tensor:
    selected = selected or _backends.select(backend, input, kernel_size, dilation)
    with _without_autocast(input.device.type):
        weight_grad = _backends.run(backend, selected, 'weight_grad', grad, input, kernel_size, dilation)
    return weight_grad.contiguous()


@_weight_grad.register_fake
def _(grad: Tensor, input: Tensor, kernel_size: List[int], dilation: List[int], backend: str, selected: str) -> Tensor:
    return input.new_empty((input.shape[1], 1, kernel_size[0], kernel_size[1]))


def _save(ctx: Any, inputs: Tuple[Any, ...], output: Tensor) -> None:
    first, second, _, *ctx.options = inputs
    ctx.save_for_backward(first, second)


def _conv_backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    input, weight = ctx.saved_tensors
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_input = _conv(grad, _rotate180(weight), None, *ctx.options) if needs_input else None
    grad_weight = _weight_grad(grad, input, list(weight.shape[2:]), *ctx.options) if needs_weight else None
    grad_bias = grad.sum((0, 2, 3)) if needs_bias else None
    return grad_input, grad_weight, grad_bias, None, None, None


def _weight_grad_backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    output_grad, input = ctx.saved_tensors
    needs_output_grad, needs_input = ctx.needs_input_grad[:2]
    grad_output_grad = _conv(input, grad, None, *ctx.options) if needs_output_grad else None
    grad_input = _conv(output_grad, _rotate180(grad), None, *ctx.options) if needs_input else None
    return grad_output_grad, grad_input, None, None, None, None


def _rotate180(weight: Tensor) -> Tensor:
    return weight.flip(2, 3)


_conv.register_autograd(_conv_backward, setup_context=_save)
_weight_grad.register_autograd(_weight_grad_backward, setup_context=_save)


@register_flop_formula(torch.ops.smpconv_models.depthwise_conv2d)
def _conv_flops(input_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(input_shape) * weight_shape[2] * weight_shape[3]


@register_flop_formula(torch.ops.smpconv_models.depthwise_conv2d_weight_grad)
def _weight_grad_flops(grad_shape: Any, input_shape: Any, kernel_size: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(input_shape) * kernel_size[0] * kernel_size[1]


# --- what surrounds a call ---


def is_counted(knows_operator: bool = False) -> bool:
    """Return whether convolutions with backend 'auto' must be plain ``F.conv2d`` or ``F.conv1d`` now, to be counted.

    Some FLOP counters know PyTorch's convolutions only, not this package's operator or an FFT. They replace functions
    of ``torch.nn.functional`` (calflops, DeepSpeed) or are dispatch modes (ptflops' aten backend). PyTorch's own modes
    (checkpointing, fake tensors, export) see what is computed. Counters that go by the type of modules are served in
    ``layers``. Measured on 2 cores, x86-64: 0.7 microseconds if nobody counts.

    Args:
        knows_operator: Whether the computation is an operator with a formula for PyTorch's ``FlopCounterMode``.
    """
    if torch.compiler.is_compiling():
        return False
    if F.conv2d is not _CONV2D or F.conv1d is not _CONV1D:
        return True
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack  # private: nobody else depends on it
    modules = [type(mode).__module__ for mode in _get_current_dispatch_mode_stack()]
    return any(
        not knows_operator if module == FlopCounterMode.__module__ else not module.startswith('torch.')
        for module in modules)


def is_exporting() -> bool:
    """Return whether ``torch.export`` is tracing, also while its strict mode runs Dynamo.

    ``torch.compiler.is_exporting()`` of PyTorch 2.10 is true under ``torch.compile`` as well.
    """
    return torch.compiler._is_exporting_flag


def has_autocast(device_type: str) -> bool:
    """Return whether PyTorch knows autocast on a device; ``meta`` is one without."""
    if torch.compiler.is_compiling():  # PyTorch 2.10 cannot trace the question
        return device_type != 'meta'
    return torch.amp.is_autocast_available(device_type)
