"""The GPU path: matrix products on tensor cores, compiled by Triton at the first call. See kernels.py."""
import functools
import logging
import math
import os
import subprocess
from typing import Any, List, Optional

import torch
from torch import Tensor

from .. import _phases

_logger = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LEAST_CAPABILITY = (8, 0)

# What auto takes it for: products whose time is above that of two launches. Predicted, not yet measured on a GPU.
_LEAST_KERNEL = 7
_LEAST_PRODUCTS = 2 ** 26


def forward(input: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: List[int]) -> Tensor:
    if max(dilation) > 1:
        phases = forward(_phases.split(input, dilation), weight, bias, [1, 1])
        return _phases.merge(phases, dilation, input.shape)
    if input.numel() == 0:
        return torch.empty_like(input)
    from . import launch
    bias = None if bias is None else bias.contiguous()
    return launch.forward(launch.rows_first(input), weight.contiguous(), bias)


def weight_grad(grad: Tensor, input: Tensor, kernel_size: List[int], dilation: List[int]) -> Tensor:
    if max(dilation) > 1:
        grad, input = _phases.split(grad, dilation), _phases.split(input, dilation)
    from . import launch
    return launch.weight_grad(launch.rows_first(grad), launch.rows_first(input), kernel_size)


def why_not(device: torch.device, dtype: Optional[torch.dtype] = None) -> Optional[str]:
    if dtype not in (None, *_DTYPES):
        return f'it computes float16, bfloat16 and float32, got {dtype}'
    if device.type == 'cpu' and os.environ.get('TRITON_INTERPRET') == '1':
        # it multiplies their bits as integers (3.9)
        return "Triton's interpreter has no products of bfloat16" if dtype == torch.bfloat16 else None
    if device.type != 'cuda':
        return f'it runs on CUDA tensors, got {device}'
    return _broken_toolchain(device)


def why_slower(call: Any) -> Optional[str]:
    if max(call.kernel_size) < _LEAST_KERNEL:
        return f'the kernel is smaller than {_LEAST_KERNEL}'
    if math.prod(call.size) * math.prod(call.kernel_size) < _LEAST_PRODUCTS:
        return 'there is too little to compute'
    from . import launch
    if launch.mode(call.dtype) == 'exact':
        return 'exact float32 products have no tensor cores'
    return None


@functools.cache
def _broken_toolchain(device: torch.device) -> Optional[str]:
    """What keeps Triton from running a kernel on a CUDA device: found out by running one, told once in the log."""
    try:
        reason = _try_toolchain(device)
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = f'Triton could not run a kernel: {str(error).strip() or type(error).__name__}'
    if reason is not None:
        _logger.warning('depthwise_conv2d has no tensor cores on %s: %s', device, reason)
    return reason


def _try_toolchain(device: torch.device) -> Optional[str]:
    if not torch.cuda.is_available():
        return 'PyTorch sees no CUDA device'
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        return f'it needs compute capability {_LEAST_CAPABILITY}, got {capability}'
    from . import launch
    launch.probe(device)
    return None
