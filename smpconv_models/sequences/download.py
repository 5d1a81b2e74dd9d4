"""Files from where they are published, checked; one process downloads, the others wait."""
import logging
import os
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Iterator

from filelock import FileLock, Timeout

from smpconv_models import transfer
from smpconv_models.checkpoint import file_sha256, first_line

_logger = logging.getLogger(__name__)


def missing(path: Path, url: str) -> ValueError:
    """The error for a file that isn't there and may not be downloaded."""
    return ValueError(f'{path} is missing: pass download=True, or put {url} there by hand')


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


def fetch(url: str, path: Path, sha256: str) -> None:
    """Downloads a file, from where an earlier attempt broke off; it has its name when it is whole.

    Until then it is under this name with ``.part`` after it. Under :func:`locked`.

    Raises:
        ValueError: The network, the server or the disk doesn't do, or it is another file.
    """
    part = path.with_name(f'{path.name}.part')
    try:
        answer = transfer.open_rest(url, part)
        if answer is not None:
            with answer:
                if answer.headers.get('Content-Type', '').startswith('text/html'):  # of a login, say
                    raise ValueError('the server sends a page in place of the file')
                transfer.append(answer, part)
        if file_sha256(part) != sha256:
            part.unlink()
            raise ValueError('it is another file, by its SHA-256')
        os.replace(part, path)
    except (HTTPException, OSError, ValueError) as error:
        kept = f'; what there is of it is kept in {part}' if part.exists() else ''
        raise ValueError(
            f'{url} cannot be downloaded ({type(error).__name__}: {first_line(error)}){kept}; '
            f'the file can be put at {path} by hand') from error


def check_sha256(path: Path, sha256: str) -> None:
    """Raises ValueError unless a file has this checksum."""
    try:
        found = file_sha256(path)
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror or first_line(error)}') from error
    if found != sha256:
        raise ValueError(
            f'{path} is damaged, or another file: its SHA-256 is {found}, not {sha256}; remove it and pass '
            f'download=True')
