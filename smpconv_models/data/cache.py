"""What is computed of a data set once, and kept in a file."""
import hashlib
import logging
import os
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, Optional

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smpconv_models.utils.errors import first_line

from ..utils.download import locked

_logger = logging.getLogger(__name__)

Tensors = Dict[str, Tensor]


def cached(path: Path, key: str, make: Callable[[], Tensors]) -> Tensors:
    """Reads tensors from a file, or makes them and writes it. One process makes them, the others wait.

    A file that is damaged, or of another key, is made anew, and the log tells. Where nothing can be written, the
    tensors are made each time.

    Args:
        path: The file, safetensors.
        key: What the tensors depend on, as a line.
        make: Makes them; on the CPU, contiguous.
    """
    found = _read(path, key, logging.DEBUG)
    if found is not None:
        return found
    with _locked_if_possible(path):
        found = _read(path, key, logging.WARNING)  # another process may have made them
        if found is None:
            found = make()
            _write(path, key, found)
    return found


@contextmanager
def _locked_if_possible(path: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path.parent, path.name))
        except ValueError as error:  # each process makes them then, and says so when it can't write them
            _logger.debug('%s', error)
        yield


def _read(path: Path, key: str, level: int) -> Optional[Tensors]:
    if not path.exists():
        return None
    try:
        with safe_open(path, 'pt') as file:
            told = file.metadata() or {}
            if told.get('key') != key:
                _logger.log(level, '%s is of other files or of another version; it is made anew', path)
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (OSError, SafetensorError) as error:
        _logger.log(level, '%s cannot be read (%s); it is made anew', path, first_line(error))
        return None
    if told.get('sha256') != _digest(tensors):
        _logger.log(level, '%s is damaged: its checksum differs; it is made anew', path)
        return None
    return tensors


def _write(path: Path, key: str, tensors: Tensors) -> None:
    partial = path.with_name(f'{path.name}.partial')
    try:
        # save_file's files are the owner's alone
        partial.write_bytes(save(tensors, {'key': key, 'sha256': _digest(tensors)}))
        os.replace(partial, path)
    except OSError as error:
        _logger.warning('%s cannot be kept, and will be made each time: %s', path, error.strerror or first_line(error))
        partial.unlink(missing_ok=True)


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.reshape(-1).numpy().view('uint8').data)
    return digest.hexdigest()
