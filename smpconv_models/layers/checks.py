"""What constructors ask of their arguments."""
from typing import Any, Tuple, Union


def check_counts(**counts: Any) -> None:
    """Raises ValueError unless each is a positive whole number; by their names."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f'{name} must be a positive whole number, got {count!r}')


def check_rates(**rates: float) -> None:
    """Raises ValueError unless each is a rate of dropout; by their names."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f'{name} must lie in [0, 1), got {rate}')


def check_odd(kernel_size: Union[int, Tuple[int, int]]) -> None:
    """Raises ValueError unless it is one size or two, each odd and positive."""
    sizes = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or any(
            not isinstance(size, int) or size < 1 or size % 2 == 0 for size in sizes):
        raise ValueError(f'kernel size must be odd and positive, got {kernel_size!r}')


def check_small_kernel(small_kernel_size: int, kernel_size: int) -> None:
    """Raises ValueError where the small kernel is larger than the large one, or no number of elements."""
    if not isinstance(small_kernel_size, int) or small_kernel_size < 0:
        raise ValueError(f'small_kernel_size must be a whole number of at least 0, got {small_kernel_size!r}')
    if small_kernel_size > kernel_size:
        raise ValueError(f'small_kernel_size must not exceed the large kernel, {kernel_size}, got {small_kernel_size}')
