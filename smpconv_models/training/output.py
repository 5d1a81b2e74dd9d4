"""Files that are whole at every instant: checkpoints, tables, pictures."""
import csv
import errno
import glob
import io
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterator, List, Optional, Sequence

import torch
import yaml
from torch import Tensor

from smpconv_models import checkpoint

# Of a full disk, a quota, a limit on a file's size.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``, which takes its name at the end of the block, on the disk by then.

    Args:
        path: What to replace; a link is replaced, not what it points to.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are the owner's alone
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_temporaries(paths: Sequence[Path]) -> None:
    """Removes what a killed process was writing for these files."""
    for path in paths:
        for temporary in path.parent.glob(f'.{glob.escape(path.name)}.*'):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name == 'nt':  # a folder can't be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
        with replacing(path) as temporary:
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
    with replacing(previous) as temporary:
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


def save_rows(path: Path, rows: Sequence[Dict[str, Any]]) -> None:
    """Write a CSV file with one header; a column that a row lacks is empty there.

    Bytes of names that are not UTF-8 are written as ``\\udcXX``, as Python and ``save_json`` escape them.
    """
    text = io.StringIO()
    names: List[str] = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as temporary:
        temporary.write_bytes(text.getvalue().encode(errors='backslashreplace'))  # names that are not UTF-8


def save_json(path: Path, value: Any) -> None:
    """Writes JSON for people and programs."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + '\n')


def save_arguments(path: Path, arguments: Dict[str, Any]) -> None:
    """Writes the arguments as YAML, as ``--config`` reads them."""
    with replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(arguments, sort_keys=True))
