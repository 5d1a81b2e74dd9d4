"""Networks applied to images, which they may refuse."""
from typing import Any, Callable

import torch
from torch import Tensor


def applied(function: Callable[[Tensor], Any], images: Tensor) -> Any:
    """``function(images)``.

    Raises:
        ValueError: The network can't take images of this size or number of channels.
    """
    try:
        return function(images)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as error:  # how networks refuse a size
        shape = tuple(images.shape[1:])
        raise ValueError(f'the model cannot take images of {shape}: {str(error).splitlines()[0]}') from error
