"""The files of MNIST: arrays of bytes behind a header that tells their sizes."""
import hashlib
import math
import struct
from pathlib import Path
from typing import Tuple

import numpy as np

from ..utils.download import DownloadNeededError

# The published files, unpacked: torchvision knows the checksums of the packed ones alone, and one whose unpacking broke
# off is there as far as it can tell. Size in bytes -> MD5.
_PUBLISHED = {
    'train-images-idx3-ubyte': (47040016, '6bbc9ace898e44ae57da46a324031adb'),
    'train-labels-idx1-ubyte': (60008, 'a25bea736e30d166cdddb491f175f624'),
    't10k-images-idx3-ubyte': (7840016, '2646ac647ad5339dbf082846283269ea'),
    't10k-labels-idx1-ubyte': (10008, '27ae3e4e09519cfbb04c329615203637'),
}


def read_idx(path: Path, item: Tuple[int, ...]) -> np.ndarray:
    """Reads a file of bytes, and checks it: its size against its header, and its content if its size is the published.

    Args:
        path: The unpacked file.
        item: Expected shape of an item: ``(28, 28)`` of an image, ``()`` of a label.

    Returns:
        ``(N, *item)``, uint8.

    Raises:
        ValueError: It can't be read or is damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror}') from error
    start = 4 * (2 + len(item))
    magic = 0x800 + 1 + len(item)  # bytes, in as many dimensions
    if len(content) < start or struct.unpack('>I', content[:4])[0] != magic:
        raise _damaged(path, f'it does not begin as a file of bytes in {1 + len(item)} dimensions does')
    sizes = struct.unpack(f'>{1 + len(item)}I', content[4:start])
    if sizes[1:] != item:
        raise _damaged(path, f'expected items of shape {item}, found {sizes[1:]}')
    if len(content) != start + math.prod(sizes):
        raise _damaged(path, f'its header tells {start + math.prod(sizes)} bytes, it has {len(content)}')
    size, md5 = _PUBLISHED.get(path.name, (0, ''))
    if len(content) == size and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise _damaged(path, f'its MD5 is not {md5}')
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)


def _damaged(path: Path, reason: str) -> DownloadNeededError:
    return DownloadNeededError(f'{path} is damaged: {reason}; remove it and')
