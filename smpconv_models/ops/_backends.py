"""The backends by name, which one computes a problem, and what they share.

A backend is a module of this package, imported at its first use, with ``forward``, ``weight_grad`` and two checks that
return None or a reason: ``unsupported_reason(device, dtype)`` if it cannot run, and ``skip_reason(problem)``, which
only ``auto`` asks, if plain ``conv2d`` is faster.
"""
import functools
import importlib
import logging
from types import ModuleType
from typing import Any, List, NamedTuple, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

_logger = logging.getLogger(__name__)

# Fastest first; the last one runs everywhere.
AUTO_ORDER: Tuple[str, ...] = ('cpu', 'triton', 'reference')


class ConvProblem(NamedTuple):
    """A convolution of an input of ``size`` (N, C, H, W), as far as the choice of a backend depends on it."""
    size: Sequence[int]
    dtype: torch.dtype
    kernel_size: Sequence[int]
    dilation: Sequence[int]
    needs_weight_grad: bool


class LaunchError(RuntimeError):
    """A device lacks what a backend's kernel takes, such as shared memory."""


@functools.cache
def load(name: str) -> ModuleType:
    """Import the backend ``name``."""
    return importlib.import_module(f'{__package__}._{name}')


def select(
        backend: str, input: Tensor, kernel_size: Sequence[int], dilation: Sequence[int],
        needs_weight_grad: bool = True) -> str:
    """Return the name of the backend for ``input``: the given one, or for 'auto' the first that can and is not slower.

    A named backend never falls back: raise RuntimeError if it cannot run there.
    """
    if backend == 'auto':
        problem = ConvProblem(input.shape, input.dtype, kernel_size, dilation, needs_weight_grad)
        return next(name for name in _runnable(input.device, input.dtype) if load(name).skip_reason(problem) is None)
    reason = load(backend).unsupported_reason(input.device, input.dtype)
    if reason is not None:
        raise RuntimeError(f'backend {backend!r} cannot run here: {reason}')
    return backend


@functools.cache  # without it, a tenth of a small layer's time
def _runnable(device: torch.device, dtype: torch.dtype) -> Tuple[str, ...]:
    """Return the backends that can run, in order; log once why the others cannot."""
    reasons = {name: load(name).unsupported_reason(device, dtype) for name in AUTO_ORDER}
    for name, reason in reasons.items():
        if reason is not None:
            _logger.debug('backend %r is skipped for %s on %s: %s', name, dtype, device, reason)
    return tuple(name for name, reason in reasons.items() if reason is None)


def run(backend: str, selected: str, step: str, *args: Any) -> Tensor:
    """Call ``forward`` or ``weight_grad`` of the selected backend; if 'auto' selected one that cannot launch, conv2d's.

    A named backend that cannot launch raises LaunchError.
    """
    try:
        return getattr(load(selected), step)(*args)
    except LaunchError as error:
        if backend != 'auto':
            raise
        _warn_once(f'conv2d is used instead: {error}')
        return getattr(load(AUTO_ORDER[-1]), step)(*args)


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


# --- a dilated convolution as plain ones: every dh-th row and dw-th column becomes an image ---


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
