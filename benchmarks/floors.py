"""The least time in which an H200 could do a depthwise convolution in half precision.

Every byte is moved once, or every product of the block-Toeplitz form goes through the tensor cores, whichever takes
longer. In that form an 8x8 block of outputs is one matrix product with the pixels that reach it: the input rows that
any of its rows needs, of the 8-wide column blocks that any of its columns needs, none outside the map. A map that one
kernel covers from every pixel is one product of all its pixels with all its pixels.
"""
BYTES_PER_SECOND = 4.3e12  # measured, as are the products: bfloat16 matrix multiplication
OPERATIONS_PER_SECOND = 790e12
_ELEMENT_BYTES = 2
_BLOCK = 8


def seconds(batch: int, channels: int, height: int, width: int, kernel: int) -> float:
    """Of y, and of dx and dw too: each reads or writes two maps, and has the same products."""
    outputs = batch * channels * height * width
    moving = 2 * outputs * _ELEMENT_BYTES / BYTES_PER_SECOND
    multiplying = 2 * outputs * products_per_output(height, width, kernel) / OPERATIONS_PER_SECOND
    return max(moving, multiplying)


def products_per_output(height: int, width: int, kernel: int) -> float:
    if max(height, width) <= (kernel + 1) // 2:
        return height * width
    rows = sum(_reach(first, height, kernel // 2) for first in range(0, height, _BLOCK))
    blocks_aside = -(-(kernel // 2) // _BLOCK)
    map_width = -(-width // _BLOCK) * _BLOCK
    columns = sum(_reach(first, map_width, blocks_aside * _BLOCK) for first in range(0, width, _BLOCK))
    return rows * columns * _BLOCK ** 2 / (height * width)


def _reach(first: int, size: int, margin: int) -> int:
    """How many of ``size`` positions lie within ``margin`` of the block that begins at ``first``."""
    return min(first + _BLOCK + margin, size) - max(first - margin, 0)
