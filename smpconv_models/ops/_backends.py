"""The backends by name, and the order in which ``auto`` asks them.

A backend is a module of this package, imported at its first use, with ``forward``, ``weight_grad`` and two checks that
return None or a reason: ``unsupported_reason(device, dtype)`` if it cannot run, and ``skip_reason(call)``, which only
``auto`` asks, if plain ``conv2d`` is faster.
"""
import functools
import importlib
import logging
from types import ModuleType
from typing import Any, Sequence, Tuple

import torch
from torch import Tensor

from ._problem import Call

_logger = logging.getLogger(__name__)


class LaunchError(RuntimeError):
    """A device lacks what a backend's kernel takes, such as shared memory."""


# Fastest first; the last one runs everywhere.
AUTO_ORDER: Tuple[str, ...] = ('cpu', 'triton', 'reference')


def load(name: str) -> ModuleType:
    """Imports the backend ``name``."""
    return importlib.import_module(f'{__package__}._{name}')


def check_name(name: str) -> None:
    """Raises ValueError unless ``name`` is a backend or 'auto'."""
    if name != 'auto' and name not in AUTO_ORDER:
        raise ValueError(f"backend must be 'auto' or one of {AUTO_ORDER}, got {name!r}")


def select(
        name: str,
        input: Tensor,
        kernel_size: Sequence[int],
        dilation: Sequence[int],
        needs_weight_grad: bool = True,
) -> ModuleType:
    """The backend to run on ``input``: the one named, or for 'auto' the first that can and is not slower.

    Within the operator the weight counts as trained: where it isn't, the operator was skipped, or nothing is lost.

    Raises:
        RuntimeError: The backend was named and can't run there; a named backend never falls back.
    """
    if name != 'auto':
        backend = load(name)
        reason = backend.unsupported_reason(input.device, input.dtype)
        if reason is not None:
            raise RuntimeError(f'backend {name!r} cannot run here: {reason}')
        return backend
    call = Call(input.shape, input.dtype, kernel_size, dilation, needs_weight_grad)
    return next(backend for backend in _runnable(input.device, input.dtype) if backend.skip_reason(call) is None)


@functools.cache  # asked at every call, it would be a tenth of a small layer
def _runnable(device: torch.device, dtype: torch.dtype) -> Tuple[ModuleType, ...]:
    """The backends that can run, in order. Says once why others can't."""
    found = []
    for name in AUTO_ORDER:
        backend = load(name)
        reason = backend.unsupported_reason(device, dtype)
        if reason is None:
            found.append(backend)
        else:
            _logger.debug('backend %r passed over for %s on %s: %s', name, dtype, device, reason)
    return tuple(found)


def run(name: str, backend: ModuleType, step: str, *args: Any) -> Tensor:
    """Calls ``forward`` or ``weight_grad`` of a backend; if 'auto' chose one that cannot launch, of plain ``conv2d``.

    Raises:
        LaunchError: The backend was named.
    """
    try:
        return getattr(backend, step)(*args)
    except LaunchError as error:
        if name != 'auto':
            raise
        _warn_once(f'conv2d is used instead: {error}')
        return getattr(load(AUTO_ORDER[-1]), step)(*args)


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


def available(device: torch.device) -> Tuple[str, ...]:
    """Names of the backends that can run on ``device``, fastest first."""
    return tuple(name for name in AUTO_ORDER if load(name).unsupported_reason(device) is None)
