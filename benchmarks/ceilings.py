"""Ceilings of a GPU as it is now: rates of a large copy and of a large matrix product, and its clock."""
import shutil
import subprocess
from typing import Dict, Optional, Union

import measure
import torch
from floors import Ceilings

_COPIED, _SIDE = 2 ** 30, 8192  # bytes, far above any L2; rows and columns of the matrices
_TINY_COPIED, _TINY_SIDE = 2 ** 16, 64


def measured(device: torch.device, is_dry: bool = False) -> Ceilings:
    """Measure the ceilings. On a GPU, this also raises the clocks from idle before anything else is timed.

    The matrices are random: products of zeros are faster than those of data.
    """
    copied, side = (_TINY_COPIED, _TINY_SIDE) if is_dry else (_COPIED, _SIDE)
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = measure.interleaved(
        {'copy': lambda: target.copy_(source), 'product': lambda: a @ b}, rounds=3 if is_dry else 31, device=device)
    return Ceilings(2 * copied / seconds['copy'], 2 * side ** 3 / seconds['product'])


def clock(device: torch.device) -> Dict[str, Optional[Union[int, str]]]:
    """Return the clock, temperature and power of a GPU as nvidia-smi reports them, empty without its answer.

    Nothing is set: the GPU is measured as it is found. It is named by its UUID, because nvidia-smi's numbers ignore
    CUDA_VISIBLE_DEVICES.
    """
    tool = shutil.which('nvidia-smi')
    if device.type != 'cuda' or tool is None:
        return {}
    names = ('clocks.sm', 'clocks.mem', 'temperature.gpu', 'power.draw')
    uuid = torch.cuda.get_device_properties(device).uuid
    command = [tool, f'--id=GPU-{uuid}', f'--query-gpu={",".join(names)}', '--format=csv,noheader']
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, (value.strip() for value in answer.stdout.split(','))))
