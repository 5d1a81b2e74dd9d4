"""Downloads over HTTP that resume, checksums, and archives extracted as a whole."""
import hashlib
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Optional, Union

from tqdm import tqdm

from .errors import first_line, unreadable_file

_TIMEOUT = 30.  # seconds without a byte
_BLOCK = 1 << 18


class DownloadNeededError(ValueError):
    """Missing or damaged data that a download would replace.

    Args:
        problem: Beginning of the message, up to the advice to download.
        alternative: End of the message.
    """

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


def fetch(url: str, path: Path, sha256: str) -> None:
    """Downloads a file, from where an earlier attempt broke off; it has its name when it is whole.

    Until then it is under this name with ``.part`` after it. Under :func:`locked`.

    Raises:
        ValueError: The network, the server or the disk doesn't do, or it is another file.
    """
    part = path.with_name(f'{path.name}.part')
    try:
        answer = open_resumable(url, part)
        if answer is not None:
            with answer:
                if answer.headers.get('Content-Type', '').startswith('text/html'):  # of a login, say
                    raise ValueError('the server sends a page in place of the file')
                append(answer, part)
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
        raise DownloadNeededError(
            f'{path} is damaged, or another file: its SHA-256 is {found}, not {sha256}; remove it and')


def file_sha256(path: Union[str, Path]) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
        ValueError: The file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, 'rb') as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise unreadable_file(path, error) from error
    return digest.hexdigest()


def _done(part: Path) -> int:
    """Bytes that are there of a file."""
    return part.stat().st_size if part.exists() else 0


def open_resumable(url: str, part: Path) -> Optional[HTTPResponse]:
    """What a server has behind what is there of a file, or the whole where it can't; None where nothing is left.

    Raises:
        OSError: The network or the server doesn't do, or the file has become shorter.
    """
    start = _done(part)
    request = urllib.request.Request(url)
    if start:
        request.add_header('Range', f'bytes={start}-')
    try:
        return urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left of it
            if error.headers.get('Content-Range') == f'bytes */{start}':
                return None
            raise OSError(f'the file has changed: remove what was downloaded ({start} bytes)') from error
        raise


def append(answer: HTTPResponse, part: Path) -> None:
    """Writes an answer of :func:`open_resumable` behind the bytes that are there, or in their place.

    Raises:
        OSError: The network or the disk doesn't do; what has come is kept.
        http.client.HTTPException: The server doesn't.
    """
    start = _done(part) if answer.status == 206 else 0  # else it sends the whole
    length = answer.headers.get('Content-Length')
    total = None if length is None else start + int(length)
    with open(part, 'ab' if start else 'wb') as file, tqdm(
            desc=part.stem, total=total, initial=start, unit='B', unit_scale=True, disable=None) as bar:
        while block := answer.read(_BLOCK):
            file.write(block)
            bar.update(len(block))
    if total is not None and _done(part) != total:
        raise OSError(f'the connection ended after {_done(part)} of {total} bytes')


def extract_tar(archive: Path, folder: Path) -> None:
    """Unpacks a tar file into a folder, which is there when all of it is.

    Members that would lie elsewhere, links out of the folder, devices are refused (tarfile's filter of data).

    Args:
        archive: The tar file, compressed or not.
        folder: Where to; until it is whole, under this name with ``.partial`` after it.

    Raises:
        ValueError: It is no tar file, damaged, tries to leave the folder, or the disk doesn't do; or Python is one
            without tarfile's filters.
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
