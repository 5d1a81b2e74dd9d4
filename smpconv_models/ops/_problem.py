"""The convolution problem, axis by axis.

Along an axis, ``y[o] = sum over i of x[o * stride + i * dilation - left] * w[i]``; x is zero outside of the input.
"""
import functools
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Axis(NamedTuple):
    """Height or width of a convolution; ``left`` and ``right`` are zeros around the input, negative if it is cut."""
    size: int
    kernel: int
    stride: int
    left: int
    right: int
    dilation: int

    @property
    def output(self) -> int:
        return (self.size + self.left + self.right - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    @property
    def is_plain(self) -> bool:
        """Return whether stride and dilation are 1."""
        return self.stride == 1 and self.dilation == 1

    @property
    def is_same(self) -> bool:
        """Return whether an odd kernel is centred on each output."""
        return self.is_plain and self.left == self.right == self.kernel // 2 and self.kernel % 2 == 1

    @property
    def even_padding(self) -> int:
        """Zeros on both sides that a convolution of PyTorch adds itself."""
        return max(min(self.left, self.right), 0)

    @property
    def uneven_padding(self) -> Tuple[int, int]:
        """Zeros before and after the input beyond :attr:`even_padding`."""
        return self.left - self.even_padding, self.right - self.even_padding

    def evenly_padded(self) -> 'Axis':
        """Return the axis of an input to which :attr:`uneven_padding` is added."""
        size = self.size + sum(self.uneven_padding)
        return self._replace(size=size, left=self.even_padding, right=self.even_padding)

    def with_output(self, output: int) -> 'Axis':
        """Return the axis with as much padding after the input as a number of outputs takes."""
        read = (output - 1) * self.stride + self.dilation * (self.kernel - 1) + 1
        return self._replace(right=read - self.size - self.left)


Axes = Tuple[Axis, Axis]
# Gradients of input and weight, None for one that is not wanted.
Gradients = Tuple[Optional[Tensor], Optional[Tensor]]


class ConvProblem(NamedTuple):
    """A convolution as far as the choice of a backend depends on it."""
    batch: int
    channels: int
    axes: Axes
    dtype: torch.dtype
    needs_weight_grad: bool


@functools.lru_cache(maxsize=1024)
def input_grad_axes(axes: Axes) -> Axes:
    """Return the convolution of the output's gradient by the flipped kernel, for stride 1."""
    height, width = (
        axis._replace(size=axis.output, left=axis.dilation * (axis.kernel - 1) - axis.left).with_output(axis.size)
        for axis in axes)
    return height, width


@functools.lru_cache(maxsize=1024)
def weight_grad_axes(axes: Axes) -> Axes:
    """Return the convolution of the input by the output's gradient, for stride 1 without dilation."""
    height, width = axes
    return height._replace(kernel=height.output), width._replace(kernel=width.output)


def make_axes(
        size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
        dilation: Sequence[int]) -> Axes:
    """Return the axes of a map of ``size`` (H, W) with padding (top, bottom, left, right)."""
    return (
        Axis(size[0], kernel_size[0], stride[0], padding[0], padding[1], dilation[0]),
        Axis(size[1], kernel_size[1], stride[1], padding[2], padding[3], dilation[1]))


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """Return the layout of results: channels_last if the tensor is, and not contiguous as well."""
    channels_last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_maps(like: Tensor, height: int, width: int) -> Tensor:
    """Return uninitialized maps (N, C, height, width) of a tensor's dtype and layout."""
    return like.new_empty(like.shape[0], like.shape[1], height, width).contiguous(memory_format=memory_format_of(like))


def padded(maps: Tensor, height: Tuple[int, int], width: Tuple[int, int]) -> Tensor:
    """Return maps with zeros before and after both axes, or without elements for negative numbers; no copy for 0."""
    added = [max(number, 0) for number in (*width, *height)]
    maps = F.pad(maps, added) if any(added) else maps
    cut = [max(-number, 0) for number in (*width, *height)]
    left, right, top, bottom = cut
    return maps[:, :, top:maps.shape[2] - bottom, left:maps.shape[3] - right] if any(cut) else maps


def plain_backward(grad: Tensor, input: Tensor, weight: Tensor, axes: Axes, wanted: Sequence[bool]) -> Gradients:
    """Return PyTorch's own gradients of a convolution, None for one that is not wanted."""
    height, width = axes
    uneven = height.uneven_padding, width.uneven_padding
    dx, dw, _ = torch.ops.aten.convolution_backward(
        grad, padded(input, *uneven), weight, None, [height.stride, width.stride],
        [height.even_padding, width.even_padding], [height.dilation, width.dilation], False, [0, 0], len(weight),
        [*wanted, False])
    return None if dx is None else padded(dx, *((-before, -after) for before, after in uneven)), dw
