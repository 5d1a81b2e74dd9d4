"""Models in folders and in repositories of the Hub: loading, whose configurations are validated, and publishing."""
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Union

import timm
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from smpconv_models.models import check_arguments
from smpconv_models.utils import hub_download
from smpconv_models.utils.download import file_sha256
from smpconv_models.utils.errors import first_line

# Files of a folder or repository.
WEIGHTS, CONFIG, CARD = 'model.safetensors', 'config.json', 'README.md'

_WEIGHT_SUFFIXES = ('.bin', '.ckpt', '.h5', '.msgpack', '.onnx', '.pkl', '.pt', '.pth', '.safetensors', '.tar')


def load(where: Union[str, Path], cache_dir: Any = None, **kwargs: Any) -> Any:
    """Create a model of this package with its weights from a repository of the Hub or a folder.

    Args:
        where: ``OWNER/NAME``, ``OWNER/NAME@REVISION``, or a folder.
        cache_dir: Folder of the cache, by default the Hub client's.
        kwargs: Arguments of ``timm.create_model``, e.g. ``num_classes``, ``features_only``, ``kernel_scale``.

    Raises:
        ValueError: If there is no such repository or folder, its configuration is not that of a model of this package,
            or its weights do not fit.
    """
    if Path(where).is_dir():
        folder = Path(where)
    else:
        folder, other = (
            hub_download.download_verified(str(where), name, cache_dir).parent for name in (WEIGHTS, CONFIG))
        if folder != other:
            raise ValueError(f'{where} was changed while it was downloaded: load it again')
    known = timm.list_models('smpconv*')
    try:
        config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
        if config['architecture'] not in known:
            raise ValueError(f'its architecture must be one of {known}, got {config["architecture"]!r:.200}')
        check_arguments(config['architecture'], config.get('model_args', {}))
        return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs)
    except (AssertionError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = f'it has no {error}' if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f'{where} cannot be loaded: {reason}') from error


class Publication(NamedTuple):
    """Changes of a repository, made or planned.

    Attributes:
        repo: ``OWNER/NAME``.
        creates: Whether the repository is new.
        changes: File name -> 'new', 'changed', 'same', or 'removed' for other weights.
        url: Address of the commit; None in a dry run or if nothing changes.
        has_token: Whether a token was set; without one, a private repository cannot be told from none.
    """
    repo: str
    creates: bool
    changes: Dict[str, str]
    url: Optional[str] = None
    has_token: bool = True


def publish(
        folder: Union[str, Path], repo: str, dry_run: bool = True, force: bool = False,
        private: bool = False) -> Publication:
    """Create or update a repository of the Hugging Face Hub with a folder of :func:`convert`.

    Only the safetensors weights, the configuration and the card are sent; ``'local-dir:.'`` in the card becomes
    ``'hf-hub:OWNER/NAME'`` with the repository's name. The token is the Hub client's: ``HF_TOKEN``, or that of
    ``hf auth login``. A dry run of a public or a new repository needs none.

    Args:
        folder: Folder to send.
        repo: ``OWNER/NAME``.
        dry_run: Whether to only compare folder and repository.
        force: Replace other weights in the repository, under any name.
        private: Create a private repository; an existing one must be private.

    Raises:
        ValueError: If the folder is incomplete, has weights that are not finite or other files; the repository has
            other weights, no token is set to publish with, or the Hub refuses.
    """
    folder = Path(folder)
    sha256 = _check_folder(folder)
    if repo.count('/') != 1:
        raise ValueError(f'expected OWNER/NAME, got {repo!r}')
    texts = {
        CONFIG: (folder / CONFIG).read_bytes(),
        CARD: (folder / CARD).read_bytes().replace(
            b"'local-dir:.'", f"'hf-hub:{repo}'".encode()).replace(b'OWNER/NAME', repo.encode())}
    names = {WEIGHTS: sha256, **{file: hub_download.git_sha1(content) for file, content in texts.items()}}
    client = HfApi()
    is_created = False
    try:
        token = get_token()
        if token is not None:
            client.whoami(token=token)
        elif not dry_run:
            raise ValueError('publishing needs a token: set HF_TOKEN, or run hf auth login')
        info = _model_info(client, repo)
        planned = _plan(repo, info, names, force, private)._replace(has_token=token is not None)
        files = [file for file, change in planned.changes.items() if change in ('new', 'changed')]
        removed = [file for file, change in planned.changes.items() if change == 'removed']
        if dry_run or not files + removed:
            return planned
        if info is None:
            client.create_repo(repo, private=private, exist_ok=True)
            is_created = True
        commit = client.create_commit(
            repo,
            [CommitOperationAdd(file, texts.get(file, str(folder / file))) for file in files]
            + [CommitOperationDelete(file) for file in removed],
            commit_message=f'Weights {sha256[:12]}', parent_commit=info.sha if info else None)
        return planned._replace(url=str(commit.commit_url))
    except HFValidationError as error:
        raise ValueError(f'{repo!r} is no name for a repository: {first_line(error)}') from error
    except json.JSONDecodeError as error:
        raise ValueError(f'{repo} cannot be published: the server sends a page; see HF_ENDPOINT') from error
    except (*hub_download.HUB_ERRORS, RuntimeError) as error:
        left = f' ({repo} was created, and is empty)' if is_created else ''
        raise ValueError(f'{repo} cannot be published: {hub_download.error_reason(error)}{left}') from error


def _check_folder(folder: Path) -> str:
    """Return the checksum of the weights; raise ValueError if the folder cannot be sent."""
    if not folder.is_dir():
        raise ValueError(f'{folder} is no folder; hub/convert.py creates one')
    files = (WEIGHTS, CONFIG, CARD)
    missing = [name for name in files if not (folder / name).is_file()]
    others = sorted(path.name for path in folder.iterdir() if path.name not in files and not path.name.startswith('.'))
    if missing or others:
        raise ValueError(f'{folder} must have {", ".join(files)}: missing {missing}, unexpected {others[:5]}')
    load(folder)  # raises if configuration and weights are incomplete, not finite or do not fit
    expected = json.loads((folder / CONFIG).read_text(encoding='utf-8')).get('sha256')
    sha256 = file_sha256(folder / WEIGHTS)
    if sha256 != expected:
        raise ValueError(f'{folder / WEIGHTS} is not the file whose checksum is in {CONFIG}: {expected}')
    return sha256


def _model_info(client: HfApi, repo: str) -> Optional[ModelInfo]:
    """Return what the Hub knows of a repository; None if there is none."""
    try:
        return client.model_info(repo, files_metadata=True)
    except RepositoryNotFoundError:
        return None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f'{repo} cannot be published: the server does not answer as the Hub does; see HF_ENDPOINT') from error


def _plan(repo: str, info: Optional[ModelInfo], names: Dict[str, str], force: bool, private: bool) -> Publication:
    if info is None:
        return Publication(repo, True, dict.fromkeys(names, 'new'))
    if private and not info.private:
        raise ValueError(f'{repo} exists and is public: --private cannot change that')
    published = {sibling.rfilename: sibling for sibling in info.siblings or []}
    changes = {file: _compare(name, published.get(file)) for file, name in names.items()}
    others: List[str] = [file for file in published if file.endswith(_WEIGHT_SUFFIXES) and file not in names]
    if (others or changes[WEIGHTS] == 'changed') and not force:
        named = f' ({", ".join(others[:5])})' if others else ''
        raise ValueError(f'{repo} has other weights{named}: --force replaces them')
    return Publication(repo, False, {**changes, **dict.fromkeys(others, 'removed')})


def _compare(name: str, published: Any) -> str:
    """Return the change of a file, from the Hub's name for its content: SHA-256 for large files, Git's for others."""
    if published is None:
        return 'new'
    return 'same' if name == (published.lfs.sha256 if published.lfs else published.blob_id) else 'changed'
