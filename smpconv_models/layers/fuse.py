"""Folding of normalization into convolutions and merging of parallel kernels: pure functions of tensors.

All of them compute in float32 at least and return the dtype of ``weight``.
"""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_affine(
        running_mean: Tensor,
        running_var: Tensor,
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        eps: float,
) -> Tuple[Tensor, Tensor]:
    """A batch norm in evaluation as ``scale * x + shift``, each ``(C,)``, in float32 at least."""
    scale = (upcast(running_var) + eps).rsqrt()
    if weight is not None:
        scale = scale * upcast(weight)
    shift = -upcast(running_mean) * scale
    if bias is not None:
        shift = shift + upcast(bias)
    return scale, shift


def fold_after(weight: Tensor, bias: Optional[Tensor], scale: Tensor, shift: Tensor) -> Tuple[Tensor, Tensor]:
    """Kernel and bias of ``scale * conv(x) + shift``; scale and shift are per output channel."""
    folded = upcast(weight) * scale.view(-1, *[1] * (weight.ndim - 1))
    folded_bias = shift if bias is None else shift + upcast(bias) * scale
    return folded.to(weight.dtype), folded_bias.to(weight.dtype)


def fold_before(weight: Tensor, bias: Optional[Tensor], scale: Tensor, shift: Tensor) -> Tuple[Tensor, Tensor]:
    """Kernel and bias of ``conv(scale * x + shift)``; scale and shift are per input channel.

    Holds for a convolution without groups and without padding (1x1): padding adds zeros after the shift.
    """
    folded = upcast(weight) * scale.view(1, -1, 1, 1)
    folded_bias = (upcast(weight) * shift.view(1, -1, 1, 1)).sum((1, 2, 3))
    if bias is not None:
        folded_bias = folded_bias + upcast(bias)
    return folded.to(weight.dtype), folded_bias.to(weight.dtype)


def merge_parallel(large: Tensor, small: Tensor) -> Tensor:
    """One kernel for the sum of two "same" convolutions: the small one, zeros around, added to the large one."""
    rows, columns = large.shape[2] - small.shape[2], large.shape[3] - small.shape[3]
    return large + F.pad(small, (columns // 2, columns // 2, rows // 2, rows // 2))


def merge_causal(large: Tensor, small: Tensor) -> Tensor:
    """One kernel for the sum of two causal convolutions, both of which end at the present; the first is the longer."""
    return large + F.pad(small, (large.shape[2] - small.shape[2], 0))


def upcast(tensor: Tensor) -> Tensor:
    """The same in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
