"""What the choice of a backend depends on."""
from typing import NamedTuple, Sequence

import torch


class Call(NamedTuple):
    """A convolution of a map of ``size`` (N, C, H, W), and whether its weight's gradient will be asked for."""
    size: Sequence[int]
    dtype: torch.dtype
    kernel_size: Sequence[int]
    dilation: Sequence[int]
    needs_weight_grad: bool
