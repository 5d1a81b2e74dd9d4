"""How far a map reaches: the central square that holds a share of it."""
from typing import NamedTuple

import numpy as np


class CentralSquare(NamedTuple):
    """The smallest one that holds a share of a map.

    Attributes:
        side: In elements, odd; 1 is the central element alone.
        area: Part of the map's area that it covers, in (0, 1].
    """
    side: int
    area: float

    def __str__(self) -> str:
        return f'{self.side}x{self.side}'


def central_square(values: np.ndarray, share: float) -> CentralSquare:
    """The smallest square about the element ``(H // 2, W // 2)`` that holds at least this share of the sum.

    It is cut off where the map ends. The ratio of RepLKNet's high-contribution areas, where the map is the one of
    :func:`effective_receptive_field`, scaled by :func:`log_scaled`; theirs begin at a side of 3.

    Args:
        values: Map of shape ``(H, W)``, not negative.
        share: In (0, 1].

    Raises:
        ValueError: Another share or shape, negative or infinite values, or all are zero.
    """
    if not 0 < share <= 1:
        raise ValueError(f'share must lie in (0, 1], got {share}')
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f'expected a map of shape (H, W), got {values.shape}')
    if not np.isfinite(values).all() or values.min() < 0 or values.max() <= 0:
        raise ValueError('expected a map of finite values that are not negative, and not all zero')
    height, width = values.shape
    rows, columns = abs(np.arange(height) - height // 2), abs(np.arange(width) - width // 2)
    distance = np.maximum(rows[:, None], columns[None])
    held = np.bincount(distance.ravel(), weights=values.ravel()).cumsum()
    # the last sum is all of it, whatever the rounding
    reach = min(int(np.searchsorted(held, share * held[-1])), len(held) - 1)
    return CentralSquare(2 * reach + 1, float((distance <= reach).mean()))
