"""The operation as PyTorch's dispatcher knows it: schemas, fake kernels, autograd, autocast, FLOP formulas. Torch only.

Two operators close the algebra, so that gradients of any order exist:

    y = depthwise_conv2d(x, w)
    dx, dw = depthwise_conv2d_backward(dy, x, w)

All three are derivatives of ``sum of dy * depthwise_conv2d(x, w)``, which is linear in dy, x and w, so their own
derivatives are again these three. One operator returns both gradients, for backends that convert dy first.

Results keep the input's layout: channels_last if the input is, otherwise contiguous.
"""
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from . import _backends
from ._problem import make_axes, memory_format_of

_CONV1D, _CONV2D = torch.conv1d, torch.conv2d  # F has the same objects unless somebody replaced them


def convolve(
        input: Tensor, weight: Tensor, bias: Optional[Tensor], stride: List[int], padding: List[int],
        dilation: List[int], backend: str) -> Tensor:
    """Autocast as ``conv2d`` does, select the backend, and call the operator, or what computes it if nothing watches.

    The operator's own time, some 50 microseconds, is that of a small layer. Padding is (top, bottom, left, right).
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
        return _conv(input, weight, bias, stride, padding, dilation, backend, '')
    if backend == 'auto' and is_counted(knows_operator=True):
        selected = 'reference'
    elif isinstance(input, FakeTensor):  # its device may not exist, and no kernel can be tried with it
        return _conv(input, weight, bias, stride, padding, dilation, backend, '')
    else:
        needs_weight_grad = torch.is_grad_enabled() and weight.requires_grad
        axes = make_axes(input.shape[2:], weight.shape[2:], stride, padding, dilation)
        selected = _backends.select(backend, input, axes, needs_weight_grad)
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if selected != 'reference' and _is_watched(tensors):
        return _conv(input, weight, bias, stride, padding, dilation, backend, selected)
    if selected != 'reference' and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _ConvFunction.apply(input, weight, bias, stride, padding, dilation, backend, selected)
    return _forward(input, weight, bias, stride, padding, dilation, backend, selected)


def _is_watched(tensors: Tuple[Tensor, ...]) -> bool:
    """Return whether a dispatch mode, a tensor's own type or the profiler has to see the operator."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch.autograd._profiler_enabled() or any(
        type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)


def _forward(
        input: Tensor, weight: Tensor, bias: Optional[Tensor], stride: List[int], padding: List[int],
        dilation: List[int], backend: str, selected: str) -> Tensor:
    axes = make_axes(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    selected = selected or _backends.select(backend, input, axes)
    with _without_autocast(input.device.type):
        output = _backends.run(backend, selected, 'forward', input, weight, bias, axes)
    return _laid_out(output, memory_format_of(input))


def _gradients(
        grad: Tensor, input: Tensor, weight: Tensor, wanted: List[bool], stride: List[int], padding: List[int],
        dilation: List[int], backend: str, selected: str) -> Tuple[Tensor, Tensor]:
    axes = make_axes(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    selected = selected or _backends.select(backend, input, axes)
    with _without_autocast(input.device.type):
        dx, dw = _backends.run(backend, selected, 'backward', grad, input, weight, axes, wanted)
    return (
        grad.new_empty(0) if dx is None else _laid_out(dx, memory_format_of(grad)),
        grad.new_empty(0) if dw is None else _laid_out(dw, torch.contiguous_format),
    )


def _laid_out(result: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Return a tensor in a layout and, as fake kernels promise, at the beginning of its memory."""
    result = result.contiguous(memory_format=memory_format)
    return result.clone() if result.storage_offset() else result


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
        input: Tensor, weight: Tensor, bias: Optional[Tensor], stride: List[int], padding: List[int],
        dilation: List[int], backend: str, selected: str) -> Tensor:
    return _forward(input, weight, bias, stride, padding, dilation, backend, selected)


@_conv.register_fake
def _(
        input: Tensor, weight: Tensor, bias: Optional[Tensor], stride: List[int], padding: List[int],
        dilation: List[int], backend: str, selected: str) -> Tensor:
    axes = make_axes(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    if backend != 'auto' and not selected:
        _backends.select(backend, input, axes)  # one that cannot run raises on meta tensors too
    return _empty(input, (input.shape[0], input.shape[1], axes[0].output, axes[1].output))


# dx has the layout of dy. One that is not `wanted` is empty: an operator cannot return None.


@torch.library.custom_op('smpconv_models::depthwise_conv2d_backward', mutates_args=())
def _backward(
        grad: Tensor, input: Tensor, weight: Tensor, wanted: List[bool], stride: List[int], padding: List[int],
        dilation: List[int], backend: str, selected: str) -> Tuple[Tensor, Tensor]:
    return _gradients(grad, input, weight, wanted, stride, padding, dilation, backend, selected)


@_backward.register_fake
def _(
        grad: Tensor, input: Tensor, weight: Tensor, wanted: List[bool], stride: List[int], padding: List[int],
        dilation: List[int], backend: str, selected: str) -> Tuple[Tensor, Tensor]:
    return (
        _empty(grad, input.shape) if wanted[0] else grad.new_empty(0),
        input.new_empty(weight.shape) if wanted[1] else grad.new_empty(0),
    )


def _empty(like: Tensor, size: Sequence[int]) -> Tensor:
    return like.new_empty(size).contiguous(memory_format=memory_format_of(like))


def _save(ctx: Any, inputs: Tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, *ctx.options = inputs
    ctx.save_for_backward(input, weight)


def _save_backward(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    grad, input, weight, ctx.wanted, *ctx.options = inputs
    ctx.save_for_backward(grad, input, weight)


def _conv_grads(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    input, weight = ctx.saved_tensors
    grad_input = grad_weight = None
    if needs_input or needs_weight:
        is_watched = torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_watched((grad, input, weight))
        backward = _backward if is_watched else _gradients
        dx, dw = backward(grad, input, weight, [needs_input, needs_weight], *ctx.options)
        grad_input, grad_weight = dx if needs_input else None, dw if needs_weight else None
    grad_bias = grad.sum((0, 2, 3)) if needs_bias else None
    return grad_input, grad_weight, grad_bias, None, None, None, None, None


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
        _, grad_weight = _backward(grad, of_dx, weight, [False, True], *ctx.options)
    return grad_grad, grad_input, grad_weight, None, None, None, None, None, None


_conv.register_autograd(_conv_grads, setup_context=_save)
_backward.register_autograd(_backward_grads, setup_context=_save_backward)


class _ConvFunction(torch.autograd.Function):
    """The operator for plain tensors that no dispatch mode watches, which takes less Python than the operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:     # PyTorch inspects the signatures of a separate setup_context
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        return _conv_grads(ctx, grad)


@register_flop_formula(torch.ops.smpconv_models.depthwise_conv2d)
def _conv_flops(
        input_shape: Any, weight_shape: Any, bias_shape: Any, *options: Any, out_shape: Any, **kwargs: Any) -> int:
    return 2 * math.prod(out_shape) * weight_shape[2] * weight_shape[3]


@register_flop_formula(torch.ops.smpconv_models.depthwise_conv2d_backward)
def _backward_flops(
        grad_shape: Any, input_shape: Any, weight_shape: Any, wanted: List[bool], *args: Any, **kwargs: Any) -> int:
    return sum(wanted) * 2 * math.prod(grad_shape) * weight_shape[2] * weight_shape[3]


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
