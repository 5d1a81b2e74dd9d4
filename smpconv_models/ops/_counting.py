"""Detection of FLOP counters that know PyTorch's convolutions only, not this package's operator or an FFT.

They replace functions of ``torch.nn.functional`` (calflops, DeepSpeed) or watch the dispatcher (ptflops' aten backend).
Counters that go by the type of modules are served in ``layers/counted.py``.
"""
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

_CONV1D, _CONV2D = torch.conv1d, torch.conv2d  # F has the same objects unless somebody replaced them


def is_counted(knows_operator: bool = False) -> bool:
    """Return whether convolutions must be plain ``F.conv2d`` or ``F.conv1d`` now, to be counted.

    PyTorch's own dispatch modes (checkpointing, fake tensors, export) see what is computed. Modes of other libraries
    know the names of PyTorch's convolutions. Measured on 2 cores, x86-64: 0.7 microseconds if nobody counts.

    Args:
        knows_operator: Whether the computation is an operator with a formula for PyTorch's ``FlopCounterMode``.
    """
    if torch.compiler.is_compiling():
        return False
    if F.conv2d is not _CONV2D or F.conv1d is not _CONV1D:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        _is_counter(type(mode).__module__, knows_operator) for mode in _get_current_dispatch_mode_stack())


def _is_counter(module: str, knows_operator: bool) -> bool:
    if module == FlopCounterMode.__module__:
        return not knows_operator
    return not module.startswith('torch.')
