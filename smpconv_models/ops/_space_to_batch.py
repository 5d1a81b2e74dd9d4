"""A dilated convolution as plain ones: every dh-th row and dw-th column becomes an image."""
from typing import List, Sequence

import torch.nn.functional as F
from torch import Tensor


def space_to_batch(input: Tensor, dilation: List[int]) -> Tensor:
    """Return ``(N, C, H, W)`` as ``(N * dh * dw, C, ceil(H / dh), ceil(W / dw))``, padded with zeros at the end."""
    n, c, h, w = input.shape
    dh, dw = _within_map(dilation, h, w)
    rows, columns = -(-h // dh), -(-w // dw)
    padded = F.pad(input, (0, columns * dw - w, 0, rows * dh - h))
    return padded.reshape(n, c, rows, dh, columns, dw).permute(0, 3, 5, 1, 2, 4).reshape(n * dh * dw, c, rows, columns)


def batch_to_space(phases: Tensor, dilation: List[int], size: Sequence[int]) -> Tensor:
    """Invert :func:`space_to_batch` for a map of ``size`` (N, C, H, W)."""
    n, c, h, w = size
    dh, dw = _within_map(dilation, h, w)
    rows, columns = phases.shape[2:]
    merged = phases.reshape(n, dh, dw, c, rows, columns).permute(0, 3, 4, 1, 5, 2)
    return merged.reshape(n, c, rows * dh, columns * dw)[:, :, :h, :w]


def _within_map(dilation: List[int], height: int, width: int) -> List[int]:
    """Limit the dilation to the map's size: elements outside of the map may as well lie just outside."""
    return [min(dilation[0], max(height, 1)), min(dilation[1], max(width, 1))]
