"""The definition that every backend is tested against: plain ``conv2d``, any device, any floating dtype.

Its speed and its faults are PyTorch's; see _cpu.py for one that never returns.
"""
from typing import List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as conv_grad

from ._backends import ConvProblem, Gradients


def forward(input: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: List[int]) -> Tensor:
    return F.conv2d(
        input, weight, bias,
        padding=(dilation[0] * (weight.shape[2] // 2), dilation[1] * (weight.shape[3] // 2)),
        dilation=(dilation[0], dilation[1]),  # FLOP counters that replace conv2d take no lists
        groups=weight.shape[0],
    )


def backward(
        grad: Tensor, input: Tensor, weight: Tensor, dilation: List[int], wanted: Sequence[bool]) -> Gradients:
    return (
        forward(grad, weight.flip(2, 3), None, dilation) if wanted[0] else None,
        weight_grad(grad, input, list(weight.shape[2:]), dilation) if wanted[1] else None,
    )


def weight_grad(grad: Tensor, input: Tensor, kernel_size: List[int], dilation: List[int]) -> Tensor:
    channels = input.shape[1]
    return conv_grad.conv2d_weight(
        input, (channels, 1, kernel_size[0], kernel_size[1]), grad,
        padding=(dilation[0] * (kernel_size[0] // 2), dilation[1] * (kernel_size[1] // 2)),
        dilation=(dilation[0], dilation[1]),
        groups=channels,
    )


def unsupported_reason(device: torch.device, dtype: Optional[torch.dtype] = None) -> Optional[str]:
    return None


def skip_reason(problem: ConvProblem) -> Optional[str]:
    return None
