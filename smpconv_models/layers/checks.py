"""What constructors ask of their arguments."""
from numbers import Integral
from typing import Any


def check_counts(**counts: Any) -> None:
    """Raises ValueError unless each is a positive whole number; by their names."""
    for name, count in counts.items():
        if not _is_whole(count) or count < 1:
            raise ValueError(f'{name} must be a positive whole number, got {count!r}')


def check_num_classes(num_classes: Any) -> None:
    """Raises ValueError unless it is a whole number; 0 is for no classifier."""
    if not _is_whole(num_classes) or num_classes < 0:
        raise ValueError(f'num_classes must be a whole number of at least 0, got {num_classes!r}')


def _is_whole(number: Any) -> bool:
    """NumPy's are, too; truth values aren't."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def check_rates(**rates: float) -> None:
    """Raises ValueError unless each is a rate of dropout; by their names."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f'{name} must lie in [0, 1), got {rate}')


def check_odd(kernel_size: Any) -> None:
    """Raises ValueError unless it is odd and positive."""
    check_odd_sides((kernel_size, kernel_size), kernel_size)


def check_odd_sides(sides: Any, given: Any) -> None:
    """Raises ValueError unless there are two sides, each odd and positive; names what was given in their place."""
    if not isinstance(sides, (tuple, list)) or len(sides) != 2 or any(
            not _is_whole(side) or side < 1 or side % 2 == 0 for side in sides):
        raise ValueError(f'kernel size must be odd and positive, got {given!r}')


def check_small_kernel(small_kernel_size: int, kernel_size: int) -> None:
    """Raises ValueError where the small kernel is larger than the large one, or no number of elements."""
    if not _is_whole(small_kernel_size) or small_kernel_size < 0:
        raise ValueError(f'small_kernel_size must be a whole number of at least 0, got {small_kernel_size!r}')
    if small_kernel_size and small_kernel_size % 2 == 0:
        check_odd(small_kernel_size)
    if small_kernel_size > kernel_size:
        raise ValueError(f'small_kernel_size must not exceed the large kernel, {kernel_size}, got {small_kernel_size}')
