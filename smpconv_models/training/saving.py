"""Checkpoints and arguments of a run, written atomically."""
import errno
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO, Dict, Optional

import torch
import yaml
from torch import Tensor

from smpconv_models import checkpoint

from ..utils.atomic_io import atomic_write

# Of a full disk, a quota, a limit on a file's size.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save_checkpoint(path: Path, state: Dict[str, Any], previous: Optional[Path] = None) -> None:
    """Writes a checkpoint and reads it back before it takes its name.

    Args:
        path: Where to.
        state: Tensors and plain data, so that it loads with ``weights_only=True``.
        previous: Where the file that is replaced goes on to be.

    Raises:
        FloatingPointError: A weight isn't finite.
        OSError: There is no space, or the folder can't be written to.
        ValueError: What was read back is damaged.
    """
    _check_finite(state)
    try:
        with atomic_write(path) as temporary:
            with open(temporary, 'wb') as file:
                _write(state, file)
                file.flush()
                os.fsync(file.fileno())
            checkpoint.check_file(temporary)
            if previous is not None and path.exists():
                _keep(path, previous)
    except OSError as error:
        raise _explained(error, path, state) from error


def _write(state: Dict[str, Any], file: BinaryIO) -> None:
    """torch's writer hides the system's errors in one of its own; this raises the system's."""
    sink: Any = _Sink(file)
    try:
        torch.save(state, sink)
    except RuntimeError as error:
        if sink.error is None:
            raise
        raise sink.error from error


class _Sink:
    """A file that remembers why it couldn't be written to."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: Optional[OSError] = None

    def write(self, content: Any) -> int:
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _check_finite(state: Dict[str, Any]) -> None:
    for key in ('state_dict', 'state_dict_ema'):
        for name, value in state.get(key, {}).items():
            if value.is_floating_point() and not value.isfinite().all():
                raise FloatingPointError(
                    f'{name} of the {key} is not finite, so it is not saved; a lower --lr may help')


def _keep(path: Path, previous: Path) -> None:
    """A second name for the file where the file system has hard links, else a copy."""
    with atomic_write(previous) as temporary:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copy(path, temporary)
    temporary.unlink(missing_ok=True)  # taking its name does nothing where both are one file already


def _explained(error: OSError, path: Path, state: Dict[str, Any]) -> OSError:
    if error.errno not in _NO_SPACE:
        return OSError(f'{path} cannot be written: {error}')
    needed, free = _size(state), shutil.disk_usage(path.parent).free
    less = '' if error.errno == errno.ENOSPC else ', a quota or limit (ulimit -f) has less'
    return OSError(
        f'no space: a checkpoint needs {_mib(needed)}, the disk has {_mib(free)}{less}, at {path} ({error.strerror})')


def _size(value: Any) -> int:
    """Bytes of the tensors in nested containers, and of their places in the file."""
    if isinstance(value, Tensor):
        return value.nbytes + 400
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_size, value)) if isinstance(value, (list, tuple)) else 0


def _mib(size: int) -> str:
    return f'{size / 2 ** 20:.1f} MiB'


def save_arguments(path: Path, arguments: Dict[str, Any]) -> None:
    """Writes the arguments as YAML, as ``--config`` reads them."""
    with atomic_write(path) as temporary:
        temporary.write_text(yaml.safe_dump(arguments, sort_keys=True))
