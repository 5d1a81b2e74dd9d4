"""Weight files from the Hugging Face Hub, checked against their checksums.

The Hub's client checks a file's size alone, takes the name under which it caches a file from the server, and lets the
HTTP library's errors through. Here a server's names are looked at first, what is cached is held against its checksum,
and what fails is one line that says what to do.
"""
import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any, NoReturn, Optional, Tuple, Union

from huggingface_hub import (
    HfFileMetadata,
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
)
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

# The client's, the system's, and the HTTP library's, of which the client's are made, whichever it is.
HUB_ERRORS: Tuple[Any, ...] = (EntryNotFoundError, OSError, UnicodeEncodeError, *HfHubHTTPError.__bases__)

# By status.
_ADVICE = {
    401: 'set HF_TOKEN to a valid token', 403: 'the token in HF_TOKEN has no access to it',
    429: 'too many requests: wait a while, or set HF_TOKEN',
}

# The Hub names a file by its SHA-256 if it is large, else as Git does.
_SHA256, _GIT_SHA1 = re.compile('[0-9a-f]{64}'), re.compile('[0-9a-f]{40}')


class RepoNotFoundError(ValueError):
    """There is no repository of this name, or none that this user may know of."""


def from_hub(repo: str, filename: str, cache_dir: Union[str, Path, None] = None) -> Path:
    """:func:`fetch` and :func:`check`."""
    path = fetch(repo, filename, cache_dir)
    check(path)
    return path


def fetch(repo: str, filename: str, cache_dir: Union[str, Path, None] = None) -> Path:
    """A file of a model repository, from the cache if it is there in the revision that the Hub has.

    Args:
        repo: ``OWNER/NAME``, or ``OWNER/NAME@REVISION`` for a branch, a tag or a commit.
        filename: In the repository.
        cache_dir: The Hub client's, by default its own.

    Returns:
        Its path in the cache, for :func:`check`.

    Raises:
        RepoNotFoundError: No such repository.
        ValueError: No such revision or file, no access, or no network and nothing cached.
    """
    name, _, revision = repo.partition('@')
    try:
        return _fetch(name, filename, revision or 'main', cache_dir)
    except HFValidationError as error:
        raise ValueError(f'{name!r} is no repository of the Hub: {first_line(error)}') from error


def _fetch(repo: str, filename: str, revision: str, cache_dir: Union[str, Path, None]) -> Path:
    options: Any = {'revision': revision, 'cache_dir': cache_dir}
    try:
        if constants.HF_HUB_OFFLINE:
            return Path(hf_hub_download(repo, filename, local_files_only=True, **options))
        name = _check_names(get_hf_file_metadata(hf_hub_url(repo, filename, revision=revision), token=get_token()))
        path = Path(hf_hub_download(repo, filename, **options))
        if not path.is_symlink():  # a file system without links, where the cache forgets the name
            _check_content(path, name)
        return path
    except HUB_ERRORS as error:
        line = _explained(error, repo, filename, revision)
        try:
            path = Path(hf_hub_download(repo, filename, local_files_only=True, **options))
        except LocalEntryNotFoundError:
            is_unknown = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
            raise (RepoNotFoundError if is_unknown else ValueError)(line) from error
        _logger.warning('%s; the cached file is used', line)
        return path


def _explained(error: BaseException, repo: str, filename: str, revision: str) -> str:
    """What happened and what to do, in a line."""
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
    return f'{what} cannot be downloaded from {constants.ENDPOINT} ({reason(error)})'


def reason(error: BaseException) -> str:
    """Why the Hub or the way to it failed, in a line that says what to do."""
    cause = error.__cause__ if isinstance(error, (LocalEntryNotFoundError, RuntimeError)) and error.__cause__ else error
    status = getattr(getattr(cause, 'response', None), 'status_code', None)
    if isinstance(cause, UnicodeEncodeError):  # what it sends is a token, or a name
        return 'there are characters other than ASCII in HF_TOKEN or in the name'
    what = f'{type(cause).__name__}: {first_line(cause)}' if status is None else f'status {status}'
    if constants.HF_HUB_OFFLINE or getattr(cause, 'errno', None) is not None:  # this machine's: a full disk, say
        return what
    return f'{what}: {_ADVICE.get(status or 0, "see HF_ENDPOINT and HTTPS_PROXY")}'


def _check_names(metadata: HfFileMetadata) -> str:
    """The content's name. The client makes paths of them; OSError, as where there is no Hub, of others."""
    etag, commit = metadata.etag or '', metadata.commit_hash or ''
    if not (_SHA256.fullmatch(etag) or _GIT_SHA1.fullmatch(etag)) or not _GIT_SHA1.fullmatch(commit):
        raise OSError(f'it does not answer as the Hub does, but names the file {etag[:80]!r} of {commit[:80]!r}')
    return etag


def _check_content(path: Path, name: str) -> None:
    found = _digest(path, name)
    if found != name:
        _remove(path, found, name)


def digest(path: Path) -> str:
    """The name that the content of a file of the client's cache should have; '' where the client keeps no names.

    The client leads a file's name to its content, which it keeps under the checksum that the Hub gave it. From there it
    may lead on, to where it keeps the content for several repositories, under a name of another kind.
    """
    if not path.is_symlink():  # a file system without links
        return ''
    return _digest(_blob(path), _blob(path).name)


def _digest(path: Path, name: str) -> str:
    """The checksum of a file, of the kind that ``name`` is: Git's or SHA-256."""
    return git_sha1(path.read_bytes()) if _GIT_SHA1.fullmatch(name) else file_sha256(path)


def check(path: Path, found: Optional[str] = None) -> None:
    """Holds a file of the client's cache against the name of its content.

    Args:
        path: The file.
        found: Its :func:`digest`, where that is known already.

    Raises:
        ValueError: The content is another one (what is cached of it is removed), or the name is no checksum.
    """
    found = digest(path) if found is None else found
    name = _blob(path).name if found else ''
    if found == name:
        return
    if not (_SHA256.fullmatch(name) or _GIT_SHA1.fullmatch(name)):
        path.unlink()  # a server that changed its answer after it was looked at; what it led to may be anybody's
        raise ValueError(f'{constants.ENDPOINT} does not answer as the Hub does: it led {path} to {name[:80]!r}')
    blob = _blob(path)
    _remove(path, found, name, blob.resolve(), blob)


def _blob(path: Path) -> Path:
    return path.parent / os.readlink(path)


def _remove(path: Path, found: str, name: str, *contents: Path) -> NoReturn:
    for damaged in (path, *contents):
        damaged.unlink(missing_ok=True)
    raise ValueError(f'{path} is damaged: its checksum is {found}, not {name}; it was removed, to be downloaded again')


def git_sha1(content: bytes) -> str:
    """The name that Git gives a content."""
    return hashlib.sha1(b'blob %d\0' % len(content) + content, usedforsecurity=False).hexdigest()
