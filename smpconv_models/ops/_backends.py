"""The backends by name, and the order in which ``auto`` asks them.

A backend is a module of this package with ``forward``, ``weight_grad`` and ``why_not``; it is imported when it is
first asked. ``why_not(device)`` is its one check: None when it can run, else the reason, as the end of a sentence.
"""
import importlib
import logging
from types import ModuleType
from typing import Tuple

import torch

_logger = logging.getLogger(__name__)

# Fastest first; the last one runs everywhere.
AUTO_ORDER: Tuple[str, ...] = ('cpu', 'reference')


def load(name: str) -> ModuleType:
    """Imports the backend ``name``."""
    return importlib.import_module(f'{__package__}._{name}')


def check_name(name: str) -> None:
    """Raises ValueError unless ``name`` is a backend or 'auto'."""
    if name != 'auto' and name not in AUTO_ORDER:
        raise ValueError(f"backend must be 'auto' or one of {AUTO_ORDER}, got {name!r}")


def select(name: str, device: torch.device) -> ModuleType:
    """The backend to run on ``device``: the one named, or for 'auto' the first that can.

    Raises:
        RuntimeError: The backend was named and can't run there; a named backend never falls back.
    """
    if name != 'auto':
        backend = load(name)
        reason = backend.why_not(device)
        if reason is not None:
            raise RuntimeError(f'backend {name!r} cannot run here: {reason}')
        return backend
    for candidate in AUTO_ORDER:
        backend = load(candidate)
        reason = backend.why_not(device)
        if reason is None:
            return backend
        _logger.debug('backend %r passed over: %s', candidate, reason)
    raise AssertionError('the reference backend runs everywhere')


def available(device: torch.device) -> Tuple[str, ...]:
    """Names of the backends that can run on ``device``, fastest first."""
    return tuple(name for name in AUTO_ORDER if load(name).why_not(device) is None)
