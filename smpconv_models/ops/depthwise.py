"""The public functions: their meaning, the check of their arguments, and their dispatch.

The walk of a call: :func:`depthwise_conv2d` checks the options; :func:`_depthwise_conv2d` leaves scripting, tracing,
exporting and ``torch.func`` to plain ``conv2d``, and checks the tensors; ``_custom_op.convolve`` applies autocast and
selects the backend; the backend's ``forward`` computes. :func:`depthwise_conv1d` is the same for maps of height 1.
"""
import inspect
import math
import warnings
from typing import Any, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _backends, _custom_op, _reference

_LARGEST_SIZE = 2 ** 63 - 1


def depthwise_conv2d(
        input: Tensor, weight: Tensor, bias: Optional[Tensor] = None, *, stride: Union[int, Tuple[int, int]] = 1,
        padding: Union[str, int, Tuple[int, int]] = 'same', dilation: Union[int, Tuple[int, int]] = 1,
        backend: str = 'auto') -> Tensor:
    """Compute a depthwise convolution with zero padding, made for large kernels.

    Equal in meaning to ``F.conv2d(input, weight, bias, stride, padding, dilation, groups=C)``; only the default padding
    differs. The result has the input's dtype and layout (channels_last stays channels_last). Gradients of any order
    exist.

    Under autocast the dtype is that of ``conv2d``. For fx the call is one leaf function. The call is a plain
    ``conv2d`` with any ``backend`` under scripting, tracing (both without a check of the tensors) and exporting, and
    within ``torch.func`` transforms and forward-mode differentiation. With 'auto' it is also a plain ``conv2d`` while a
    FLOP counter runs that knows PyTorch's convolutions only: one that replaced ``F.conv2d``, or a dispatch mode that is
    not PyTorch's own.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, floating point, any layout; N may be 0, and the map smaller than the
            kernel if the padding makes up for it.
        weight: ``(C, 1, kh, kw)``.
        bias: ``(C,)`` or None.
        stride: Step between outputs in input pixels, one number or (height, width).
        padding: Zeros on both sides, one number or (height, width); 'valid' for none; or 'same' for as many as keep
            the map's size, which takes stride 1, and of an odd total has one more at the end.
        dilation: Spacing between kernel elements in pixels, one number or (height, width).
        backend: 'auto' takes the first of :func:`available_backends` that is expected to be faster than plain
            ``conv2d``, and plain ``conv2d`` for small kernels and small layers, after some 10 microseconds of Python. A
            name takes that backend or raises; it never falls back.

    Raises:
        ValueError: The shapes, dtypes, devices, options or the backend's name are invalid, or the padded map is smaller
            than the kernel.
        RuntimeError: The named backend cannot run on this device, its kernel takes more than the device has, or memory
            runs out.

    Numerics:
        'cpu' and 'triton' accumulate in float32 for half precision and in the input's dtype otherwise. 'cpu' computes
        float16 in float32, and bfloat16 too with AVX2 alone; elsewhere each image's share of a weight gradient is
        rounded to bfloat16. With a stride above 1, 'triton' rounds the share of each of the stride's phases first.
        'reference' is PyTorch's, which on CPUs may accumulate float16 in float16. 'cpu' and 'triton' are deterministic,
        'cpu' for a fixed number of threads; 'reference' is as deterministic as PyTorch is set to be. float32 on CUDA
        follows ``torch.backends.cudnn.conv.fp32_precision``: products of TF32 on tensor cores, or exact ones. 'triton',
        and 'cpu' in gradients, multiply zeros too: an infinite or NaN element may affect results beyond the kernel, of
        its own map (or, in the weight and in the weight gradient, of its own channel).
    """
    validate_options(stride=stride, padding=padding, dilation=dilation, backend=backend)
    return _depthwise_conv2d(input, weight, bias, stride, padding, dilation, backend)


def _depthwise_conv2d(
        input: Tensor, weight: Tensor, bias: Optional[Tensor] = None, stride: Union[int, Tuple[int, int]] = 1,
        padding: Union[str, int, Tuple[int, int]] = 'same', dilation: Union[int, Tuple[int, int]] = 1,
        backend: str = 'auto') -> Tensor:
    """Dispatch a call whose options are valid. The leaf function of fx graphs, and what TorchScript compiles."""
    if isinstance(stride, int):
        strides = [stride, stride]
    else:
        strides = [stride[0], stride[1]]
    if isinstance(dilation, int):
        dilations = [dilation, dilation]
    else:
        dilations = [dilation[0], dilation[1]]
    if not torch.jit.is_scripting():
        if has_torch_function_variadic(input, weight, bias):
            tensors = (input, weight) if bias is None else (input, weight, bias)
            return handle_torch_function(
                _depthwise_conv2d, tensors, input, weight, bias, stride, padding, dilation, backend)
        if not torch.jit.is_tracing():  # which would warn of every condition in the checks
            return _dispatch(input, weight, bias, strides, padding, dilations, backend)
    paddings = _paddings(padding, _kernel_size(weight), dilations)
    return _reference.conv2d(input, weight, bias, strides, paddings, dilations)


def depthwise_conv1d(
        input: Tensor, weight: Tensor, bias: Optional[Tensor] = None, *, stride: int = 1,
        padding: Union[str, int, Tuple[int, int]] = 'same', dilation: int = 1, backend: str = 'auto') -> Tensor:
    """Compute a depthwise convolution of sequences with zero padding, made for long kernels.

    Equal in meaning to ``F.conv1d(input, weight, bias, stride, padding, dilation, groups=C)``; only the default padding
    differs, and there are more paddings. Dtypes, layouts, gradients, and the calls that PyTorch's convolution computes
    are those of :func:`depthwise_conv2d`; that convolution is ``conv1d``, or ``conv2d`` of height 1.

    Args:
        input: ``(N, C, L)`` or ``(C, L)``, floating point, any layout; N may be 0. A transposed ``(N, L, C)`` is read
            and returned without copies, as channels_last.
        weight: ``(C, 1, k)``.
        bias: ``(C,)`` or None.
        stride: Step between outputs in input elements.
        padding: Zeros on both sides, one number or (left, right); 'valid' for none; 'same' for as many as keep the
            length, which takes stride 1, and of an odd total has one more at the end; or 'causal' for ``dilation * (k -
            1)`` on the left, so that no output depends on later elements.
        dilation: Spacing between kernel elements.
        backend: 'auto' or a name, see :func:`depthwise_conv2d`.

    Raises:
        ValueError: The shapes, dtypes, devices, options or the backend's name are invalid, or the padded sequence is
            shorter than the kernel.
        RuntimeError: The named backend cannot run on this device, or memory runs out.

    Numerics:
        Those of :func:`depthwise_conv2d`.
    """
    validate_options(stride=stride, padding=padding, dilation=dilation, backend=backend, dims=1)
    return _depthwise_conv1d(input, weight, bias, stride, padding, dilation, backend)


def _depthwise_conv1d(
        input: Tensor, weight: Tensor, bias: Optional[Tensor] = None, stride: int = 1,
        padding: Union[str, int, Tuple[int, int]] = 'same', dilation: int = 1, backend: str = 'auto') -> Tensor:
    """Dispatch as :func:`_depthwise_conv2d` does."""
    if not torch.jit.is_scripting():
        if has_torch_function_variadic(input, weight, bias):
            tensors = (input, weight) if bias is None else (input, weight, bias)
            return handle_torch_function(
                _depthwise_conv1d, tensors, input, weight, bias, stride, padding, dilation, backend)
        if not torch.jit.is_tracing():
            return _dispatch(input, weight, bias, [stride], padding, [dilation], backend)
    paddings = _paddings(padding, _kernel_size(weight), [dilation])
    return _reference.conv1d(input, weight, bias, [stride], paddings, [dilation])


# TorchScript has no keyword-only arguments; it reads a function's source through __wrapped__, which has none. The
# public signature stays.
for _public, _leaf in ((depthwise_conv2d, _depthwise_conv2d), (depthwise_conv1d, _depthwise_conv1d)):
    _public.__signature__ = inspect.signature(_public)  # type: ignore[attr-defined]
    _public.__wrapped__ = _leaf  # type: ignore[attr-defined]


def _kernel_size(weight: Tensor) -> List[int]:
    """Return a kernel's size, in a traced graph a constant."""
    if not torch.jit.is_scripting():
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', torch.jit.TracerWarning)
            return [int(size) for size in weight.shape[2:]]
    return list(weight.shape[2:])


def _paddings(padding: Union[str, int, Tuple[int, int]], kernel_size: List[int], dilation: List[int]) -> List[int]:
    """Return the zeros before and after each axis."""
    dims = len(kernel_size)
    if isinstance(padding, str):
        paddings: List[int] = []
        for size, spacing in zip(kernel_size, dilation):
            total = 0 if padding == 'valid' else spacing * (size - 1)
            before = total if padding == 'causal' else total // 2
            paddings += [before, total - before]
        return paddings
    if isinstance(padding, int):
        return [padding] * (2 * dims)
    if dims == 1:
        return [padding[0], padding[1]]
    return [padding[0], padding[0], padding[1], padding[1]]


def _dispatch(
        input: Tensor, weight: Tensor, bias: Optional[Tensor], stride: List[int],
        padding: Union[str, int, Tuple[int, int]], dilation: List[int], backend: str) -> Tensor:
    """Check the tensors, and leave to PyTorch's convolution what custom operators do not support."""
    dims = len(stride)
    _check_tensors(dims, input, weight, bias)
    is_unbatched = input.ndim == dims + 1
    if is_unbatched:
        input = input[None]
    paddings = _paddings(padding, list(weight.shape[2:]), dilation)
    _check_sizes(input, weight, stride, paddings, dilation)
    # PyTorch's custom operators do not support torch.func's transforms and forward-mode differentiation
    is_transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if is_transformed or _custom_op.is_exporting() or torch.onnx.is_in_onnx_export():
        plain = _reference.conv1d if dims == 1 else _reference.conv2d
        output = plain(input, weight, bias, stride, paddings, dilation)
    elif dims == 1:
        output = _custom_op.convolve(
            input[:, :, None], weight[:, :, None], bias, [1, *stride], [0, 0, *paddings], [1, *dilation], backend)
        output = output[:, :, 0]
    else:
        output = _custom_op.convolve(input, weight, bias, stride, paddings, dilation, backend)
    return output[0] if is_unbatched else output


def validate_options(
        *, stride: Union[int, Tuple[int, int]] = 1, padding: Union[str, int, Tuple[int, int]] = 'same',
        dilation: Union[int, Tuple[int, int]] = 1, backend: str = 'auto', dims: int = 2) -> None:
    """Validate the options of :func:`depthwise_conv2d` (or 1d by ``dims``), for layers that have no tensors yet.

    Raises:
        ValueError: An option is invalid. Whether a backend can run depends on the input's device and is not checked.
    """
    _validate_numbers('stride', stride, 1, dims)
    _validate_numbers('dilation', dilation, 1, dims)
    words = ('same', 'valid') if dims == 2 else ('same', 'valid', 'causal')
    if not isinstance(padding, str):
        _validate_numbers('padding', padding, 0, 2)
    elif padding not in words:
        raise ValueError(f'padding must be a number, two, or one of {words}, got {padding!r}')
    elif padding == 'same' and stride not in (1, (1, 1), [1, 1]):
        raise ValueError(f"padding 'same' takes stride 1, got stride {stride!r}")
    if backend != 'auto' and backend not in _backends.AUTO_ORDER:
        raise ValueError(f"backend must be 'auto' or one of {_backends.AUTO_ORDER}, got {backend!r}")


def _validate_numbers(name: str, given: Any, least: int, count: int) -> None:
    numbers = [given] if type(given) is int else given
    if type(given) is not int:
        is_right = count > 1 and isinstance(given, Sequence) and len(given) == count
        if not is_right or not all(type(number) is int for number in given):
            raise ValueError(f"{name} must be one integer{' or two' if count > 1 else ''}, got {given!r}")
    if min(numbers) < least:
        raise ValueError(f'{name} must be at least {least}, got {given!r}')
    if max(numbers) > _LARGEST_SIZE:
        raise ValueError(f'{name} must be at most {_LARGEST_SIZE}, got {given!r}')


def available_backends(device: Union[str, torch.device] = 'cpu') -> Tuple[str, ...]:
    """Return the names of the backends that can run on ``device``, in the order in which 'auto' tries them."""
    device = torch.device(device)
    return tuple(name for name in _backends.AUTO_ORDER if _backends.load(name).unsupported_reason(device) is None)


def _check_tensors(dims: int, input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> None:
    for name, tensor in (('input', input), ('weight', weight), ('bias', bias)):
        if not isinstance(tensor, Tensor) and not (name == 'bias' and tensor is None):
            raise ValueError(f'{name} must be a tensor, got {type(tensor).__name__}')
    if input.ndim not in (dims + 1, dims + 2):
        expected = '(N, C, H, W) or (C, H, W)' if dims == 2 else '(N, C, L) or (C, L)'
        raise ValueError(f'input must have dimensions {expected}, got shape {tuple(input.shape)}')
    channels = input.shape[-dims - 1]
    if weight.ndim != dims + 2 or weight.shape[0] != channels or weight.shape[1] != 1:
        expected = 'kh, kw' if dims == 2 else 'k'
        raise ValueError(
            f'weight must have shape ({channels}, 1, {expected}) for an input of {channels} channels, got '
            f'{tuple(weight.shape)}')
    if channels == 0:
        raise ValueError(f'input must have at least one channel, got shape {tuple(input.shape)}')
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f'bias must have shape ({channels},), got {tuple(bias.shape)}')
    for name, tensor in (('input', input), ('weight', weight), ('bias', bias)):
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise ValueError(f'{name} must be of a floating dtype, got {tensor.dtype}')
        if tensor.device != input.device:
            raise ValueError(f'{name} must be on the device of input, {input.device}, got {tensor.device}')


def _check_sizes(
        input: Tensor, weight: Tensor, stride: List[int], padding: List[int], dilation: List[int]) -> None:
    """Check that each axis has an output, and that the output has a size that PyTorch can count."""
    outputs = []
    for axis, name in enumerate(('height', 'width') if len(stride) == 2 else ('length',)):
        size, kernel, before, after = input.shape[2 + axis], weight.shape[2 + axis], *padding[2 * axis:2 * axis + 2]
        needed, padded = dilation[axis] * (kernel - 1) + 1, before + size + after
        if kernel < 1 or size < 1:
            raise ValueError(f'input and kernel must have at least one element, got {name} {size} and {kernel}')
        if padded < needed:
            raise ValueError(
                f'kernel {name} {kernel} with dilation {dilation[axis]} needs a padded input of at least {needed}, got '
                f'{padded}: {size} with padding {before} and {after}')
        outputs.append((padded - needed) // stride[axis] + 1)
    if not torch.compiler.is_compiling() and math.prod((*input.shape[:2], *outputs)) > _LARGEST_SIZE:
        raise ValueError(f'output must have at most {_LARGEST_SIZE} elements, got {(*input.shape[:2], *outputs)}')
