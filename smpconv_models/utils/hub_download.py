"""Weight files from the Hugging Face Hub, checked against their checksums.

The Hub's client checks the size of a file only, caches it under a name that the server chooses, and lets the HTTP
library's errors through. Here the server's names are checked before they become paths, cached files are checked against
their checksums, and an error is one line that says what to do.
"""
import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any, NoReturn, Optional, Tuple, Union

from huggingface_hub import HfFileMetadata, constants, get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .download import file_sha256
from .errors import first_line

_logger = logging.getLogger(__name__)

# Errors of the client, of the system, and of either HTTP library that the client may use.
HUB_ERRORS: Tuple[Any, ...] = (EntryNotFoundError, OSError, UnicodeEncodeError, *HfHubHTTPError.__bases__)

# HTTP status -> advice.
_ADVICE = {
    401: 'set HF_TOKEN to a valid token', 403: 'the token in HF_TOKEN has no access to it',
    429: 'too many requests: wait a while, or set HF_TOKEN',
}

# The Hub names a large file by its SHA-256, other files as Git does.
_SHA256, _GIT_SHA1 = re.compile('[0-9a-f]{64}'), re.compile('[0-9a-f]{40}')


class RepoNotFoundError(ValueError):
    """A repository that does not exist, or that this user may not see."""


def download_verified(repo: str, filename: str, cache_dir: Union[str, Path, None] = None) -> Path:
    """Download a file by :func:`hf_download` and verify it by :func:`verify_cached_file`."""
    path = hf_download(repo, filename, cache_dir)
    verify_cached_file(path)
    return path


def hf_download(repo: str, filename: str, cache_dir: Union[str, Path, None] = None) -> Path:
    """Download a file of ``OWNER/NAME``, or ``OWNER/NAME@REVISION``, unless the cache has it in the Hub's revision.

    The result is a path in the cache, for :func:`verify_cached_file`.

    Raises:
        RepoNotFoundError: If there is no such repository.
        ValueError: If there is no such revision or file, no access, or no network and nothing in the cache.
    """
    name, _, revision = repo.partition('@')
    revision = revision or 'main'
    options: Any = {'revision': revision, 'cache_dir': cache_dir}
    try:
        if constants.HF_HUB_OFFLINE:
            return Path(hf_hub_download(name, filename, local_files_only=True, **options))
        checksum = _get_checksum(get_hf_file_metadata(hf_hub_url(name, filename, revision=revision), token=get_token()))
        path = Path(hf_hub_download(name, filename, **options))
        if not path.is_symlink():  # a file system without links, on which the cache does not keep the checksum
            found = _digest(path, checksum)
            if found != checksum:
                _remove(path, found, checksum)
        return path
    except HFValidationError as error:
        raise ValueError(f'{name!r} is no repository of the Hub: {first_line(error)}') from error
    except HUB_ERRORS as error:
        message = _error_message(error, name, filename, revision)
        try:
            path = Path(hf_hub_download(name, filename, local_files_only=True, **options))
        except LocalEntryNotFoundError:
            is_unknown = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
            raise (RepoNotFoundError if is_unknown else ValueError)(message) from error
        _logger.warning('%s; the cached file is used', message)
        return path


def _get_checksum(metadata: HfFileMetadata) -> str:
    """Return the checksum by which the server names a file.

    The client builds paths from the names. Names of another form raise OSError, as a server that is no Hub does.
    """
    etag, commit = metadata.etag or '', metadata.commit_hash or ''
    if not (_SHA256.fullmatch(etag) or _GIT_SHA1.fullmatch(etag)) or not _GIT_SHA1.fullmatch(commit):
        raise OSError(f'it does not answer as the Hub does, but names the file {etag[:80]!r} of {commit[:80]!r}')
    return etag


def _error_message(error: BaseException, repo: str, filename: str, revision: str) -> str:
    """Return what failed and what to do, in one line."""
    what = f'{repo}/{filename}' + ('' if revision == 'main' else f' at {revision}')
    if constants.HF_HUB_OFFLINE:
        return f'HF_HUB_OFFLINE is set and {what} is not in the cache: unset it once'
    if isinstance(error, GatedRepoError):
        return f'{repo} asks for an agreement first: see {constants.ENDPOINT}/{repo}, then set HF_TOKEN'
    if isinstance(error, RepositoryNotFoundError):
        return f'{constants.ENDPOINT} has no repository {repo}, or it is private: check the name, or set HF_TOKEN'
    if isinstance(error, RevisionNotFoundError):
        return f'{repo} has no revision {revision}'
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f'{what} does not exist'
    return f'{what} cannot be downloaded from {constants.ENDPOINT} ({error_reason(error)})'


def error_reason(error: BaseException) -> str:
    """Return why the Hub or the connection to it failed, and what to do, in one line."""
    cause = error.__cause__ if isinstance(error, (LocalEntryNotFoundError, RuntimeError)) and error.__cause__ else error
    status = getattr(getattr(cause, 'response', None), 'status_code', None)
    if isinstance(cause, UnicodeEncodeError):  # of the token or of a name, which the client sends
        return 'there are characters other than ASCII in HF_TOKEN or in the name'
    what = f'{type(cause).__name__}: {first_line(cause)}' if status is None else f'status {status}'
    if constants.HF_HUB_OFFLINE or getattr(cause, 'errno', None) is not None:  # of this machine, e.g. a full disk
        return what
    return f'{what}: {_ADVICE.get(status or 0, "see HF_ENDPOINT and HTTPS_PROXY")}'


def cached_file_digest(path: Path) -> str:
    """Return the checksum of a file in the client's cache; '' if the cache keeps no checksum to compare it with.

    The file is a link to its content, which the client names by the checksum that the Hub gave. That may be a link too,
    to content that several repositories share, under a name of another kind.
    """
    if not path.is_symlink():  # a file system without links
        return ''
    return _digest(_blob(path), _blob(path).name)


def verify_cached_file(path: Path, found: Optional[str] = None) -> None:
    """Compare a file's :func:`cached_file_digest` with the checksum that names its content in the client's cache.

    Raises:
        ValueError: If the content has another checksum (it is then removed from the cache), or its name is no checksum.
    """
    found = cached_file_digest(path) if found is None else found
    name = _blob(path).name if found else ''
    if found == name:
        return
    if not (_SHA256.fullmatch(name) or _GIT_SHA1.fullmatch(name)):
        path.unlink()  # the server changed its answer after the check; the link's target may be any file
        raise ValueError(f'{constants.ENDPOINT} does not answer as the Hub does: it led {path} to {name[:80]!r}')
    blob = _blob(path)
    _remove(path, found, name, blob.resolve(), blob)


def _blob(path: Path) -> Path:
    return path.parent / os.readlink(path)


def _digest(path: Path, name: str) -> str:
    """Return the checksum of a file, of the same kind as ``name``: Git's or SHA-256."""
    return git_sha1(path.read_bytes()) if _GIT_SHA1.fullmatch(name) else file_sha256(path)


def _remove(path: Path, found: str, name: str, *contents: Path) -> NoReturn:
    for damaged in (path, *contents):
        damaged.unlink(missing_ok=True)
    raise ValueError(f'{path} is damaged: its checksum is {found}, not {name}; it was removed, to be downloaded again')


def git_sha1(content: bytes) -> str:
    """Return the name that Git gives a content."""
    return hashlib.sha1(b'blob %d\0' % len(content) + content, usedforsecurity=False).hexdigest()
