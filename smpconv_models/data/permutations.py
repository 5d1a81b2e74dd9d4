"""The fixed random orders of permuted sequences."""
import json
from pathlib import Path

import torch
from torch import Tensor

# Made by numpy.random.RandomState(0).permutation(length), a stream that NumPy has frozen. The original release draws
# the order of its permuted MNIST anew from NumPy's global generator, whose seed its commands set to 0; nothing in its
# code draws from that before, so that its order should be the same. What counts is the file.
_PATH = Path(__file__).with_name('permutations.json')


def permutation(name: str, length: int) -> Tensor:
    """The order of a data set: step i of a permuted sequence is the element at position ``order[i]``.

    Args:
        name: Of the data set, 'permuted-mnist' or 'permuted-digits'.
        length: Of its sequences.

    Returns:
        ``(length,)``, int64.

    Raises:
        ValueError: The package's file of orders is damaged.
    """
    try:
        order = json.loads(_PATH.read_text())[name]
        is_order = sorted(order) == list(range(length))
    except (OSError, LookupError, TypeError, ValueError):
        is_order = False
    if not is_order:
        raise ValueError(f'{_PATH} is damaged: expected the numbers 0 to {length - 1} as {name!r}; install it anew')
    return torch.tensor(order)
