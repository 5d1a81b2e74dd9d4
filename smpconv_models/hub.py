"""Weights as folders of the Hugging Face Hub: safetensors, ``config.json``, a card.

timm reads them: ``timm.create_model('local-dir:FOLDER', pretrained=True)``, or ``'hf-hub:OWNER/NAME'`` when published.
"""
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Tuple, Union

import timm
import torch
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from timm.data import resolve_data_config
from timm.models import save_for_hf

from . import checkpoint, download
from .models import identify

WEIGHTS, CONFIG, CARD = 'model.safetensors', 'config.json', 'README.md'


class Converted(NamedTuple):
    """What a checkpoint was made into.

    Attributes:
        folder: With the weights, the configuration and the card.
        architecture: The model's name.
        key: What the weights were under in the checkpoint ('' for a bare state dict), the average where it has one.
        sha256: Of the weights' file.
        difference: The largest between the logits before and after, over the largest logit.
    """
    folder: Path
    architecture: str
    key: str
    sha256: str
    difference: float


def convert(
        path: Union[str, Path],
        folder: Union[str, Path],
        model: Optional[str] = None,
        use_ema: bool = True,
        source: str = '',
        license: str = 'mit',
        card: Optional[str] = None,
) -> Converted:
    """Makes a folder for the Hub of a checkpoint of the original release, of timm's script or of ours.

    Names and shapes are compared with the model's before tensors are read, and the outputs of the model that the folder
    gives with those of the checkpoint's.

    Args:
        path: The checkpoint.
        folder: Which must not exist, or be empty.
        model: Its name, where the checkpoint tells neither by its arguments nor by its shapes.
        use_ema: Prefer the averaged weights.
        source: Where the checkpoint is from, for the configuration.
        license: Of the weights.
        card: Text of the model card, in which ``{architecture}``, ``{source}``, ``{license}``, ``{sha256}`` and
            ``{classes}`` are filled in; None for none.

    Raises:
        OSError: The folder can't be written.
        ValueError: The file is no checkpoint, of no model of this package, has weights that aren't finite, or the
            outputs differ; no folder is left then.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f'{folder} is there already: expected a new or an empty folder')
    loaded = checkpoint.read_file(path, lazy=True)
    try:
        state_dict, key = checkpoint.select_state_dict(loaded, use_ema)
        name, kwargs = _described(loaded, state_dict, model)
        network = _create(name, kwargs)
        state_dict = checkpoint.adapt(state_dict, network)
        checkpoint.check_finite(state_dict)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    network.load_state_dict(state_dict)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'.{folder.name}.') as temporary:
        made = Path(temporary, folder.name)
        _set_data(network, checkpoint.run_arguments(loaded))
        sha256 = _save(network, made, kwargs, _labels(loaded), {'source': source, 'license': license})
        if card is not None:
            (made / CARD).write_text(card.format(
                architecture=name, source=source or Path(path).name, license=license, sha256=sha256,
                classes=network.num_classes))
        difference = _compare(network, made)
        if folder.exists():
            folder.rmdir()
        shutil.move(made, folder)
    return Converted(folder, name, key, sha256, difference)


def load(where: Union[str, Path], cache_dir: Any = None, **kwargs: Any) -> Any:
    """A model of this package with its weights, from a repository of the Hub or a folder: ``timm.create_model``.

    Args:
        where: ``OWNER/NAME``, ``OWNER/NAME@REVISION``, or a folder.
        cache_dir: The Hub client's, by default its own.
        kwargs: More of ``timm.create_model``, e.g. ``num_classes``, ``features_only``, ``kernel_scale``.

    Raises:
        ValueError: Neither is there, its configuration is not one of a model of this package, or its weights don't fit.
    """
    is_folder = Path(where).is_dir()
    path = Path(where, CONFIG) if is_folder else download.from_hub(str(where), CONFIG, cache_dir)
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
        architecture = config['architecture']
        if architecture not in timm.list_models('smpconv*'):
            raise ValueError(f'its architecture must be one of {timm.list_models("smpconv*")}, got {architecture!r}')
        source = 'local-dir' if is_folder else 'hf-hub'
        return timm.create_model(f'{source}:{where}', pretrained=True, cache_dir=cache_dir, **kwargs)
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = f'it has no {error}' if isinstance(error, KeyError) else checkpoint.first_line(error)
        raise ValueError(f'{where} cannot be loaded: {reason}') from error


def _described(loaded: Dict[str, Any], state_dict: Dict[str, Any], model: Optional[str]) -> Tuple[str, Dict[str, Any]]:
    """The model's name and its constructor's arguments; what the weights' shapes tell is surest."""
    kwargs = checkpoint.model_arguments(loaded)
    found = identify(state_dict)
    if found is not None:
        kwargs = {**kwargs, 'num_classes': found.num_classes, 'in_chans': found.in_chans}
    name = model or (found.name if found else checkpoint.run_arguments(loaded).get('model'))
    if name is None:
        raise ValueError(f'it is of none of {timm.list_models("smpconv*")}: which one?')
    return name, kwargs


def _create(name: Any, kwargs: Dict[str, Any]) -> Any:
    if name not in timm.list_models('smpconv*'):
        raise ValueError(f'expected one of {timm.list_models("smpconv*")}, got {name!r}')
    try:
        return timm.create_model(name, **kwargs).eval()
    except TypeError as error:
        raise ValueError(f'{name} does not take {kwargs}: {error}') from error


def _set_data(network: Any, arguments: Dict[str, Any]) -> None:
    """How its images are made ready, where the run said so."""
    keys = ('img_size', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct')
    given = {key: arguments[key] for key in keys if arguments.get(key) is not None}
    config = resolve_data_config({**given, 'in_chans': network.in_chans}, model=network) if given else {}
    names = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')
    network.pretrained_cfg.update({key: config[key] for key in names if key in config})


def _labels(loaded: Any) -> Dict[str, Any]:
    classes = loaded.get('classes') if isinstance(loaded, dict) else None
    return {'label_names': list(classes)} if classes else {}


def _save(network: Any, folder: Path, kwargs: Dict[str, Any], labels: Dict[str, Any], more: Dict[str, Any]) -> str:
    """timm's folder, whose configuration also tells where the weights are from and their checksum."""
    save_for_hf(network, str(folder), model_config=labels, model_args=kwargs, safe_serialization=True)
    sha256 = checkpoint.file_sha256(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    config = {**config, **more, 'sha256': sha256}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n')
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors makes files for their owner alone
    return sha256


@torch.no_grad()
def _compare(network: Any, folder: Path) -> float:
    """The relative difference of the logits of a model and of what timm makes of its folder."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *network.pretrained_cfg['input_size'], generator=generator)
    before = network(images)
    after = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(images)
    difference = ((after - before).abs().max() / before.abs().max().clamp_min(1e-30)).item()
    if not difference <= 1e-5:
        raise ValueError(f'the outputs after the conversion differ from those before by {difference:.1e}')
    return difference


class Publication(NamedTuple):
    """What publishing does, or would do.

    Attributes:
        repo: ``OWNER/NAME``.
        creates: Whether the repository is made.
        changes: File name -> 'new', 'changed' or 'same'.
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
        force: Replace other weights that are there.
        private: Make the repository so, if it is made.

    Raises:
        ValueError: The folder is not whole, has weights that aren't finite or other files; the repository has other
            weights, no token is set, or the Hub refuses.
    """
    folder = Path(folder)
    sha256 = _check_folder(folder)
    texts = {
        CONFIG: (folder / CONFIG).read_bytes(),
        CARD: (folder / CARD).read_bytes().replace(b'OWNER/NAME', repo.encode())}
    names = {WEIGHTS: sha256, **{name: download.git_sha1(content) for name, content in texts.items()}}
    client = HfApi()
    try:
        token = get_token()
        if token is None:
            raise ValueError('publishing needs a token: set HF_TOKEN, or run hf auth login')
        client.whoami(token=token)
        there = _remote(client, repo)
        changes = {file: _change(name, (there or {}).get(file)) for file, name in names.items()}
        if changes[WEIGHTS] == 'changed' and not force:
            raise ValueError(f'{repo} has other weights: --force replaces them')
        planned = Publication(repo, there is None, changes)
        sent = [file for file, change in changes.items() if change != 'same']
        if dry_run or not sent:
            return planned
        if there is None:
            client.create_repo(repo, private=private, exist_ok=True)
        commit = client.create_commit(
            repo, [CommitOperationAdd(file, texts.get(file, str(folder / file))) for file in sent],
            commit_message=f'Weights {sha256[:12]}')
        return planned._replace(url=str(commit.commit_url))
    except HFValidationError as error:
        raise ValueError(f'{repo!r} is no name for a repository: {checkpoint.first_line(error)}') from error
    except json.JSONDecodeError as error:
        raise ValueError(f'{repo} cannot be published: the Hub answers with a page; see HF_ENDPOINT') from error
    except (*download.HUB_ERRORS, RuntimeError) as error:
        raise ValueError(f'{repo} cannot be published: {download.reason(error)}') from error


def _check_folder(folder: Path) -> str:
    """Raises ValueError unless it can be sent; the checksum of its weights."""
    if not folder.is_dir():
        raise ValueError(f'{folder} is no folder; hub/convert.py makes one')
    missing = [name for name in (WEIGHTS, CONFIG, CARD) if not (folder / name).is_file()]
    others = sorted(path.name for path in folder.iterdir() if path.name not in (WEIGHTS, CONFIG, CARD))
    if missing or others:
        raise ValueError(f'{folder} must have {WEIGHTS}, {CONFIG} and {CARD}: no {missing}, but {others[:5]}')
    weights = checkpoint.read_file(folder / WEIGHTS)
    checkpoint.check_finite(weights)
    config, sha256 = json.loads((folder / CONFIG).read_text()), checkpoint.file_sha256(folder / WEIGHTS)
    if config.get('sha256') != sha256:
        raise ValueError(f'{folder / WEIGHTS} is not the file whose checksum is in {CONFIG}: {config.get("sha256")}')
    return sha256


def _remote(client: HfApi, repo: str) -> Optional[Dict[str, Any]]:
    """What the Hub has, by name; None where there is no such repository."""
    try:
        info = client.model_info(repo, files_metadata=True)
    except RepositoryNotFoundError:
        return None
    return {sibling.rfilename: sibling for sibling in info.siblings or []}


def _change(name: str, there: Any) -> str:
    """Of a content, by the Hub's name for it: the SHA-256 of what is large, else Git's."""
    if there is None:
        return 'new'
    return 'same' if name == (there.lfs.sha256 if there.lfs else there.blob_id) else 'changed'
