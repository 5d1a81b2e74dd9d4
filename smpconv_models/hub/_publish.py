"""Repositories of the Hub from folders."""
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Union

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from smpconv_models.utils import hub_download
from smpconv_models.utils.download import file_sha256
from smpconv_models.utils.errors import first_line

from ._load import CARD, CONFIG, WEIGHTS, load

# Files of weights, by their suffixes.
_WEIGHTS = ('.bin', '.ckpt', '.h5', '.msgpack', '.onnx', '.pkl', '.pt', '.pth', '.safetensors', '.tar')


class Publication(NamedTuple):
    """What publishing does, or would do.

    Attributes:
        repo: ``OWNER/NAME``.
        creates: Whether the repository is made.
        changes: File name -> 'new', 'changed', 'same', or 'removed' of other weights.
        url: Of the commit; None of a dry run, or where nothing changes.
    """
    repo: str
    creates: bool
    changes: Dict[str, str]
    url: Optional[str] = None


def publish(
        folder: Union[str, Path],
        repo: str,
        dry_run: bool = True,
        force: bool = False,
        private: bool = False,
) -> Publication:
    """Creates or updates a repository of the Hugging Face Hub with a folder that :func:`convert` has made.

    Only the weights in safetensors, the configuration and the card are sent, in which ``OWNER/NAME`` becomes the
    repository's. The token is the Hub client's own: of
    ``HF_TOKEN``, or of ``hf auth login``.

    Args:
        folder: What to send.
        repo: ``OWNER/NAME``.
        dry_run: Look at both, and send nothing.
        force: Replace other weights that are there, whatever they are called.
        private: Make the repository so; one that is there must be.

    Raises:
        ValueError: The folder is not whole, has weights that aren't finite or other files; the repository has other
            weights, no token is set, or the Hub refuses.
    """
    folder = Path(folder)
    sha256 = _check_folder(folder)
    if repo.count('/') != 1:
        raise ValueError(f'expected OWNER/NAME, got {repo!r}')
    texts = {
        CONFIG: (folder / CONFIG).read_bytes(),
        CARD: (folder / CARD).read_bytes().replace(b'OWNER/NAME', repo.encode())}
    names = {WEIGHTS: sha256, **{file: hub_download.git_sha1(content) for file, content in texts.items()}}
    client = HfApi()
    made = False
    try:
        _check_token(client)
        info = _info(client, repo)
        planned = _plan(repo, info, names, force, private)
        files = [file for file, change in planned.changes.items() if change in ('new', 'changed')]
        removed = [file for file, change in planned.changes.items() if change == 'removed']
        if dry_run or not files + removed:
            return planned
        if info is None:
            client.create_repo(repo, private=private, exist_ok=True)
            made = True
        commit = client.create_commit(
            repo,
            [CommitOperationAdd(file, texts.get(file, str(folder / file))) for file in files]
            + [CommitOperationDelete(file) for file in removed],
            commit_message=f'Weights {sha256[:12]}', parent_commit=info.sha if info else None)
        return planned._replace(url=str(commit.commit_url))
    except HFValidationError as error:
        raise ValueError(f'{repo!r} is no name for a repository: {first_line(error)}') from error
    except json.JSONDecodeError as error:
        raise ValueError(f'{repo} cannot be published: the Hub answers with a page; see HF_ENDPOINT') from error
    except (*hub_download.HUB_ERRORS, RuntimeError) as error:
        left = f' ({repo} was made, and is empty)' if made else ''
        raise ValueError(f'{repo} cannot be published: {hub_download.error_reason(error)}{left}') from error


def _check_folder(folder: Path) -> str:
    """Raises ValueError unless it can be sent; the checksum of its weights."""
    if not folder.is_dir():
        raise ValueError(f'{folder} is no folder; hub/convert.py makes one')
    missing = [name for name in (WEIGHTS, CONFIG, CARD) if not (folder / name).is_file()]
    others = sorted(path.name for path in folder.iterdir() if path.name not in (WEIGHTS, CONFIG, CARD))
    others = [name for name in others if not name.startswith('.')]
    if missing or others:
        raise ValueError(f'{folder} must have {WEIGHTS}, {CONFIG} and {CARD}: no {missing}, but {others[:5]}')
    load(folder)  # of a configuration and weights that are whole, finite and go together
    expected = json.loads((folder / CONFIG).read_text(encoding='utf-8')).get('sha256')
    sha256 = file_sha256(folder / WEIGHTS)
    if sha256 != expected:
        raise ValueError(f'{folder / WEIGHTS} is not the file whose checksum is in {CONFIG}: {expected}')
    return sha256


def _check_token(client: HfApi) -> None:
    token = get_token()
    if token is None:
        raise ValueError('publishing needs a token: set HF_TOKEN, or run hf auth login')
    client.whoami(token=token)


def _info(client: HfApi, repo: str) -> Optional[ModelInfo]:
    """What the Hub has; None where there is no such repository."""
    try:
        return client.model_info(repo, files_metadata=True)
    except RepositoryNotFoundError:
        return None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f'{repo} cannot be published: the Hub does not answer as one; see HF_ENDPOINT') from error


def _plan(repo: str, info: Optional[ModelInfo], names: Dict[str, str], force: bool, private: bool) -> Publication:
    if info is None:
        return Publication(repo, True, dict.fromkeys(names, 'new'))
    if private and not info.private:
        raise ValueError(f'{repo} is there already, for everybody to see: --private cannot change that')
    there = {sibling.rfilename: sibling for sibling in info.siblings or []}
    changes = {file: _change(name, there.get(file)) for file, name in names.items()}
    others: List[str] = [file for file in there if file.endswith(_WEIGHTS) and file not in names]
    if (others or changes[WEIGHTS] == 'changed') and not force:
        named = f' ({", ".join(others[:5])})' if others else ''
        raise ValueError(f'{repo} has other weights{named}: --force replaces them')
    return Publication(repo, False, {**changes, **dict.fromkeys(others, 'removed')})


def _change(name: str, there: Any) -> str:
    """Of a content, by the Hub's name for it: the SHA-256 of what is large, else Git's."""
    if there is None:
        return 'new'
    return 'same' if name == (there.lfs.sha256 if there.lfs else there.blob_id) else 'changed'
