"""Tensors that are computed from a data set once and kept in a file."""
import hashlib
import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, Dict, Optional

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smpconv_models.utils.download import locked
from smpconv_models.utils.errors import first_line

_logger = logging.getLogger(__name__)

Tensors = Dict[str, Tensor]


def cached_tensors(path: Path, key: str, compute: Callable[[], Tensors]) -> Tensors:
    """Load tensors from a file, or compute the tensors and write the file.

    One process computes the tensors, and the others wait. A file that is damaged or has another key is computed again
    and replaced, with a warning. If the file cannot be written, the tensors are computed on each use. ``path`` is a
    safetensors file, ``key`` a line that stands for everything on which the tensors depend, and ``compute`` a function
    that returns contiguous tensors on the CPU.
    """
    found = _read(path, key, logging.DEBUG)
    if found is not None:
        return found
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path.parent, path.name))
        except ValueError as error:  # then every process computes the tensors, and warns if it cannot write the file
            _logger.debug('%s', error)
        found = _read(path, key, logging.WARNING)  # another process may have written the file
        if found is None:
            found = compute()
            _write(path, key, found)
    return found


def _read(path: Path, key: str, level: int) -> Optional[Tensors]:
    """Return the tensors of an intact file; otherwise log the reason at ``level`` and return None."""
    if not path.exists():
        return None
    try:
        with safe_open(path, 'pt') as file:
            metadata = file.metadata() or {}
            # safe_open is not a dict
            tensors = {name: file.get_tensor(name) for name in file.keys() if metadata.get('key') == key}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        problem = f'cannot be read ({first_line(error)})'
    else:
        if metadata.get('key') != key:
            problem = 'was computed from other files or by another version'
        elif metadata.get('sha256') != _digest(tensors):
            problem = 'is damaged: its checksum differs'
        else:
            return tensors
    _logger.log(level, '%s %s; recomputing it', path, problem)
    return None


def _write(path: Path, key: str, tensors: Tensors) -> None:
    partial = path.with_name(f'{path.name}.partial')
    try:
        # safetensors' save_file would make the file readable by its owner alone
        partial.write_bytes(save(tensors, {'key': key, 'sha256': _digest(tensors)}))
        os.replace(partial, path)
    except OSError as error:
        _logger.warning(
            '%s cannot be written, and is recomputed on each use: %s', path, error.strerror or first_line(error))
        partial.unlink(missing_ok=True)


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.reshape(-1).numpy().view('uint8').data)
    return digest.hexdigest()
