"""The public function: its meaning, the check of its arguments, and its dispatch.

The walk of a call: :func:`depthwise_conv2d` checks the options; :func:`_depthwise_conv2d` leaves scripting, tracing,
exporting and ``torch.func`` to plain ``conv2d``, and checks the tensors; ``_custom_op.convolve`` applies autocast and
selects the backend; the backend's ``forward`` computes.
"""
import inspect
from typing import Optional, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _backends, _custom_op, _reference


def depthwise_conv2d(
        input: Tensor, weight: Tensor, bias: Optional[Tensor] = None, *, dilation: Union[int, Tuple[int, int]] = 1,
        backend: str = 'auto') -> Tensor:
    """Compute a depthwise convolution with stride 1 and "same" zero padding, made for large kernels.

    Equal in meaning to ``F.conv2d(input, weight, bias, padding='same', dilation=dilation, groups=C)``. The result
    has the input's shape, dtype and layout (channels_last stays channels_last). Gradients of any order exist.

    Under autocast the dtype is that of ``conv2d``. For fx the call is one leaf function. The call is a plain
    ``conv2d`` with any ``backend`` under scripting, tracing (both without a check of the tensors) and exporting, and
    within ``torch.func`` transforms and forward-mode differentiation. With 'auto' it is also a plain ``conv2d`` while a
    FLOP counter runs that knows PyTorch's convolutions only: one that replaced ``F.conv2d``, or a dispatch mode that is
    not PyTorch's own.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, floating point, any layout; N may be 0, and the map smaller than the
            kernel.
        weight: ``(C, 1, kh, kw)``, odd kernel height and width.
        bias: ``(C,)`` or None.
        dilation: Spacing between kernel elements in pixels, one number or (height, width).
        backend: 'auto' takes the first of :func:`available_backends` that is expected to be faster than plain
            ``conv2d``, and plain ``conv2d`` for small kernels and small layers, after some 10 microseconds of Python. A
            name takes that backend or raises; it never falls back.

    Raises:
        ValueError: The shapes, dtypes, devices, dilation or the backend's name are invalid.
        RuntimeError: The named backend cannot run on this device, its kernel takes more than the device has, or memory
            runs out.

    Numerics:
        'cpu' and 'triton' accumulate in float32 for half precision and in the input's dtype otherwise. 'cpu' computes
        float16 in float32; in the weight gradient of bfloat16 it rounds each image's share first. 'reference' is
        PyTorch's, which on CPUs may accumulate float16 in float16. 'cpu' and 'triton' are deterministic, 'cpu' for a
        fixed number of threads; 'reference' is as deterministic as PyTorch is set to be. float32 on CUDA follows
        ``torch.backends.cudnn.conv.fp32_precision``: products of TF32 on tensor cores, or exact ones. 'triton', and
        'cpu' in the weight gradient, multiply zeros too: an infinite or NaN element may affect results beyond the
        kernel, of its own map (or, in the weight and in the weight gradient, of its own channel).
    """
    validate_options(dilation, backend)
    return _depthwise_conv2d(input, weight, bias, dilation, backend)


def _depthwise_conv2d(
        input: Tensor, weight: Tensor, bias: Optional[Tensor] = None, dilation: Union[int, Tuple[int, int]] = 1,
        backend: str = 'auto') -> Tensor:
    """Dispatch a call whose options are valid. The leaf function of fx graphs, and what TorchScript compiles."""
    if isinstance(dilation, int):
        dilation_list = [dilation, dilation]
    else:
        dilation_list = [dilation[0], dilation[1]]
    if torch.jit.is_scripting():
        return _reference.forward(input, weight, bias, dilation_list)
    if has_torch_function_variadic(input, weight, bias):
        tensors = (input, weight) if bias is None else (input, weight, bias)
        return handle_torch_function(_depthwise_conv2d, tensors, input, weight, bias, dilation, backend)
    if torch.jit.is_tracing():  # before the check, whose conditions would raise warnings
        return _reference.forward(input, weight, bias, dilation_list)
    if isinstance(input, Tensor) and input.ndim == 3:
        return _depthwise_conv2d(input[None], weight, bias, dilation, backend)[0]
    _check(input, weight, bias)
    # PyTorch's custom operators do not support torch.func's transforms and forward-mode differentiation
    is_transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if is_transformed or _custom_op.is_exporting() or torch.onnx.is_in_onnx_export():
        return _reference.forward(input, weight, bias, dilation_list)
    return _custom_op.convolve(input, weight, bias, dilation_list, backend)


# TorchScript has no keyword-only arguments; it reads a function's source through __wrapped__, which has none. The
# public signature stays.
depthwise_conv2d.__signature__ = inspect.signature(depthwise_conv2d)  # type: ignore[attr-defined]
depthwise_conv2d.__wrapped__ = _depthwise_conv2d  # type: ignore[attr-defined]


def validate_options(dilation: Union[int, Tuple[int, int]], backend: str) -> None:
    """Validate the options of :func:`depthwise_conv2d`, for layers that have no tensors yet.

    Raises:
        ValueError: The dilation or the backend's name is invalid. Whether a backend can run depends on the input's
            device and is not checked.
    """
    given = (dilation, dilation) if isinstance(dilation, int) else dilation
    if not isinstance(given, Sequence) or len(given) != 2 or not all(type(number) is int for number in given):
        raise ValueError(f'dilation must be one integer or two, got {dilation!r}')
    if min(given) < 1:
        raise ValueError(f'dilation must be at least 1, got {tuple(given)}')
    if backend != 'auto' and backend not in _backends.AUTO_ORDER:
        raise ValueError(f"backend must be 'auto' or one of {_backends.AUTO_ORDER}, got {backend!r}")


def available_backends(device: Union[str, torch.device] = 'cpu') -> Tuple[str, ...]:
    """Return the names of the backends that can run on ``device``, in the order in which 'auto' tries them."""
    device = torch.device(device)
    return tuple(name for name in _backends.AUTO_ORDER if _backends.load(name).unsupported_reason(device) is None)


def _check(input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> None:
    for name, tensor in (('input', input), ('weight', weight), ('bias', bias)):
        if not isinstance(tensor, Tensor) and not (name == 'bias' and tensor is None):
            raise ValueError(f'{name} must be a tensor, got {type(tensor).__name__}')
    if input.ndim != 4:
        raise ValueError(f'input must have dimensions (N, C, H, W) or (C, H, W), got shape {tuple(input.shape)}')
    channels = input.shape[1]
    if weight.ndim != 4 or weight.shape[0] != channels or weight.shape[1] != 1:
        raise ValueError(
            f'weight must have shape ({channels}, 1, kh, kw) for an input of {channels} channels, got '
            f'{tuple(weight.shape)}')
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f'kernel height and width must be odd, got {tuple(weight.shape[2:])}')
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
