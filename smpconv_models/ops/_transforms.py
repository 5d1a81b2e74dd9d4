"""Convolutions of one form computed as those of another, for backends that compute only some.

The functions take a backend's own ``forward`` or ``backward``, of the signature in _backends.py.
"""
import functools
from typing import Any, Callable, NamedTuple, Sequence, Tuple

from torch import Tensor

from ._problem import Axes, Axis, Gradients, padded

Step = Callable[..., Any]


# --- any padding and kernel: an odd kernel centred on each output, on a map that holds every output ---


def centred_forward(forward: Step, input: Tensor, weight: Tensor, bias: Any, axes: Axes) -> Tensor:
    """Compute a convolution without stride and dilation."""
    height, width = map(_centre, axes)
    output = forward(
        padded(input, height.halo, width.halo), padded(weight, height.added, width.added), bias,
        (height.axis, width.axis))
    return padded(output, _negative(height.beyond), _negative(width.beyond))


def centred_backward(
        backward: Step, grad: Tensor, input: Tensor, weight: Tensor, axes: Axes, wanted: Sequence[bool]) -> Gradients:
    """Compute the gradients of a convolution without stride and dilation."""
    height, width = map(_centre, axes)
    dx, dw = backward(
        padded(grad, height.beyond, width.beyond), padded(input, height.halo, width.halo),
        padded(weight, height.added, width.added), (height.axis, width.axis), wanted)
    return (
        None if dx is None else padded(dx, _negative(height.halo), _negative(width.halo)),
        None if dw is None else padded(dw, _negative(height.added), _negative(width.added)))


class _Centred(NamedTuple):
    """Axis of the centred kernel, and what is added before and after: to the input, to the kernel, to the output."""
    axis: Axis
    halo: Tuple[int, int]
    added: Tuple[int, int]
    beyond: Tuple[int, int]


def _centre(axis: Axis) -> _Centred:
    kernel = axis.kernel + 1 - axis.kernel % 2
    shift = kernel // 2 - axis.left     # of the output's first element on the map
    first, last = min(shift, 0), max(shift + axis.output, axis.size)
    return _Centred(
        Axis(last - first, kernel, 1, kernel // 2, kernel // 2, 1), (-first, last - axis.size),
        (0, kernel - axis.kernel), (shift - first, last - shift - axis.output))


def _negative(numbers: Tuple[int, int]) -> Tuple[int, int]:
    return -numbers[0], -numbers[1]


# --- a kernel without the elements that see no pixel ---


class Trim(NamedTuple):
    """Axes without the kernel elements that every output finds outside of the map, and how many were cut."""
    axes: Axes
    cut: Tuple[Tuple[int, int], Tuple[int, int]]

    def weight(self, weight: Tensor) -> Tensor:
        return padded(weight, *map(_negative, self.cut))

    def weight_grad(self, weight_grad: Tensor) -> Tensor:
        return padded(weight_grad, *self.cut)


@functools.lru_cache(maxsize=1024)
def trim(axes: Axes) -> Trim:
    """Cut off kernel elements that see no pixel, so that neither memory nor time grows with them."""
    (height, *rows), (width, *columns) = map(_trim_axis, axes)
    return Trim((height, width), ((rows[0], rows[1]), (columns[0], columns[1])))


def _trim_axis(axis: Axis) -> Tuple[Axis, int, int]:
    """Return the axis, and how many elements were cut before and after the others."""
    reach = (axis.output - 1) * axis.stride
    first = max(-((reach - axis.left) // axis.dilation), 0)
    last = min((axis.size - 1 + axis.left) // axis.dilation, axis.kernel - 1)
    left = axis.left - first * axis.dilation
    if first > last:    # an element just before the first pixel stands for all
        first, last, left = 0, 0, reach + 1
    dilation = axis.dilation if last > first else 1
    trimmed = axis._replace(kernel=last + 1 - first, left=left, dilation=dilation).with_output(axis.output)
    return trimmed, first, axis.kernel - 1 - last


# --- dilation: every second, third, ... row and column is a map of its own, an image more ---


def dilated_forward(forward: Step, input: Tensor, weight: Tensor, bias: Any, axes: Axes) -> Tensor:
    """Compute a dilated convolution of stride 1."""
    trimmed = trim(axes)
    phases, period, before = _undilated(trimmed.axes)
    output = forward(_to_images(input, period, before), trimmed.weight(weight), bias, phases)
    return _to_maps(output, period, (0, 0), (axes[0].output, axes[1].output))


def dilated_backward(
        backward: Step, grad: Tensor, input: Tensor, weight: Tensor, axes: Axes, wanted: Sequence[bool]) -> Gradients:
    """Compute the gradients of a dilated convolution of stride 1."""
    trimmed = trim(axes)
    phases, period, before = _undilated(trimmed.axes)
    dx, dw = backward(
        _to_images(grad, period, (0, 0)), _to_images(input, period, before), trimmed.weight(weight), phases, wanted)
    return (
        None if dx is None else _to_maps(dx, period, before, input.shape[2:]),
        None if dw is None else trimmed.weight_grad(dw))


def _undilated(axes: Axes) -> Tuple[Axes, Tuple[int, int], Tuple[int, int]]:
    """Return the axes of a phase, the period, and how many zeros precede the input."""
    def undilated(axis: Axis) -> Axis:
        size = -(-(axis.size + axis.left % axis.dilation) // axis.dilation)
        phase = axis._replace(size=size, left=axis.left // axis.dilation, dilation=1)
        return phase.with_output(-(-axis.output // axis.dilation))
    height, width = axes
    return (
        (undilated(height), undilated(width)), (height.dilation, width.dilation),
        (height.left % height.dilation, width.left % width.dilation))


def _to_images(maps: Tensor, period: Tuple[int, int], before: Sequence[int]) -> Tensor:
    """Return the phases of maps ``(N, C, H, W)`` as ``(N * ph * pw, C, rows, columns)``."""
    return _split(maps, period, before).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def _to_maps(images: Tensor, period: Tuple[int, int], before: Sequence[int], size: Sequence[int]) -> Tensor:
    """Invert :func:`_to_images` for maps of ``size`` (H, W)."""
    return _merge(images.unflatten(0, (-1, *period)).permute(0, 3, 1, 2, 4, 5), before, size)


# --- stride: a sum over the phases of input and kernel, which become channels ---


def strided_forward(forward: Step, input: Tensor, weight: Tensor, bias: Any, axes: Axes) -> Tensor:
    """Compute a convolution with a stride."""
    axes = without_idle_strides(axes)
    if max(axis.stride for axis in axes) == 1:
        return forward(input, weight, bias, axes)
    if max(axis.dilation for axis in axes) > 1:
        (sh, sw), dense = _dense(axes)
        return forward(input, weight, bias, dense)[:, :, ::sh, ::sw]
    phases, period, before = _unstrided(axes)
    kernels = _to_channels(weight.transpose(0, 1), period, before).transpose(0, 1)
    outputs = forward(_to_channels(input, period, (0, 0)), kernels, None, phases)
    output = outputs.unflatten(1, (len(weight), -1)).sum(2)
    return output if bias is None else output + bias[:, None, None]


def strided_backward(
        backward: Step, grad: Tensor, input: Tensor, weight: Tensor, axes: Axes, wanted: Sequence[bool]) -> Gradients:
    """Compute the gradients of a convolution with a stride."""
    axes = without_idle_strides(axes)
    if max(axis.stride for axis in axes) == 1:
        return backward(grad, input, weight, axes, wanted)
    if max(axis.dilation for axis in axes) > 1:
        (sh, sw), dense = _dense(axes)
        grads = grad.new_zeros(*grad.shape[:2], dense[0].output, dense[1].output)
        grads[:, :, ::sh, ::sw] = grad
        return backward(grads, input, weight, dense, wanted)
    phases, period, before = _unstrided(axes)
    grads = grad.repeat_interleave(period[0] * period[1], 1)
    kernels = _to_channels(weight.transpose(0, 1), period, before).transpose(0, 1)
    dx, dw = backward(grads, _to_channels(input, period, (0, 0)), kernels, phases, wanted)
    return (
        None if dx is None else _from_channels(dx, period, (0, 0), input.shape[2:]),
        None if dw is None else _from_channels(dw.transpose(0, 1), period, before, weight.shape[2:]).transpose(0, 1))


@functools.lru_cache(maxsize=1024)
def without_idle_strides(axes: Axes) -> Axes:
    """Return stride 1 for an axis of one output, so that no memory grows with a stride beyond the map."""
    height, width = (axis._replace(stride=1).with_output(1) if axis.output == 1 else axis for axis in axes)
    return height, width


def _dense(axes: Axes) -> Tuple[Tuple[int, int], Axes]:
    """Return the strides, and axes of stride 1 that have the same outputs and those between them."""
    height, width = (
        axis._replace(stride=1).with_output((axis.output - 1) * axis.stride + 1) for axis in axes)
    return (axes[0].stride, axes[1].stride), (height, width)


def _unstrided(axes: Axes) -> Tuple[Axes, Tuple[int, int], Tuple[int, int]]:
    """Return the axes of a phase, the period, and how many zeros precede the kernel."""
    def unstrided(axis: Axis) -> Axis:
        before = -axis.left % axis.stride
        phase = axis._replace(
            size=-(-axis.size // axis.stride), kernel=-(-(axis.kernel + before) // axis.stride),
            left=(axis.left + before) // axis.stride, stride=1)
        return phase.with_output(axis.output)
    height, width = axes
    return (
        (unstrided(height), unstrided(width)), (height.stride, width.stride),
        (-height.left % height.stride, -width.left % width.stride))


def _to_channels(maps: Tensor, period: Tuple[int, int], before: Sequence[int]) -> Tensor:
    """Return the phases of maps ``(N, C, H, W)`` as ``(N, C * ph * pw, rows, columns)``."""
    return _split(maps, period, before).flatten(1, 3)


def _from_channels(phases: Tensor, period: Tuple[int, int], before: Sequence[int], size: Sequence[int]) -> Tensor:
    """Invert :func:`_to_channels` for maps of ``size`` (H, W)."""
    return _merge(phases.unflatten(1, (-1, *period)), before, size)


def _split(maps: Tensor, period: Tuple[int, int], before: Sequence[int]) -> Tensor:
    """Return ``(N, C, H, W)`` as phases ``(N, C, ph, pw, rows, columns)``, with zeros at the end."""
    (ph, pw), (above, left) = period, before
    rows, columns = -(-(maps.shape[2] + above) // ph), -(-(maps.shape[3] + left) // pw)
    maps = padded(
        maps, (above, rows * ph - above - maps.shape[2]), (left, columns * pw - left - maps.shape[3]))
    return maps.unflatten(3, (columns, pw)).unflatten(2, (rows, ph)).permute(0, 1, 3, 5, 2, 4)


def _merge(phases: Tensor, before: Sequence[int], size: Sequence[int]) -> Tensor:
    """Invert :func:`_split` for maps of ``size`` (H, W)."""
    n, c, ph, pw, rows, columns = phases.shape
    maps = phases.permute(0, 1, 4, 2, 5, 3).reshape(n, c, rows * ph, columns * pw)
    return maps[:, :, before[0]:before[0] + size[0], before[1]:before[1] + size[1]]
