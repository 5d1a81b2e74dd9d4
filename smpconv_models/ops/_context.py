"""Queries about the context of a call: FLOP counters, ``torch.export``, autocast.

Some counters know PyTorch's convolutions only, not this package's operator or an FFT: they replace functions of
``torch.nn.functional`` (calflops, DeepSpeed) or watch the dispatcher (ptflops' aten backend). Counters that go by the
type of modules are served in ``layers/counted.py``.
"""
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

_CONV1D, _CONV2D = torch.conv1d, torch.conv2d  # F has the same objects unless somebody replaced them


def is_counted(knows_operator: bool = False) -> bool:
    """Return whether convolutions with backend 'auto' must be plain ``F.conv2d`` or ``F.conv1d`` now, to be counted.

    PyTorch's own dispatch modes (checkpointing, fake tensors, export) see what is computed. Modes of other libraries
    know the names of PyTorch's convolutions. Measured on 2 cores, x86-64: 0.7 microseconds if nobody counts.

    Args:
        knows_operator: Whether the computation is an operator with a formula for PyTorch's ``FlopCounterMode``.
    """
    if torch.compiler.is_compiling():
        return False
    if F.conv2d is not _CONV2D or F.conv1d is not _CONV1D:
        return True
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack  # private: nobody else depends on it
    return any(
        _is_counter(type(mode).__module__, knows_operator) for mode in _get_current_dispatch_mode_stack())


def is_exporting() -> bool:
    """Return whether ``torch.export`` is tracing, also while its strict mode runs Dynamo.

    Dynamo of PyTorch 2.10 takes ``torch.compiler.is_exporting()`` for true under ``torch.compile`` as well.
    """
    return torch.compiler._is_exporting_flag


def has_autocast(device_type: str) -> bool:
    """Return whether PyTorch knows autocast on a device; ``meta`` is one without."""
    if torch.compiler.is_compiling():  # whose tracer cannot ask in PyTorch 2.10
        return device_type != 'meta'
    return torch.amp.is_autocast_available(device_type)


def _is_counter(module: str, knows_operator: bool) -> bool:
    if module == FlopCounterMode.__module__:
        return not knows_operator
    return not module.startswith('torch.')
