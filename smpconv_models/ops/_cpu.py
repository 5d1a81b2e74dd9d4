"""The CPU backend: plain convolutions, arranged so that oneDNN takes its fast kernels for forward and weight gradient.

Measured on 2 cores of an AVX-512 machine (Zen 4), float32, batch 8, torch 2.15, November 2026:
NCHW depthwise kernels of more than 13 elements a side run in a slow loop (28x28, 192 channels: 13x13 2 ms, 15x15
76 ms) while channels_last keeps a fast one (2 ms, 3 ms with both conversions). Up to 13 the NCHW kernel is the faster
of the two or equal. PyTorch's weight gradient is slow in both layouts (29x29: 370 ms); written as a forward
convolution it takes 13 ms.

With AVX2 alone (EPYC 7001, one core, batch 4, torch 2.14) the NCHW kernel is slow from 11x11 on: 28x28, 192 channels:
9x9 5 ms, and 9 ms through channels_last; 11x11 82 and 18 ms. There PyTorch's gradient of the input in NCHW is faster
than a forward pass through channels_last: 56x56, 96 channels, batch 2: 31x31 49 and 76 ms.
"""
import functools
from typing import Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as conv_grad

from ._backends import ConvProblem, Gradients, batch_to_space, memory_format_of, space_to_batch

_AVX2_ALONE = torch.backends.cpu.get_cpu_capability() == 'AVX2'
_LARGEST_FAST_NCHW_KERNEL = 9 if _AVX2_ALONE else 13

# PyTorch's weight gradient of 3x3 kernels is fast: 28x28, 192 channels, channels_last: 0.7 ms, folded 3.5 ms, and 5x5
# 4.1 and 3.5 ms; in NCHW 1.1 and 1.9 ms, and 5x5 113 and 1.8 ms.
_LARGEST_FAST_WEIGHT_GRAD_KERNEL = 3

# Images and channels folded at a time should stay in the cache: 31x31 on 56x56 costs 18 us a folded channel with 32 of
# them, 29 with 192, 34 with 768; 29x29 on 28x28 3.9 us with 192, 5.8 with 768. The kernels take 16 channels a vector.
_CACHED_BYTES = 2 ** 20
_CHANNELS_A_VECTOR = 16

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

# PyTorch has no fast convolution of this dtype, which is computed in float32. 28x28, 96 channels, batch 2, 7x7: 0.8 ms
# in place of 38 ms in NCHW, 1.1 in place of 159 ms in channels_last.
_SLOW_DTYPE = torch.float16
_GROUP_BYTES = 2 ** 23      # of float32 images at a time

# oneDNN's channels_last kernel for bfloat16 never returns for 2 to 16 channels, from 15x15 on maps of about 30 pixels a
# side (torch 2.15 with AVX512-BF16); so few channels cost little in float32.
_MOST_UNSAFE_BFLOAT16_CHANNELS = 16


def forward(input: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: List[int]) -> Tensor:
    if input.dtype == _SLOW_DTYPE:
        output = torch.empty_like(input)
        weight, bias = weight.float(), None if bias is None else bias.float()
        for images, results in _by_groups(input, output):
            results.copy_(forward(images.float(), weight, bias, dilation))
        return output
    kh, kw = weight.shape[2:]
    if max(dilation) > 1 and max(kh, kw) > _LARGEST_FAST_DILATED_KERNEL:
        output = _depthwise(space_to_batch(input, dilation), weight, bias, [kh // 2, kw // 2])
        return batch_to_space(output, dilation, input.shape)
    padding = [dilation[0] * (kh // 2), dilation[1] * (kw // 2)]
    return _depthwise(input, weight, bias, padding, dilation)


def backward(
        grad: Tensor, input: Tensor, weight: Tensor, dilation: List[int], wanted: Sequence[bool]) -> Gradients:
    if input.dtype == _SLOW_DTYPE:
        dx, weight = torch.empty_like(grad), weight.float()
        dw = torch.zeros_like(weight)
        for grads, images, results in _by_groups(grad, input, dx):
            some_dx, some_dw = backward(grads.float(), images.float(), weight, dilation, wanted)
            if some_dx is not None:
                results.copy_(some_dx)
            if some_dw is not None:
                dw += some_dw
        return dx if wanted[0] else None, dw.to(_SLOW_DTYPE) if wanted[1] else None
    return (
        input_grad(grad, weight, dilation) if wanted[0] else None,
        weight_grad(grad, input, list(weight.shape[2:]), dilation) if wanted[1] else None,
    )


def input_grad(grad: Tensor, weight: Tensor, dilation: List[int]) -> Tensor:
    """Convolve the output's gradient by the rotated kernel."""
    kh, kw = weight.shape[2:]
    is_slow_in_nchw = max(kh, kw) > _LARGEST_FAST_NCHW_KERNEL and memory_format_of(grad) == torch.contiguous_format
    if _AVX2_ALONE and is_slow_in_nchw and grad.dtype == torch.float32 and max(dilation) == 1:
        parts = [
            conv_grad.conv2d_input(grads.shape, weight, grads, padding=(kh // 2, kw // 2), groups=len(weight))
            for grads, in _by_groups(grad)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    return forward(grad, weight.flip(2, 3), None, dilation)


def weight_grad(grad: Tensor, input: Tensor, kernel_size: List[int], dilation: List[int]) -> Tensor:
    """Compute ``dw[c, i, j] = sum over n, h, w of grad[n, c, h, w] * input[n, c, h + i - p, w + j - p]``.

    For each image and channel the sum is a convolution of the input by the gradient, so the batch folds into the
    channels: one forward convolution with N * C kernels as large as the map.
    """
    channels = input.shape[1]
    kh, kw = kernel_size
    if max(kh, kw) <= _LARGEST_FAST_WEIGHT_GRAD_KERNEL:
        return conv_grad.conv2d_weight(
            input, (channels, 1, kh, kw), grad,
            padding=(dilation[0] * (kh // 2), dilation[1] * (kw // 2)),
            dilation=(dilation[0], dilation[1]),
            groups=channels,
        )
    if max(dilation) > 1:
        grad, input = space_to_batch(grad, dilation), space_to_batch(input, dilation)
    if input.numel() == 0:
        return input.new_zeros(channels, 1, kh, kw)
    # no two pixels are farther apart than the map is wide
    reached = [min(k, 2 * size - 1) for k, size in zip(kernel_size, input.shape[2:])]
    beyond_h, beyond_w = (kh - reached[0]) // 2, (kw - reached[1]) // 2
    map_bytes = input[0, 0].numel() * input.itemsize
    at_once = _balanced_chunk(channels, _CACHED_BYTES // map_bytes, _CHANNELS_A_VECTOR)
    images = _balanced_chunk(len(input), _CACHED_BYTES // (map_bytes * channels), 1)
    weight_grad = torch.cat([
        _weight_grad_as_conv(some_grad, some_input, reached, images)
        for some_grad, some_input in zip(grad.split(at_once, 1), input.split(at_once, 1))
    ])
    return F.pad(weight_grad, (beyond_w, beyond_w, beyond_h, beyond_h))


def _by_groups(*tensors: Tensor) -> Iterator[Tuple[Tensor, ...]]:
    """Yield the same groups of images of tensors (N, C, H, W), whose copies in float32 take little memory."""
    images = max(_GROUP_BYTES // max(4 * tensors[0][:1].numel(), 1), 1)
    return zip(*(tensor.split(images) for tensor in tensors))


def _balanced_chunk(total: int, most: int, multiple: int) -> int:
    """Return the size, a multiple of ``multiple``, of the fewest equal parts of ``total`` that are about ``most``."""
    parts = -(-total // max(most, multiple))
    return -(-total // (parts * multiple)) * multiple


def _weight_grad_as_conv(grad: Tensor, input: Tensor, kernel_size: List[int], images: int) -> Tensor:
    """Compute the weight gradient, with ``images`` at a time folded into the channels."""
    h, w = input.shape[2:]
    kh, kw = kernel_size
    # the NCHW kernel is slow if padding exceeds half its size: 27x27 on 12x12 45 ms, channels_last 7 ms
    in_nchw = max(h, w) <= _LARGEST_FAST_NCHW_KERNEL and kh <= h and kw <= w
    folded = _weight_grad_as_conv_nchw if in_nchw else _weight_grad_as_conv_channels_last
    parts = (folded(*some, kernel_size) for some in zip(grad.split(images), input.split(images)))
    return functools.reduce(Tensor.add_, parts).to(input.dtype)[:, None]


def _weight_grad_as_conv_nchw(grad: Tensor, input: Tensor, kernel_size: List[int]) -> Tensor:
    """Return the sum over all images, ``(C, kh, kw)`` in float32 at least: half precision would lose its low bits."""
    n, c, h, w = input.shape
    kh, kw = kernel_size
    output = _depthwise(input.reshape(1, n * c, h, w), grad.reshape(n * c, 1, h, w), None, [kh // 2, kw // 2])
    return output.view(n, -1).sum(0, dtype=torch.promote_types(input.dtype, torch.float32)).view(c, kh, kw)


def _weight_grad_as_conv_channels_last(grad: Tensor, input: Tensor, kernel_size: List[int]) -> Tensor:
    """Compute the same as :func:`_weight_grad_as_conv_nchw` by oneDNN's channels_last kernel."""
    n, c, h, w = input.shape
    kh, kw = kernel_size
    halo_h = kh // 2 if _PLAN_BYTES * kh * kw * h * w > _MOST_PLAN_BYTES else 0
    halo_w = kw // 2 if _PLAN_BYTES * kw * h * w > _MOST_PLAN_BYTES_WITH_HALO else 0
    folded = input.new_zeros(h + 2 * halo_h, w + 2 * halo_w, n, c)
    folded[halo_h:halo_h + h, halo_w:halo_w + w] = input.permute(2, 3, 0, 1)
    folded = folded.flatten(2).permute(2, 0, 1)[None]
    # with a halo on every side, any block of the map is a convolution by itself
    block_h, block_w = (_balanced_chunk(size, _LARGEST_BLOCK, 1) if halo_w else size for size in (h, w))
    total = torch.zeros((), dtype=torch.promote_types(input.dtype, torch.float32))
    for top in range(0, h, block_h):
        for left in range(0, w, block_w):
            kernel = grad[:, :, top:top + block_h, left:left + block_w]
            bottom, right = top + kernel.shape[2] + 2 * halo_h, left + kernel.shape[3] + 2 * halo_w
            output = _depthwise(
                _channels_last(folded[:, :, top:bottom, left:right]),
                kernel.reshape(n * c, 1, *kernel.shape[2:]), None, [kh // 2 - halo_h, kw // 2 - halo_w])
            total = total + output.permute(0, 2, 3, 1).reshape(kh, kw, n, c).sum(2, dtype=total.dtype)
    return total.permute(2, 0, 1)


def _channels_last(input: Tensor) -> Tensor:
    """Convert to channels_last with the strides that oneDNN expects; PyTorch leaves those of sizes of 1 open."""
    input = input.contiguous(memory_format=torch.channels_last)
    c, h, w = input.shape[1:]
    return input.as_strided(input.shape, (c * h * w, 1, w * c, c))


def unsupported_reason(device: torch.device, dtype: Optional[torch.dtype] = None) -> Optional[str]:
    return None if device.type == 'cpu' else f'it runs on CPU tensors, got {device}'


def skip_reason(problem: ConvProblem) -> Optional[str]:
    """Skip what would call conv2d's kernels anyway: a direct call saves the operator's overhead."""
    largest = max(problem.kernel_size)
    if problem.dtype == _SLOW_DTYPE:
        return None
    if max(problem.dilation) > 1 and largest > _LARGEST_FAST_DILATED_KERNEL:
        return None
    if largest <= (_LARGEST_FAST_WEIGHT_GRAD_KERNEL if problem.needs_weight_grad else _LARGEST_FAST_NCHW_KERNEL):
        return "it calls conv2d's own kernels for so small a kernel"
    return None


def _depthwise(
        input: Tensor, weight: Tensor, bias: Optional[Tensor], padding: List[int],
        dilation: Sequence[int] = (1, 1)) -> Tensor:
    channels = weight.shape[0]
    if max(weight.shape[2:]) > _LARGEST_FAST_NCHW_KERNEL:
        input = _channels_last(input)
        if input.dtype == torch.bfloat16 and channels <= _MOST_UNSAFE_BFLOAT16_CHANNELS:
            bias = None if bias is None else bias.float()
            output = _depthwise(input.float(), weight.float(), bias, padding, dilation)
            return output.to(torch.bfloat16)
    return F.conv2d(input, weight, bias, padding=tuple(padding), dilation=tuple(dilation), groups=channels)
