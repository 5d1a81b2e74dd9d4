"""Roofline: minimum time of a depthwise convolution in half precision, on a measured GPU or an assumed H200.

This is the time to move every byte once, or to compute all products of the block-Toeplitz form on the tensor cores,
whichever is longer. In that form, an 8x8 block of outputs is one matrix product with the pixels that contribute to it.
These are all input rows that the block's rows need, in the 8-wide column blocks that its columns need, within the map.
If one kernel covers the map from every pixel, there is one product of all pixels with all pixels.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Ceilings:
    """Rates of a GPU: bytes read and written, and operations of bfloat16 matrix products."""
    bytes_per_second: float
    operations_per_second: float


# Rates assumed for an H200, from the project's first design: it reports them as measured, but no row of results/ holds
# the measurement.
H200 = Ceilings(4.3e12, 790e12)
_ELEMENT_BYTES = 2
_BLOCK = 8


def seconds(
        batch: int, channels: int, height: int, width: int, kernel: int, ceilings: Ceilings = H200) -> float:
    """Return the minimum seconds of y, dx or dw: each reads or writes two maps, and has the same products."""
    outputs = batch * channels * height * width
    moving = 2 * outputs * _ELEMENT_BYTES / ceilings.bytes_per_second
    multiplying = 2 * outputs * products_per_output(height, width, kernel) / ceilings.operations_per_second
    return max(moving, multiplying)


def products_per_output(height: int, width: int, kernel: int) -> float:
    if max(height, width) <= (kernel + 1) // 2:
        return height * width
    rows = sum(_positions_near(first, height, kernel // 2) for first in range(0, height, _BLOCK))
    blocks_aside = -(-(kernel // 2) // _BLOCK)
    map_width = -(-width // _BLOCK) * _BLOCK
    columns = sum(_positions_near(first, map_width, blocks_aside * _BLOCK) for first in range(0, width, _BLOCK))
    return rows * columns * _BLOCK ** 2 / (height * width)


def _positions_near(first: int, size: int, margin: int) -> int:
    """Return how many of ``size`` positions lie within ``margin`` of the block that starts at ``first``."""
    return min(first + _BLOCK + margin, size) - max(first - margin, 0)
