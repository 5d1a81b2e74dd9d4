"""The operation as PyTorch's dispatcher knows it: schemas, fake kernels, autograd, autocast. Torch only.

Two operators close the algebra, so that gradients of any order exist:

    y  = depthwise_conv2d(x, w)                 dx = depthwise_conv2d(dy, w turned by 180 degrees)
    dw = depthwise_conv2d_weight_grad(dy, x)    bilinear in dy and x, so its own gradients are convolutions again

Results keep the input's layout: channels_last where the input is, else contiguous.
"""
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _backends, _context, _reference


def depthwise_conv2d(
        input: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        dilation: List[int],
        backend: str,
) -> Tensor:
    """Autocasts as ``conv2d`` does, then calls the operator, or the backend itself where the operator adds nothing.

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
    if not torch.compiler.is_compiling():
        needs_weight_grad = torch.is_grad_enabled() and weight.requires_grad
        chosen = _backends.select(backend, input, weight.shape[2:], dilation, needs_weight_grad)
        if backend == 'auto' and _context.is_counted(knows_operator=True):
            chosen = _reference
        if chosen is _reference or not _is_watched(input, weight, bias):
            return _run(backend, chosen, input, weight, bias, dilation)
    return _conv(input, weight, bias, dilation, backend)


def _is_watched(*tensors: Optional[Tensor]) -> bool:
    """Whether autograd, a dispatch mode or a tensor's own type wants to see the operator."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in given)
    )


def _run(
        backend: str,
        chosen: ModuleType,
        input: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        dilation: List[int],
) -> Tensor:
    with _without_autocast(input.device.type):
        output = _backends.run(backend, chosen, 'forward', input, weight, bias, dilation)
    return output.contiguous(memory_format=_layout(input))


def _is_autocast(device_type: str) -> bool:
    return _context.has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _without_autocast(device_type: str) -> AbstractContextManager:
    """The operands have their dtype by now; a backward pass within autocast must not lower it again."""
    return torch.autocast(device_type, enabled=False) if _is_autocast(device_type) else nullcontext()


def _layout(input: Tensor) -> torch.memory_format:
    channels_last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


@torch.library.custom_op('smpconv_models::depthwise_conv2d', mutates_args=())
def _conv(input: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: List[int], backend: str) -> Tensor:
    chosen = _backends.select(backend, input, weight.shape[2:], dilation)
    return _run(backend, chosen, input, weight, bias, dilation)


@_conv.register_fake
def _(input: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: List[int], backend: str) -> Tensor:
    if backend != 'auto':
        _backends.select(backend, input, weight.shape[2:], dilation)  # one that can't run raises on meta tensors too
    return input.new_empty(input.shape).contiguous(memory_format=_layout(input))


@torch.library.custom_op('smpconv_models::depthwise_conv2d_weight_grad', mutates_args=())
def _weight_grad(grad: Tensor, input: Tensor, kernel_size: List[int], dilation: List[int], backend: str) -> Tensor:
    with _without_autocast(input.device.type):
        chosen = _backends.select(backend, input, kernel_size, dilation)
        weight_grad = _backends.run(backend, chosen, 'weight_grad', grad, input, kernel_size, dilation)
    return weight_grad.contiguous()


@_weight_grad.register_fake
def _(grad: Tensor, input: Tensor, kernel_size: List[int], dilation: List[int], backend: str) -> Tensor:
    return input.new_empty((input.shape[1], 1, kernel_size[0], kernel_size[1]))


def _turn(weight: Tensor) -> Tensor:
    return weight.flip(2, 3)


def _save(ctx: Any, inputs: Tuple[Any, ...], output: Tensor) -> None:
    first, second, _, ctx.dilation, ctx.backend = inputs
    ctx.save_for_backward(first, second)


def _conv_backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    input, weight = ctx.saved_tensors
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_input = _conv(grad, _turn(weight), None, ctx.dilation, ctx.backend) if needs_input else None
    kernel_size = list(weight.shape[2:])
    grad_weight = _weight_grad(grad, input, kernel_size, ctx.dilation, ctx.backend) if needs_weight else None
    grad_bias = grad.sum((0, 2, 3)) if needs_bias else None
    return grad_input, grad_weight, grad_bias, None, None


def _weight_grad_backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    output_grad, input = ctx.saved_tensors
    needs_output_grad, needs_input = ctx.needs_input_grad[:2]
    grad_output_grad = _conv(input, grad, None, ctx.dilation, ctx.backend) if needs_output_grad else None
    grad_input = _conv(output_grad, _turn(grad), None, ctx.dilation, ctx.backend) if needs_input else None
    return grad_output_grad, grad_input, None, None, None


_conv.register_autograd(_conv_backward, setup_context=_save)
_weight_grad.register_autograd(_weight_grad_backward, setup_context=_save)


@register_flop_formula(torch.ops.smpconv_models.depthwise_conv2d)
def _conv_flops(input_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    n, c, h, w = input_shape
    return 2 * n * c * h * w * weight_shape[2] * weight_shape[3]


@register_flop_formula(torch.ops.smpconv_models.depthwise_conv2d_weight_grad)
def _weight_grad_flops(grad_shape: Any, input_shape: Any, kernel_size: Any, *args: Any, **kwargs: Any) -> int:
    n, c, h, w = input_shape
    return 2 * n * c * h * w * kernel_size[0] * kernel_size[1]
