"""The CPU backend: plain convolutions, arranged so that oneDNN takes its fast kernels for forward and weight gradient.

Measured on 2 cores of an AVX-512 machine (Zen 4), float32, batch 8, torch 2.15, November 2026:
NCHW depthwise kernels of more than 13 elements a side run in a slow loop (28x28, 192 channels: 13x13 2 ms, 15x15
76 ms) while channels_last keeps a fast one (2 ms, 3 ms with both conversions). Up to 13 the NCHW kernel is the faster
of the two or equal. PyTorch's weight gradient is slow in both layouts (29x29: 370 ms); written as a forward
convolution it takes 13 ms.

With AVX2 alone (EPYC, Zen 3, one core, torch 2.14, November 2026) the NCHW kernel with padding is slow from 11x11 on.
PyTorch's gradient of the input, a convolution by the flipped kernel as well, is not. Batch 4, 56x56, 96 channels,
11x11: 6.5 ms, and 12 through channels_last; 8 sequences of 1000, 256 channels, 31 elements: 3.6 and 7.3 ms.
"""
import functools
import math
from typing import Callable, Iterator, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._problem import (
    Axes,
    ConvProblem,
    Gradients,
    empty_maps,
    input_grad_axes,
    memory_format_of,
    padded,
    plain_backward,
    weight_grad_axes,
)
from ._transforms import dilated_backward, dilated_forward, strided_backward, trim, without_idle_strides

_AVX2_ALONE = torch.backends.cpu.get_cpu_capability() == 'AVX2'
_LARGEST_FAST_NCHW_KERNEL = 9 if _AVX2_ALONE else 13

# PyTorch's weight gradient of kernels at most 3 wide is fast: 28x28, 192 channels, channels_last: 3x3 0.7 ms, folded
# 3.5 ms, and 5x5 4.1 and 3.5 ms; in NCHW 1.1 and 1.9 ms, and 5x5 113 and 1.8 ms. With AVX2, 4 sequences of 400, 512
# channels, channels_last, kernels of 7: 3.3 ms along the width, 0.6 ms along the height; of 31: 64 and 2.4 ms.
_NARROW = 3
_TALLEST_FAST_NARROW_KERNEL = 31

# The largest kernel, or output if that is smaller, for which the gradient of the input is the faster way.
_LARGEST_FAST_INPUT_GRAD = 200      # elements: 31x31 on 56x56 takes 63 ms, and 38 in channels_last
_LARGEST_FAST_INPUT_GRAD_NHWC = 128     # elements of the kernel: in channels_last 27x27 on 14x14 9.4 ms, otherwise 7.0
_LARGEST_FAST_INPUT_GRAD_KERNEL = 4096      # as weight gradient, 5x5: 56x56 0.7 and 1.2 ms, 80x80 4.5 and 1.8 ms

# oneDNN's channels_last kernels are fastest if the rows under a kernel stay in a core's cache, so with as few channels
# as fill a vector. With AVX2, 31x31 on 56x56, batch 4, 96 channels, 32 and 16 at a time: 82, 56, 38 ms, and the weight
# gradient 111, 81, 55 ms. As a call takes time too, it should have enough products for every thread: 27x27 on 14x14
# 7.2, 6.4, 7.3 ms.
_CACHED_ROWS_BYTES = 2 ** 19
_PRODUCTS_A_CALL = 2 ** 24
_CHANNELS_A_VECTOR = 16
_CACHED_BYTES = 2 ** 20     # of the weight gradient's input

# For each way in which padding cuts off a kernel, oneDNN keeps a plan of 48 bytes an element: if kernels are as large
# as the map, each of the kh * kw outputs has its own. A map of 200x304 took 2.9 GB, 56x56 149 MB. A halo of zeros
# instead of padding leaves one way: with rows of it 6 MB for 56x56, and 1.2 ms instead of 1.9 for 48 channels. It costs
# the products that padding skips, so small maps do without: 49x49 on 28x28, 90 MB, 2.3 ms instead of 6.3.
_PLAN_BYTES = 48
_MOST_PLAN_BYTES = 96 * 2 ** 20
_MOST_PLAN_BYTES_WITH_HALO = 32 * 2 ** 20
_LARGEST_BLOCK = 128    # pixels a side; 200x304 keeps 13 MB in one piece

# Dilated by 2, 28x28, 192 channels: 13x13 65 ms, and 4 ms as four maps of 14x14; 5x5 1.4 ms, and 9 ms as four maps.
_LARGEST_FAST_DILATED_KERNEL = 5

# With stride 2, PyTorch's gradient of the input is always fast, and that of the weight with small kernels: 56x56, 96
# channels, batch 2, channels_last, 9x9 3.3 ms, as phases 3.9 ms; 13x13 6.3 and 5.0 ms.
_LARGEST_STRIDED_KERNEL = 9

# PyTorch has no fast convolution of these dtypes, which are computed in float32. 96 channels, batch 2: float16, 7x7 on
# 28x28, 0.8 ms in place of 38 ms in NCHW, 1.1 in place of 159 ms in channels_last; bfloat16 with AVX2, 31x31 on 56x56,
# 16 in place of 704 and 1511 ms.
_SLOW_DTYPES = (torch.float16, torch.bfloat16) if _AVX2_ALONE else (torch.float16,)
_GROUP_BYTES = 2 ** 23      # of float32 images at a time

# oneDNN's channels_last kernel for bfloat16 never returns for 2 to 16 channels, from 15x15 on maps of about 30 pixels a
# side (torch 2.15 with AVX512-BF16); so few channels are computed in float32.
_MOST_UNSAFE_BFLOAT16_CHANNELS = 16


def forward(input: Tensor, weight: Tensor, bias: Optional[Tensor], axes: Axes) -> Tensor:
    if input.dtype in _SLOW_DTYPES:
        output = empty_maps(input, axes[0].output, axes[1].output)
        weight, bias = weight.float(), None if bias is None else bias.float()
        for images, results in _by_groups(input, output):
            results.copy_(forward(images.float(), weight, bias, axes))
        return output
    axes = without_idle_strides(axes)
    if _is_slow_dilated(axes):
        return dilated_forward(_depthwise, input, weight, bias, axes)
    return _depthwise(input, weight, bias, axes)


def backward(
        grad: Tensor, input: Tensor, weight: Tensor, axes: Axes, wanted: Sequence[bool]) -> Gradients:
    if input.dtype in _SLOW_DTYPES:
        dx, weight = empty_maps(grad, *input.shape[2:]), weight.float()
        dw = torch.zeros_like(weight)
        for grads, images, results in _by_groups(grad, input, dx):
            some_dx, some_dw = backward(grads.float(), images.float(), weight, axes, wanted)
            if some_dx is not None:
                results.copy_(some_dx)
            if some_dw is not None:
                dw += some_dw
        return dx if wanted[0] else None, dw.to(input.dtype) if wanted[1] else None
    axes = without_idle_strides(axes)
    if max(axis.stride for axis in axes) > 1:
        return (
            plain_backward(grad, input, weight, axes, [True, False])[0] if wanted[0] else None,
            strided_backward(backward, grad, input, weight, axes, [False, True])[1] if wanted[1] else None)
    if _is_slow_dilated(axes):
        return dilated_backward(backward, grad, input, weight, axes, wanted)
    return (
        _input_grad(grad, weight, axes) if wanted[0] else None,
        _weight_grad(grad, input, weight, axes) if wanted[1] else None)


@functools.lru_cache(maxsize=1024)
def _is_slow_dilated(axes: Axes) -> bool:
    return (
        max(axis.stride for axis in axes) == 1 and max(axis.dilation for axis in axes) > 1
        and max(axis.kernel for axis in axes) > _LARGEST_FAST_DILATED_KERNEL)


def _input_grad(grad: Tensor, weight: Tensor, axes: Axes) -> Tensor:
    """Convolve the output's gradient by the flipped kernel."""
    return _depthwise(grad, weight.flip(2, 3), None, input_grad_axes(axes))


def _weight_grad(grad: Tensor, input: Tensor, weight: Tensor, axes: Axes) -> Tensor:
    """Compute ``dw[c, i, j] = sum over n, h, w of grad[n, c, h, w] * input[n, c, h + i - top, w + j - left]``.

    For each image and channel the sum is a convolution of the input by the gradient, so the batch folds into the
    channels: one forward convolution with N * C kernels as large as the map.
    """
    is_nchw = memory_format_of(input) == memory_format_of(grad) == torch.contiguous_format
    is_sequence = input.shape[2] == 1 and is_nchw
    if _is_narrow(axes):
        return _plain_weight_grad(grad, input, weight, axes)
    as_conv = weight_grad_axes(axes)
    if _is_narrow(axes[::-1]) and not (is_sequence and _is_fast_as_input_grad(as_conv, input.dtype)):
        grad, input, weight = (tensor.transpose(2, 3) for tensor in (grad, input, weight))
        if not is_nchw or is_sequence:
            grad, input = _channels_last(grad), _channels_last(input)
        return _plain_weight_grad(grad, input, weight, axes[::-1]).transpose(2, 3)
    if max(axis.dilation for axis in axes) > 1:
        _, weight_grad = dilated_backward(backward, grad, input, weight, axes, [False, True])
        assert weight_grad is not None, 'it is wanted'
        return weight_grad
    if input.numel() == 0:
        return torch.zeros_like(weight)
    trimmed = trim(axes)
    axes = weight_grad_axes(trimmed.axes)
    map_bytes = max(math.prod(input.shape[2:]), math.prod(grad.shape[2:])) * input.itemsize
    folded = min(_CACHED_BYTES // map_bytes, _channels_a_call(axes))
    at_once = _balanced_chunk(len(weight), folded, _CHANNELS_A_VECTOR)
    images = _balanced_chunk(len(input), folded // len(weight), 1)
    return trimmed.weight_grad(torch.cat([
        _weight_grad_as_conv(some_grad, some_input, axes, images, is_nchw)
        for some_grad, some_input in zip(grad.split(at_once, 1), input.split(at_once, 1))
    ]))


def _plain_weight_grad(grad: Tensor, input: Tensor, weight: Tensor, axes: Axes) -> Tensor:
    _, dw = plain_backward(grad, input, weight, axes, [False, True])
    assert dw is not None, 'it is wanted'
    return dw


@functools.lru_cache(maxsize=1024)
def _is_narrow(axes: Axes) -> bool:
    """Return whether PyTorch's own kernels are fast in every layout."""
    height, width = axes
    return (
        width.kernel <= _NARROW and height.kernel <= min(_TALLEST_FAST_NARROW_KERNEL, max(height.size, _NARROW))
        and _is_half_padded(axes))


def _is_half_padded(axes: Axes) -> bool:
    # padding by more than half of the kernel is slow: 27x27 on 12x12 in NCHW 45 ms, channels_last 7 ms
    return all(2 * max(axis.left, axis.right) <= axis.dilation * axis.kernel for axis in axes)


def _by_groups(*tensors: Tensor) -> Iterator[Tuple[Tensor, ...]]:
    """Yield the same groups of images of tensors (N, C, H, W), whose copies in float32 take little memory."""
    elements = max(tensor[:1].numel() for tensor in tensors)
    images = max(_GROUP_BYTES // max(4 * elements, 1), 1)
    return zip(*(tensor.split(images) for tensor in tensors))


def _balanced_chunk(total: int, most: int, multiple: int) -> int:
    """Return the size, a multiple of ``multiple``, of the fewest equal parts of ``total`` that are about ``most``."""
    parts = -(-total // max(most, multiple))
    return -(-total // (parts * multiple)) * multiple


def _weight_grad_as_conv(grad: Tensor, input: Tensor, axes: Axes, images: int, is_nchw: bool) -> Tensor:
    """Convolve the input by the gradient, with ``images`` at a time folded into the channels."""
    in_nchw = _is_fast_in_nchw(axes) or (is_nchw and _is_fast_as_input_grad(axes, input.dtype))
    folded = _weight_grad_as_conv_nchw if in_nchw else _weight_grad_as_conv_channels_last
    parts = (folded(*some, axes) for some in zip(grad.split(images), input.split(images)))
    return functools.reduce(Tensor.add_, parts).to(input.dtype)[:, None]


def _weight_grad_as_conv_nchw(grad: Tensor, input: Tensor, axes: Axes) -> Tensor:
    """Return the sum over all images, ``(C, kh, kw)`` in float32 at least: half precision would lose its low bits."""
    n, c, h, w = input.shape
    output = _depthwise(
        input.reshape(1, n * c, h, w), grad.reshape(n * c, 1, *grad.shape[2:]), None, axes)
    total = output.reshape(n, -1).sum(0, dtype=torch.promote_types(input.dtype, torch.float32))
    return total.view(c, *output.shape[2:])


def _weight_grad_as_conv_channels_last(grad: Tensor, input: Tensor, axes: Axes) -> Tensor:
    """Compute the same as :func:`_weight_grad_as_conv_nchw` by oneDNN's channels_last kernel."""
    n, c = input.shape[:2]
    height, width = axes
    plan_bytes = _PLAN_BYTES * width.output * height.kernel * width.kernel
    has_halo = (plan_bytes * height.output > _MOST_PLAN_BYTES, plan_bytes > _MOST_PLAN_BYTES_WITH_HALO)
    halos = [(axis.left, axis.right) if full else axis.uneven_padding for axis, full in zip(axes, has_halo)]
    within_h, within_w = (
        axis._replace(left=axis.left - halo[0], right=axis.right - halo[1]) for axis, halo in zip(axes, halos))
    folded = _folded(input, *halos)
    # between halos, any block of the map is a convolution by itself
    block_h, block_w = (
        _balanced_chunk(axis.kernel, _LARGEST_BLOCK, 1) if all(has_halo) else axis.kernel for axis in axes)
    total = torch.zeros((), dtype=torch.promote_types(input.dtype, torch.float32))
    for top in range(0, height.kernel, block_h):
        for left in range(0, width.kernel, block_w):
            kernel = grad[:, :, top:top + block_h, left:left + block_w]
            bottom, right = top + kernel.shape[2] + height.output - 1, left + kernel.shape[3] + width.output - 1
            output = _conv_in_channels_last(
                folded[:, :, top:bottom, left:right], kernel.reshape(n * c, 1, *kernel.shape[2:]), None,
                (within_h, within_w))
            output = output.permute(0, 2, 3, 1).reshape(height.output, width.output, n, c)
            total = total + output.sum(2, dtype=total.dtype)
    return total.permute(2, 0, 1)


def _folded(input: Tensor, height: Tuple[int, int], width: Tuple[int, int]) -> Tensor:
    """Return padded images (N, C, H, W) as one channels_last image of N * C channels."""
    (top, bottom), (left, right) = ((max(before, 0), max(after, 0)) for before, after in (height, width))
    input = padded(input, *((min(before, 0), min(after, 0)) for before, after in (height, width)))
    n, c, h, w = input.shape
    folded = input.new_zeros(top + h + bottom, left + w + right, n, c)
    folded[top:top + h, left:left + w] = input.permute(2, 3, 0, 1)
    return folded.flatten(2).permute(2, 0, 1)[None]


def _channels_last(input: Tensor) -> Tensor:
    """Convert to channels_last with the strides that oneDNN expects; PyTorch leaves those of sizes of 1 open."""
    input = input.contiguous(memory_format=torch.channels_last)
    c, h, w = input.shape[1:]
    return input.as_strided(input.shape, (c * h * w, 1, w * c, c))


def unsupported_reason(device: torch.device, dtype: Optional[torch.dtype] = None) -> Optional[str]:
    return None if device.type == 'cpu' else f'it runs on CPU tensors, got {device}'


def skip_reason(problem: ConvProblem) -> Optional[str]:
    """Skip what would call conv2d's kernels anyway: a direct call saves the operator's overhead."""
    if problem.dtype in _SLOW_DTYPES or _is_slow_dilated(problem.axes):
        return None
    is_strided = max(axis.stride for axis in problem.axes) > 1
    if is_strided and max(axis.kernel for axis in problem.axes) <= _LARGEST_STRIDED_KERNEL:
        return "conv2d is as fast for so small a kernel with a stride"
    if (_is_narrow if problem.needs_weight_grad else _is_fast_in_nchw)(problem.axes):
        return "it calls conv2d's own kernels for such a kernel"
    return None


def _depthwise(input: Tensor, weight: Tensor, bias: Optional[Tensor], axes: Axes) -> Tensor:
    """Convolve by PyTorch, in the layout and by the operation that has the fastest kernel."""
    plan = _plan(axes, input.dtype, memory_format_of(input) == torch.contiguous_format)
    return plan.convolve(padded(input, *plan.padding), weight, bias, plan.axes)


class _Plan(NamedTuple):
    """How to convolve: what to pad first, the axes of the padded input, and by which function."""
    padding: Tuple[Tuple[int, int], Tuple[int, int]]
    axes: Axes
    convolve: Callable[[Tensor, Tensor, Optional[Tensor], Axes], Tensor]


@functools.lru_cache(maxsize=1024)
def _plan(axes: Axes, dtype: torch.dtype, is_nchw: bool) -> _Plan:
    height, width = axes
    even = height.evenly_padded(), width.evenly_padded()
    in_nchw = _is_fast_in_nchw(even)
    # without padding, 15x15 on 56x56: NCHW 3.0 ms, channels_last 6.3 ms
    is_unpadded = _AVX2_ALONE and is_nchw and not any(axis.even_padding for axis in even)
    convolve = _conv if in_nchw or is_unpadded else _conv_by_channels
    is_small = math.prod(axis.kernel for axis in even) <= _LARGEST_FAST_INPUT_GRAD_NHWC
    if _is_fast_as_input_grad(even, dtype) and (not in_nchw if is_nchw else is_small):
        convolve = _conv_as_input_grad
    return _Plan((height.uneven_padding, width.uneven_padding), even, convolve)


@functools.lru_cache(maxsize=1024)
def _is_fast_in_nchw(axes: Axes) -> bool:
    return _is_narrow(axes) or (
        max(axis.kernel for axis in axes) <= _LARGEST_FAST_NCHW_KERNEL and _is_half_padded(axes))


@functools.lru_cache(maxsize=1024)
def _is_fast_as_input_grad(axes: Axes, dtype: torch.dtype) -> bool:
    kernel, output = (math.prod(sizes) for sizes in zip(*((axis.kernel, axis.output) for axis in axes)))
    return (
        _AVX2_ALONE and dtype == torch.float32 and kernel <= _LARGEST_FAST_INPUT_GRAD_KERNEL
        and min(kernel, output) <= _LARGEST_FAST_INPUT_GRAD
        and all(axis.is_plain and axis.left == axis.right < axis.kernel for axis in axes))


def _conv_as_input_grad(input: Tensor, weight: Tensor, bias: Optional[Tensor], axes: Axes) -> Tensor:
    """Convolve as PyTorch computes the gradient of the input of a convolution by the flipped kernel."""
    c, h, w = input.shape[1:]
    size = [axis.output for axis in axes]
    shape_giver = input if size == [h, w] else empty_maps(input, *size)     # an expanded one is slow
    output, _, _ = torch.ops.aten.convolution_backward(
        input, shape_giver, weight.flip(2, 3), None, [1, 1], [axis.kernel - 1 - axis.left for axis in axes], [1, 1],
        False, [0, 0], c, [True, False, False])
    return output if bias is None else output.add_(bias[:, None, None])


def _conv_by_channels(input: Tensor, weight: Tensor, bias: Optional[Tensor], axes: Axes) -> Tensor:
    """Convolve in channels_last, a few channels at a time if the rows under the kernels exceed the cache."""
    height, width = axes
    seen = height.kernel * width.size if height.kernel > 1 else width.kernel    # pixels under the kernels of a row
    vector = _CHANNELS_A_VECTOR if input.dtype != torch.bfloat16 else 2 * _MOST_UNSAFE_BFLOAT16_CHANNELS
    at_once = _balanced_chunk(len(weight), _channels_a_call(axes) // max(len(input), 1), vector)
    if seen * len(weight) * input.itemsize <= _CACHED_ROWS_BYTES or at_once >= len(weight):
        return _conv_in_channels_last(input, weight, bias, axes)
    output = empty_maps(input, height.output, width.output)
    for start in range(0, len(weight), at_once):
        part = slice(start, start + at_once)
        output[:, part] = _conv_in_channels_last(
            input[:, part], weight[part], None if bias is None else bias[part], axes)
    return output


def _conv_in_channels_last(input: Tensor, weight: Tensor, bias: Optional[Tensor], axes: Axes) -> Tensor:
    if len(weight) > 1:     # of one channel, oneDNN has no depthwise kernel, and ends the process with some strides
        input = _channels_last(input)
    if input.dtype == torch.bfloat16 and len(weight) <= _MOST_UNSAFE_BFLOAT16_CHANNELS:
        bias = None if bias is None else bias.float()
        return _conv(input.float(), weight.float(), bias, axes).to(torch.bfloat16)
    return _conv(input, weight, bias, axes)


def _channels_a_call(axes: Axes) -> int:
    """Return how many maps, of any image, have enough products for a call."""
    products = math.prod(axis.kernel * axis.output for axis in axes)
    return _PRODUCTS_A_CALL * torch.get_num_threads() // products


def _conv(input: Tensor, weight: Tensor, bias: Optional[Tensor], axes: Axes) -> Tensor:
    height, width = axes
    return F.conv2d(
        input, weight, bias, stride=(height.stride, width.stride),
        padding=(height.even_padding, width.even_padding), dilation=(height.dilation, width.dilation),
        groups=len(weight))
