"""Downloads over HTTP that resume, checksums, locks between processes, and archives extracted as a whole."""
import hashlib
import logging
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Callable, Iterator, Optional, Union

from filelock import FileLock, Timeout
from tqdm import tqdm

from .errors import first_line, unreadable_file

_TIMEOUT = 30.  # seconds without a byte
_BLOCK = 1 << 18  # bytes
_MAX_PAGE = 1 << 20  # bytes

_logger = logging.getLogger(__name__)


class WrongFileError(ValueError):
    """A downloaded file is not the expected one."""


class DownloadNeededError(ValueError):
    """Missing or damaged data that a download would replace; the message is the problem, advice and the alternative."""

    def __init__(self, problem: str, alternative: str = '') -> None:
        super().__init__(problem, alternative)
        self.problem, self.alternative = problem, alternative

    def message(self, option: str) -> str:
        """Return the message, with the option that allows the download."""
        return f'{self.problem} pass {option}{self.alternative}'

    def __str__(self) -> str:
        return self.message('download=True')


def missing(path: Path, url: str) -> DownloadNeededError:
    """Return the error for a file that is missing and may not be downloaded."""
    return DownloadNeededError(f'{path} is missing:', f', or put {url} there by hand')


@contextmanager
def locked(folder: Path, name: str = 'download') -> Iterator[None]:
    """Create a folder, and hold the lock of this name in it for the block. Locks of one name cannot be nested.

    A folder that cannot be created or written is a ValueError.
    """
    lock = FileLock(folder / f'.{name}.lock')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            _logger.warning('another process holds the lock %s in %s; waiting for it', name, folder)
            lock.acquire()
    except OSError as error:
        raise ValueError(f'{folder} cannot be written: {error.strerror or first_line(error)}') from error
    try:
        yield
    finally:
        lock.release()


def fetch(url: str, path: Path, sha256: str) -> None:
    """Download a file by :func:`fetch_checked`, and check its SHA-256."""
    def check(part: Path) -> None:
        if file_sha256(part) != sha256:
            raise WrongFileError('the SHA-256 is that of another file')

    fetch_checked(url, path, check)


def _reject_page(page: str) -> str:
    raise ValueError('the server sends a page in place of the file')


def fetch_checked(
        url: str, path: Path, check: Callable[[Path], None], confirm: Callable[[str], str] = _reject_page) -> None:
    """Download a file, or resume its download, while the caller holds the lock of :func:`locked`.

    Until the file is complete and checked, its name ends in ``.part``.

    Args:
        check: Function that raises WrongFileError if the complete file is not the expected one; such a file is removed.
        confirm: Function that returns the address to ask next if the server sent this HTML page in place of the file,
            or raises ValueError.

    Raises:
        ValueError: If the network, the server or the disk fails, or the file is not the expected one.
    """
    part = path.with_name(f'{path.name}.part')
    try:
        address: Optional[str] = url
        while address is not None:
            response = open_resumable(address, part)
            address = None
            if response is not None:
                with response:
                    if response.headers.get('Content-Type', '').startswith('text/html'):
                        address = confirm(response.read(_MAX_PAGE).decode(errors='replace'))
                    else:
                        _append(response, part)
        try:
            check(part)
        except WrongFileError:
            part.unlink()
            raise
        os.replace(part, path)
    except (HTTPException, OSError, ValueError) as error:
        kept = f'; what there is of it is kept in {part}' if part.exists() else ''
        raise ValueError(
            f'{url} cannot be downloaded ({type(error).__name__}: {first_line(error)}){kept}; '
            f'the file can be put at {path} by hand') from error


def open_resumable(url: str, part: Path) -> Optional[HTTPResponse]:
    """Request the bytes that follow a partial file; return None if the partial file is complete.

    A server that cannot resume sends the whole file. Raise OSError if it fails, or if the file has become shorter.
    """
    start = _size(part)
    request = urllib.request.Request(url)
    if start:
        request.add_header('Range', f'bytes={start}-')
    try:
        return urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # no bytes follow
            if error.headers.get('Content-Range') == f'bytes */{start}':
                return None
            raise OSError(f'the file has changed: remove what was downloaded ({start} bytes)') from error
        raise


def _append(response: HTTPResponse, part: Path) -> None:
    """Append a response to the partial file, or replace its content if the server sends the whole file."""
    start = _size(part) if response.status == 206 else 0
    length = response.headers.get('Content-Length')
    total = None if length is None else start + int(length)
    with open(part, 'ab' if start else 'wb') as file, tqdm(
            desc=part.stem, total=total, initial=start, unit='B', unit_scale=True, disable=None) as bar:
        while block := response.read(_BLOCK):
            file.write(block)
            bar.update(len(block))
    if total is not None and _size(part) != total:
        raise OSError(f'the connection ended after {_size(part)} of {total} bytes')


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def check_sha256(path: Path, sha256: str) -> None:
    """Raise DownloadNeededError unless a file has this checksum, or ValueError if the file cannot be read."""
    found = file_sha256(path)
    if found != sha256:
        raise DownloadNeededError(
            f'{path} is damaged, or another file: its SHA-256 is {found}, not {sha256}; remove it and')


def file_sha256(path: Union[str, Path]) -> str:
    """Return the SHA-256 of a file, in hexadecimal; raise ValueError if the file cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, 'rb') as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise unreadable_file(path, error) from error
    return digest.hexdigest()


def extract_tar(archive: Path, folder: Path) -> None:
    """Extract a tar file into a new folder; until all members are extracted, its name ends in ``.partial``.

    tarfile's ``data`` filter rejects members outside the folder, links out of the folder and devices.

    Raises:
        ValueError: If the file is no tar file, is damaged or has a rejected member, the disk fails, or Python is too
            old to have tarfile's filters.
    """
    if not hasattr(tarfile, 'data_filter'):
        raise ValueError(f'{archive} cannot be unpacked safely: expected Python 3.10.12, 3.11.4 or newer')
    partial = folder.with_name(f'{folder.name}.partial')
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        with tarfile.open(archive) as tar:
            for member in tqdm(tar, desc=f'unpacking {archive.name}', unit=' files', disable=None):
                tar.extract(member, partial, filter='data')
        os.rename(partial, folder)
    except (EOFError, OSError, tarfile.TarError, zlib.error) as error:
        raise ValueError(
            f'{archive} cannot be unpacked to {folder}: {type(error).__name__} {first_line(error)}') from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
