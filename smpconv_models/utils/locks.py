"""Locks between processes."""
import logging
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from filelock import FileLock, Timeout

from .errors import first_line

_logger = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, name: str = 'download') -> Iterator[None]:
    """Makes a folder and, for the block, keeps other processes from what goes by this name in it. Not to be nested.

    Raises:
        ValueError: It can't be made or written.
    """
    lock = FileLock(folder / f'.{name}.lock')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            _logger.warning('another process is at work in %s (%s); waiting for it', folder, name)
            lock.acquire()
    except OSError as error:
        raise ValueError(f'{folder} cannot be written: {error.strerror or first_line(error)}') from error
    try:
        yield
    finally:
        lock.release()
