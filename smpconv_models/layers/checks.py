"""Checks of constructors' arguments; each raises ValueError."""
from numbers import Integral
from typing import Any


def check_counts(**counts: Any) -> None:
    """Raise ValueError unless each is a positive whole number; the message has its name."""
    for name, count in counts.items():
        if not _is_whole(count) or count < 1:
            raise ValueError(f'{name} must be a positive whole number, got {count!r}')


def check_num_classes(num_classes: Any) -> None:
    """Raise ValueError unless ``num_classes`` is a whole number; 0 stands for no classifier."""
    if not _is_whole(num_classes) or num_classes < 0:
        raise ValueError(f'num_classes must be a whole number of at least 0, got {num_classes!r}')


def _is_whole(number: Any) -> bool:
    """Accept NumPy's integers too, but no truth values."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def check_rates(**rates: float) -> None:
    """Raise ValueError unless each is a rate of dropout; the message has its name."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f'{name} must lie in [0, 1), got {rate}')


def check_odd(kernel_size: Any) -> None:
    """Raise ValueError unless the side of a kernel is odd and positive."""
    if not _is_whole(kernel_size) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'kernel size must be odd and positive, got {kernel_size!r}')


def check_kernel_size(kernel_size: Any, ndim: int) -> None:
    """Raise ValueError unless a kernel may have this size: odd for images, any positive number for sequences."""
    if ndim == 1:
        check_counts(kernel_size=kernel_size)
    else:
        check_odd(kernel_size)


def check_small_kernel(small_kernel_size: int, kernel_size: int) -> None:
    """Raise ValueError unless the small kernel is odd and not larger than the large one; 0 stands for none."""
    if not _is_whole(small_kernel_size) or small_kernel_size < 0:
        raise ValueError(f'small_kernel_size must be a whole number of at least 0, got {small_kernel_size!r}')
    if small_kernel_size:
        check_odd(small_kernel_size)
    if small_kernel_size > kernel_size:
        raise ValueError(f'small_kernel_size must not exceed the large kernel, {kernel_size}, got {small_kernel_size}')
