"""The operation as PyTorch's dispatcher knows it: schemas, fake kernels, autograd, autocast, FLOP formulas. Torch only.

Two operators close the algebra, so that gradients of any order exist:

    y = depthwise_conv2d(x, w)
    dx, dw = depthwise_conv2d_backward(dy, x, w)

dx is the convolution of dy with w rotated by 180 degrees, and dw is bilinear in dy and x: the gradients of both are
convolutions, dx or dw again. One operator returns both, for backends that convert dy first.

Results keep the input's layout: channels_last if the input is, otherwise contiguous.
"""
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
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
    elif isinstance(input, FakeTensor):  # its device may not exist, and no kernel can be tried with it
        return _conv(input, weight, bias, dilation, backend, '')
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
    return output.contiguous(memory_format=_backends.memory_format_of(input))


def _is_autocast(device_type: str) -> bool:
    return has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _without_autocast(device_type: str) -> AbstractContextManager:
    """Keep the operands' dtype, which a backward pass within autocast must not lower again."""
    return torch.autocast(device_type, enabled=False) if _is_autocast(device_type) else nullcontext()


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
    return _empty_like(input)


# dx has the layout of dy. One that is not `wanted` is empty: an operator cannot return None.


@torch.library.custom_op('smpconv_models::depthwise_conv2d_backward', mutates_args=())
def _backward(
        grad: Tensor, input: Tensor, weight: Tensor, wanted: List[bool], dilation: List[int], backend: str,
        selected: str) -> Tuple[Tensor, Tensor]:
    selected = selected or _backends.select(backend, input, weight.shape[2:], dilation)
    with _without_autocast(input.device.type):
        dx, dw = _backends.run(backend, selected, 'backward', grad, input, weight, dilation, wanted)
    return (
        grad.new_empty(0) if dx is None else dx.contiguous(memory_format=_backends.memory_format_of(grad)),
        grad.new_empty(0) if dw is None else dw.contiguous(),
    )


@_backward.register_fake
def _(
        grad: Tensor, input: Tensor, weight: Tensor, wanted: List[bool], dilation: List[int], backend: str,
        selected: str) -> Tuple[Tensor, Tensor]:
    return (
        _empty_like(grad) if wanted[0] else grad.new_empty(0),
        input.new_empty(weight.shape) if wanted[1] else grad.new_empty(0),
    )


def _empty_like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape).contiguous(memory_format=_backends.memory_format_of(tensor))


def _save(ctx: Any, inputs: Tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, *ctx.options = inputs
    ctx.save_for_backward(input, weight)


def _save_backward(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    grad, input, weight, ctx.wanted, *ctx.options = inputs
    ctx.save_for_backward(grad, input, weight)


def _conv_grads(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_input = grad_weight = None
    if needs_input or needs_weight:
        dx, dw = _backward(grad, *ctx.saved_tensors, [needs_input, needs_weight], *ctx.options)
        grad_input, grad_weight = dx if needs_input else None, dw if needs_weight else None
    grad_bias = grad.sum((0, 2, 3)) if needs_bias else None
    return grad_input, grad_weight, grad_bias, None, None, None


def _backward_grads(ctx: Any, *grads: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
    of_dx, of_dw = (given if wanted else None for given, wanted in zip(grads, ctx.wanted))
    grad, input, weight = ctx.saved_tensors
    needs_grad, needs_input, needs_weight = ctx.needs_input_grad[:3]
    grad_grad = grad_input = grad_weight = None
    if needs_grad and of_dx is not None:
        grad_grad = _conv(of_dx, weight, None, *ctx.options)
    if needs_grad and of_dw is not None:
        through_dw = _conv(input, of_dw, None, *ctx.options)
        grad_grad = through_dw if grad_grad is None else grad_grad + through_dw
    if needs_input and of_dw is not None:
        grad_input, _ = _backward(grad, input, of_dw, [True, False], *ctx.options)
    if needs_weight and of_dx is not None:
        _, rotated = _backward(of_dx, grad, weight, [False, True], *ctx.options)
        grad_weight = rotated.flip(2, 3)
    return grad_grad, grad_input, grad_weight, None, None, None, None


_conv.register_autograd(_conv_grads, setup_context=_save)
_backward.register_autograd(_backward_grads, setup_context=_save_backward)


@register_flop_formula(torch.ops.smpconv_models.depthwise_conv2d)
def _conv_flops(input_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(input_shape) * weight_shape[2] * weight_shape[3]


@register_flop_formula(torch.ops.smpconv_models.depthwise_conv2d_backward)
def _backward_flops(
        grad_shape: Any, input_shape: Any, weight_shape: Any, wanted: List[bool], *args: Any, **kwargs: Any) -> int:
    return sum(wanted) * _conv_flops(input_shape, weight_shape)


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
