"""Files from where they are published, checked; one process downloads, the others wait."""
import glob
import sys
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Iterator

from filelock import FileLock
from torch.hub import download_url_to_file

from smpconv_models.checkpoint import file_sha256, first_line


def missing(path: Path, url: str) -> ValueError:
    """The error for a file that isn't there and may not be downloaded."""
    return ValueError(f'{path} is missing: pass download=True, or put {url} there by hand')


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps other processes from it for the block. Not to be nested.

    Raises:
        ValueError: It can't be made or written.
    """
    lock = FileLock(folder / '.download.lock')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise ValueError(f'{folder} cannot be written: {error.strerror or first_line(error)}') from error
    try:
        yield
    finally:
        lock.release()


def fetch(url: str, path: Path, sha256: str) -> None:
    """Downloads a file; it has its name when it is whole. Under :func:`locked`.

    Raises:
        ValueError: The network, the server or the disk doesn't do, or it is another file.
    """
    try:
        for partial in path.parent.glob(f'{glob.escape(path.name)}.*.partial'):
            partial.unlink()  # PyTorch's, of a process that was killed
        download_url_to_file(url, str(path), hash_prefix=sha256, progress=sys.stderr.isatty())
    except (HTTPException, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f'{url} cannot be downloaded ({type(error).__name__}: {first_line(error)}); '
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
