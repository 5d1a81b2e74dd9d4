"""Limits: the resources that a device has for a program."""
import functools
from typing import NamedTuple, Optional

import torch


class Limits(NamedTuple):
    """Resources of a program: bytes of shared memory, registers of 32 bits, and columns of tensor memory if any.

    ``reads_shared``: whether products read their operands from shared memory (wgmma, tcgen05) while the next ones
    arrive. Their loops have one more buffer than those of mma.sync, which reads registers.
    """
    shared_memory: int
    registers: int = 65536
    tensor_memory: Optional[int] = None
    reads_shared: bool = False


# By compute capability, for builds without the device.
_LIMITS = {
    80: Limits(166912), 86: Limits(101376), 87: Limits(166912), 89: Limits(101376),
    90: Limits(232448, reads_shared=True), 100: Limits(232448, tensor_memory=512, reads_shared=True),
    103: Limits(232448, tensor_memory=512, reads_shared=True), 120: Limits(101376), 121: Limits(101376),
}
_LEAST_LIMITS = Limits(101376, tensor_memory=512, reads_shared=True)


def _capability(device: torch.device) -> Optional[int]:
    if device.type != 'cuda' or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _limits(device: torch.device, capability: Optional[int]) -> Limits:
    """Return what a program may take on a device, or on any of a compute capability."""
    known = _LIMITS.get(capability, _LEAST_LIMITS) if capability is not None else _LEAST_LIMITS
    if device.type != 'cuda':
        return known
    properties = torch.cuda.get_device_properties(device)
    # ROCm reports the second only
    return known._replace(
        shared_memory=getattr(properties, 'shared_memory_per_block_optin', properties.shared_memory_per_block))
