"""A file over HTTP, from where an earlier attempt broke off."""
import urllib.error
import urllib.request
from http.client import HTTPResponse
from pathlib import Path
from typing import Optional

from tqdm import tqdm

_TIMEOUT = 30.  # seconds without a byte
_BLOCK = 1 << 18


def _done(part: Path) -> int:
    """Bytes that are there of a file."""
    return part.stat().st_size if part.exists() else 0


def open_rest(url: str, part: Path) -> Optional[HTTPResponse]:
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
    """Writes an answer of :func:`open_rest` behind the bytes that are there, or in their place.

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
