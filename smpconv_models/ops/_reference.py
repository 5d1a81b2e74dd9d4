"""The definition that every backend is tested against: plain ``conv2d``, any device, any floating dtype.

Its speed and its faults are PyTorch's; see _cpu.py for one that never returns.
"""
from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ._problem import Axes, ConvProblem, plain_backward


def conv2d(
        input: Tensor, weight: Tensor, bias: Optional[Tensor], stride: List[int], padding: List[int],
        dilation: List[int]) -> Tensor:
    """Compute ``F.conv2d`` with padding (top, bottom, left, right), of which only the uneven part is a copy."""
    top, bottom, left, right = padding
    even_h, even_w = min(top, bottom), min(left, right)
    if top != bottom or left != right:
        input = F.pad(input, [left - even_w, right - even_w, top - even_h, bottom - even_h])
    return F.conv2d(    # FLOP counters that replace it take no lists
        input, weight, bias, stride=(stride[0], stride[1]), padding=(even_h, even_w),
        dilation=(dilation[0], dilation[1]), groups=weight.shape[0])


def conv1d(
        input: Tensor, weight: Tensor, bias: Optional[Tensor], stride: List[int], padding: List[int],
        dilation: List[int]) -> Tensor:
    """Compute ``F.conv1d`` with padding (left, right), of which only the uneven part is a copy."""
    left, right = padding
    even = min(left, right)
    if left != right:
        input = F.pad(input, [left - even, right - even])
    return F.conv1d(
        input, weight, bias, stride=(stride[0],), padding=(even,), dilation=(dilation[0],), groups=weight.shape[0])


def forward(input: Tensor, weight: Tensor, bias: Optional[Tensor], axes: Axes) -> Tensor:
    h, w = axes
    return conv2d(
        input, weight, bias, [h.stride, w.stride], [h.left, h.right, w.left, w.right], [h.dilation, w.dilation])


backward = plain_backward


def unsupported_reason(device: torch.device, dtype: Optional[torch.dtype] = None) -> Optional[str]:
    return None


def skip_reason(problem: ConvProblem) -> Optional[str]:
    return None
