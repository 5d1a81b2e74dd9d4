"""The backends by name, which one computes a problem, and what they share.

A backend is a module of this package, imported at its first use, with two steps and two checks:

- ``forward(input, weight, bias, axes)`` returns the output of an input ``(N, C, H, W)``, in any layout.
- ``backward(grad, input, weight, axes, wanted)`` returns the gradients of input and weight, of their shapes and in any
  layout; None for one that is not ``wanted``. Both steps may raise :class:`LaunchError`.
- ``unsupported_reason(device, dtype)`` returns why the backend cannot run, or None.
- ``skip_reason(problem)``, which only ``auto`` asks, returns why plain ``conv2d`` is faster, or None.
"""
import functools
import importlib
import logging
from types import ModuleType
from typing import Any, Dict, Optional, Set, Tuple

import torch
from torch import Tensor

from ._problem import Axes, ConvProblem

_logger = logging.getLogger(__name__)

# Fastest first; the last one runs everywhere.
AUTO_ORDER: Tuple[str, ...] = ('cpu', 'triton', 'reference')


class LaunchError(RuntimeError):
    """A backend's kernel cannot be built or launched.

    Args:
        message: One line for users.
        needed: Amount of the resource that the kernel takes, such as bytes of shared memory, if the device has less.
        available: Amount of that resource that the device has.
        is_permanent: Whether the same launch would fail again.
    """

    def __init__(
            self, message: str, needed: Optional[int] = None, available: Optional[int] = None,
            is_permanent: bool = True) -> None:
        super().__init__(message)
        self.needed, self.available, self.is_permanent = needed, available, is_permanent


@functools.cache
def load(name: str) -> ModuleType:
    """Import the backend ``name``."""
    return importlib.import_module(f'{__package__}._{name}')


def select(backend: str, input: Tensor, axes: Axes, needs_weight_grad: bool = True) -> str:
    """Return the name of the backend for ``input``: the given one, or for 'auto' the first that can and is not slower.

    A named backend never falls back: raise RuntimeError if it cannot run there.
    """
    if backend == 'auto':
        problem = ConvProblem(input.shape[0], input.shape[1], axes, input.dtype, needs_weight_grad)
        return next(name for name in _runnable(input.device, input.dtype) if load(name).skip_reason(problem) is None)
    reason = load(backend).unsupported_reason(input.device, input.dtype)
    if reason is not None:
        raise RuntimeError(f'backend {backend!r} cannot run here: {reason}')
    return backend


_known_runnable: Dict[Tuple[torch.device, torch.dtype], Tuple[str, ...]] = {}  # a tenth of a small layer's time


def _runnable(device: torch.device, dtype: torch.dtype) -> Tuple[str, ...]:
    """Return the backends that can run, in order; log once why the others cannot."""
    known = _known_runnable.get((device, dtype))
    if known is not None:
        return known
    names = _ask_runnable(device, dtype)
    if not is_capturing():      # a backend that cannot be tried during the capture may turn out not to run
        _known_runnable[device, dtype] = names
    return names


def _ask_runnable(device: torch.device, dtype: torch.dtype) -> Tuple[str, ...]:
    reasons = {name: load(name).unsupported_reason(device, dtype) for name in AUTO_ORDER}
    for name, reason in reasons.items():
        if reason is not None:
            _logger.debug('backend %r is skipped for %s on %s: %s', name, dtype, device, reason)
    return tuple(name for name, reason in reasons.items() if reason is None)


_failed: Set[Tuple[Any, ...]] = set()


def run(backend: str, selected: str, step: str, *args: Any) -> Any:
    """Call a step, ``forward`` or ``backward``, of the selected backend.

    If 'auto' selected it and it cannot launch, call conv2d's step, also for the same problem in the future unless the
    reason may pass. A named backend that cannot launch raises LaunchError.
    """
    if not (backend == 'auto' and _failed and _problem(selected, step, args) in _failed):
        try:
            return getattr(load(selected), step)(*args)
        except LaunchError as error:
            if backend != 'auto':
                raise
            _warn_once(f'conv2d is used instead: {error}')
            is_permanent = error.is_permanent
        if is_permanent and not is_capturing():
            _failed.add(_problem(selected, step, args))
    return getattr(load(AUTO_ORDER[-1]), step)(*args)


def _problem(selected: str, step: str, args: Tuple[Any, ...]) -> Tuple[Any, ...]:
    """Return what a launch depends on: the shapes of all tensors and all options."""
    return (selected, step, *(
        (arg.shape, arg.dtype, arg.device) if isinstance(arg, Tensor) else None if arg is None else tuple(arg)
        for arg in args))


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


def is_capturing() -> bool:
    """Return whether a CUDA graph is being captured, during which some calls fail that work otherwise."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
