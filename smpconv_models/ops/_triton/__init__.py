"""The GPU path: matrix products on tensor cores, compiled by Triton at the first call. See kernels.py."""
import functools
import importlib.util
import logging
import math
import os
import subprocess
from typing import List, Optional

import torch
from torch import Tensor

from .. import _space_to_batch
from .._problem import Call

_logger = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LEAST_CAPABILITY = (8, 0)

# What auto takes it for: products whose time is above that of two launches. Predicted, not yet measured on a GPU.
_LEAST_KERNEL = 7
_LEAST_PRODUCTS = 2 ** 26


def forward(input: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: List[int]) -> Tensor:
    if max(dilation) > 1:
        phases = forward(_space_to_batch.split(input, dilation), weight, bias, [1, 1])
        return _space_to_batch.merge(phases, dilation, input.shape)
    if input.numel() == 0:
        return torch.empty_like(input)
    from . import launch
    bias = None if bias is None else bias.contiguous()
    return launch.forward(launch.rows_first(input), weight.contiguous(), bias)


def weight_grad(grad: Tensor, input: Tensor, kernel_size: List[int], dilation: List[int]) -> Tensor:
    if max(dilation) > 1:
        grad, input = _space_to_batch.split(grad, dilation), _space_to_batch.split(input, dilation)
    from . import launch
    return launch.weight_grad(launch.rows_first(grad), launch.rows_first(input), kernel_size)


def unsupported_reason(device: torch.device, dtype: Optional[torch.dtype] = None) -> Optional[str]:
    if dtype not in (None, *_DTYPES):
        return f'it computes float16, bfloat16 and float32, got {dtype}'
    if device.type == 'cpu' and _is_interpreted():
        if importlib.util.find_spec('triton') is None:
            return 'Triton is not installed'
        # it multiplies their bits as integers (3.9)
        return "Triton's interpreter has no products of bfloat16" if dtype == torch.bfloat16 else None
    if device.type != 'cuda':
        return f'it runs on CUDA tensors, got {device}'
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return None     # no time to try; whoever captures a graph has run its calls before
    return _broken_toolchain(device)


def skip_reason(call: Call) -> Optional[str]:
    if max(call.kernel_size) < _LEAST_KERNEL:
        return f'the kernel is smaller than {_LEAST_KERNEL}'
    if math.prod(call.size) * math.prod(call.kernel_size) < _LEAST_PRODUCTS:
        return 'there is too little to compute'
    if _is_interpreted():
        return 'it is interpreted'
    if torch.version.hip is not None:
        return 'it was never run on ROCm'
    from . import launch
    if launch.mode(call.dtype) == 'exact':
        return 'exact float32 products have no tensor cores'
    return None


def _is_interpreted() -> bool:
    return os.environ.get('TRITON_INTERPRET') == '1'


@functools.cache
def _broken_toolchain(device: torch.device) -> Optional[str]:
    """What keeps Triton from running a kernel on a CUDA device: found out by running one, told once in the log."""
    reason = _unfit_device(device) or _failed_probe(device)
    if reason is not None:
        _logger.warning('depthwise_conv2d has no tensor cores on %s: %s', device, reason)
    return reason


def _unfit_device(device: torch.device) -> Optional[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        return f'PyTorch sees {count} CUDA devices'
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        return f'it needs compute capability {_LEAST_CAPABILITY}, got {capability}'
    return None


def _failed_probe(device: torch.device) -> Optional[str]:
    try:
        from triton.errors import TritonError
    except ImportError as error:
        return f'Triton cannot be imported: {error}'
    from . import launch
    try:
        launch.probe(device)
    except torch.OutOfMemoryError:
        raise       # that may pass
    except (OSError, RuntimeError, subprocess.SubprocessError, TritonError) as error:
        return f'Triton could not run a kernel: {str(error).strip() or type(error).__name__}'
    return None
