"""What a run leaves behind: checkpoints, a table of epochs, the arguments."""
import csv
import os
import tempfile
from pathlib import Path
from typing import Any, Dict, Union

import torch
import yaml


def save_checkpoint(path: Union[str, Path], state: Dict[str, Any]) -> None:
    """Writes a checkpoint so that a file of this name is whole at every instant.

    Args:
        path: Where to.
        state: Tensors and plain data, so that it loads with ``weights_only=True``.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        with os.fdopen(handle, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are the owner's alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def append_row(path: Union[str, Path], row: Dict[str, Any]) -> None:
    """Adds a row to a CSV file, after a header if it is the first."""
    is_first = not os.path.exists(path)
    with open(path, 'a', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if is_first:
            writer.writeheader()
        writer.writerow(row)


def save_arguments(path: Union[str, Path], arguments: Dict[str, Any]) -> None:
    """Writes the arguments as YAML, as ``--config`` reads them."""
    with open(path, 'w') as file:
        yaml.safe_dump(arguments, file, sort_keys=True)
