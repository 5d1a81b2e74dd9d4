"""The GPU backend: matrix products on tensor cores, compiled by Triton at the first call. See kernels.py."""
import functools
import importlib.util
import logging
import math
import os
from typing import Optional, Sequence

import torch
from torch import Tensor

from .._backends import is_capturing
from .._problem import Axes, ConvProblem, Gradients, empty_maps
from .._transforms import (
    centred_backward,
    centred_forward,
    dilated_backward,
    dilated_forward,
    strided_backward,
    strided_forward,
)

_logger = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MIN_CAPABILITY = (8, 0)

# From these sizes on the products take longer than two launches. Predicted, not yet measured on a GPU.
_MIN_KERNEL = 7
_MIN_PRODUCTS = 2 ** 26


def forward(input: Tensor, weight: Tensor, bias: Optional[Tensor], axes: Axes) -> Tensor:
    if max(axis.stride for axis in axes) > 1:
        return strided_forward(forward, input, weight, bias, axes)
    if max(axis.dilation for axis in axes) > 1:
        return dilated_forward(forward, input, weight, bias, axes)
    if input.numel() == 0:
        return empty_maps(input, axes[0].output, axes[1].output)
    if not all(axis.is_same for axis in axes):
        return centred_forward(forward, input, weight, bias, axes)
    from . import launch
    output = launch.forward(
        launch.contiguous_maps(input), weight.contiguous(), None if bias is None else bias.contiguous())
    return launch.laid_out_like(output, input)


def backward(grad: Tensor, input: Tensor, weight: Tensor, axes: Axes, wanted: Sequence[bool]) -> Gradients:
    if max(axis.stride for axis in axes) > 1:
        return strided_backward(backward, grad, input, weight, axes, wanted)
    if max(axis.dilation for axis in axes) > 1:
        return dilated_backward(backward, grad, input, weight, axes, wanted)
    if not all(axis.is_same for axis in axes):
        return centred_backward(backward, grad, input, weight, axes, wanted)
    from . import launch
    dx = dw = None
    maps = launch.contiguous_maps(grad)
    if wanted[0]:
        dx = launch.forward(maps, weight.contiguous(), None, flipped=True) if grad.numel() else torch.empty_like(grad)
        dx = launch.laid_out_like(dx, grad)
    if wanted[1]:
        dw = launch.weight_grad(maps, launch.contiguous_maps(input), weight.shape[2:])
    return dx, dw


def unsupported_reason(device: torch.device, dtype: Optional[torch.dtype] = None) -> Optional[str]:
    if dtype not in (None, *_DTYPES):
        return f'it computes float16, bfloat16 and float32, got {dtype}'
    if device.type == 'cpu' and _is_interpreted():
        if importlib.util.find_spec('triton') is None:
            return 'Triton is not installed'
        # Triton 3.9's interpreter multiplies their bits as integers
        return "Triton's interpreter has no products of bfloat16" if dtype == torch.bfloat16 else None
    if device.type != 'cuda':
        return f'it runs on CUDA tensors, got {device}'
    if is_capturing():
        return None     # a probe would be captured too; the calls of a captured graph have run before
    return _broken_toolchain(device)


def skip_reason(problem: ConvProblem) -> Optional[str]:
    if max(axis.kernel for axis in problem.axes) < _MIN_KERNEL:
        return f'the kernel is smaller than {_MIN_KERNEL}'
    products = math.prod(axis.output * axis.kernel for axis in problem.axes)
    if problem.batch * problem.channels * products < _MIN_PRODUCTS:
        return 'there is too little to compute'
    if _is_interpreted():
        return 'it is interpreted'
    if torch.version.hip is not None:
        return 'it was never run on ROCm'
    from . import launch
    if launch.matmul_precision(problem.dtype) == 'ieee':
        return 'exact float32 products have no tensor cores'
    return None


def _is_interpreted() -> bool:
    return os.environ.get('TRITON_INTERPRET') == '1'


@functools.cache
def _broken_toolchain(device: torch.device) -> Optional[str]:
    """Return why Triton cannot run a kernel on a CUDA device, found out by running one and logged once."""
    reason = _unfit_device(device) or _failed_probe(device)
    if reason is not None:
        _logger.warning('depthwise_conv2d has no tensor cores on %s: %s', device, reason)
    return reason


def _unfit_device(device: torch.device) -> Optional[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        return f'PyTorch sees {count} CUDA devices'
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _MIN_CAPABILITY:
        return f'it needs compute capability {_MIN_CAPABILITY}, got {capability}'
    return None


def _failed_probe(device: torch.device) -> Optional[str]:
    try:
        from . import launch
    except (ImportError, AttributeError, TypeError, ValueError) as error:   # as of a version with other names
        return f'Triton cannot be imported: {error}'
    try:
        launch.probe(device)
    except torch.OutOfMemoryError:
        raise       # memory may become free
    except (*launch.TOOLCHAIN_ERRORS, AttributeError, TypeError, ValueError) as error:
        return f'Triton could not run a kernel: {launch.reason_line(error)}'
    return None
