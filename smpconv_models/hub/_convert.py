"""Conversion of checkpoints to folders for the Hub."""
import json
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import save_for_hf

from smpconv_models import checkpoint
from smpconv_models.checkpoint.original import RELEASE_URL
from smpconv_models.models import check_arguments, identify
from smpconv_models.utils.download import file_sha256
from smpconv_models.utils.errors import first_line

from ._repository import CARD, CONFIG, WEIGHTS

_DATA_FIELDS = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')


class Converted(NamedTuple):
    """Result of a conversion.

    Attributes:
        folder: Folder with the weights, the configuration and the card.
        architecture: Name of the model.
        key: Key of the weights in the checkpoint, '' if the checkpoint is itself a state dict.
        sha256: Checksum of the weights' file.
        difference: Largest difference of the logits before and after, divided by the largest logit.
    """
    folder: Path
    architecture: str
    key: str
    sha256: str
    difference: float


@torch.no_grad()
def convert(
        path: Union[str, Path], folder: Union[str, Path], model: Optional[str] = None, use_ema: Optional[bool] = None,
        source: str = '', license: Optional[str] = None, card: Optional[str] = None) -> Converted:
    """Convert a checkpoint of the original release, of timm's script or of ours to a folder for the Hub.

    Names and shapes are compared with the model's before tensors are read, and the outputs of the model in the folder
    with those of the checkpoint's model.

    Args:
        path: Path of the checkpoint.
        folder: Path of a new or an empty folder.
        model: Name of the model, needed if neither the arguments in the checkpoint nor the shapes name it.
        use_ema: Whether to prefer the EMA weights; by default unless the checkpoint says that the model's were better.
        source: Origin of the checkpoint, by default the name of the file. The address of the original release,
            ``checkpoint.original.RELEASE_URL``, says that the weights are its authors'.
        license: License of the weights, by default 'mit' for the original release's and 'unknown' for others.
        card: Text of the model card, with the fields ``{architecture}``, ``{source}``, ``{license}``, ``{sha256}`` and
            ``{classes}``; None for no card.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If the file is no checkpoint of a model of this package, has weights that are not finite, or the
            outputs differ; no folder is left then.
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f'{folder} exists: expected a new or an empty folder')
    source = source or Path(path).name
    license = license or ('mit' if source == RELEASE_URL else 'unknown')
    if len(f'{source}{license}'.splitlines()) > 1:
        raise ValueError(f'expected one line each as source and license, got {source!r} and {license!r}')
    loaded = checkpoint.load_file(path, lazy=True)
    try:
        network, kwargs, classes, key = _load_network(loaded, model, use_ema)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    name = network.pretrained_cfg['architecture']
    images = _sample_images(network)
    logits = network(images)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'.{folder.name}.') as temporary:
        saved = Path(temporary, 'folder')
        sha256 = _save(network, saved, kwargs, classes, source, license)
        if card is not None:
            (saved / CARD).write_text(card.format(
                architecture=name, source=source, license=license, sha256=sha256,
                classes=network.num_classes))
        del loaded, network  # one model at a time
        converted = timm.create_model(f'local-dir:{saved}', pretrained=True).eval()(images)
        difference = ((converted - logits).abs().max() / logits.abs().max().clamp_min(1e-30)).item()
        if not difference <= 1e-5:  # more than rounding, or NaN
            raise ValueError(f'the outputs after the conversion differ from those before by {difference:.1e}')
        folder.mkdir(exist_ok=True)
        for file in (WEIGHTS, CARD, CONFIG):  # the configuration last, as readers look for it first
            if (saved / file).exists():
                (saved / file).replace(folder / file)
    return Converted(folder, name, key, sha256, difference)


def _load_network(
        loaded: Any, model: Optional[str],
        use_ema: Optional[bool]) -> Tuple[Any, Dict[str, Any], Optional[List[str]], str]:
    """Return the network with its weights, its constructor's arguments, the class names and the weights' key."""
    state_dict, key = checkpoint.select_state_dict(loaded, use_ema)
    description = checkpoint.describe(loaded)
    network, kwargs = _create_network(description, state_dict, model)
    state_dict = checkpoint.convert_and_check(state_dict, network)
    checkpoint.check_finite(state_dict)
    dtypes = {name: value.dtype for name, value in network.state_dict().items()}
    network.load_state_dict({name: value.to(dtypes[name]) for name, value in state_dict.items()}, assign=True)
    network.pretrained_cfg.update(_data_config(network, description.preparation()))
    classes = description.classes
    if classes and len(classes) != network.num_classes:
        raise ValueError(f'expected {network.num_classes} names of classes, got {checkpoint.shown(classes)}')
    return network, kwargs, classes, key


def _create_network(
        description: checkpoint.Description, state_dict: Dict[str, Any],
        name: Optional[str]) -> Tuple[Any, Dict[str, Any]]:
    """Create the network on the meta device; return it and the arguments of its constructor.

    What the shapes of the weights show overrides the description, whose arguments are validated.
    """
    kwargs = description.model_kwargs
    match = identify(state_dict)
    if match is not None:
        kwargs = {**kwargs, 'num_classes': match.num_classes, 'in_chans': match.in_chans}
    name = name or (match.name if match else description.model)
    known = timm.list_models('smpconv*')
    if name is None:
        raise ValueError(f'the weights fit none of {known}, and no model is named')
    if name not in known:
        raise ValueError(f'expected one of {known}, got {name!r}')
    check_arguments(name, kwargs)
    cfg: Any = timm.get_pretrained_cfg(name)
    try:
        return timm.create_model(
            name, pretrained_cfg={**cfg.to_dict(), 'source': 'local-dir'}, device='meta', **kwargs).eval(), kwargs
    except TypeError as error:
        raise ValueError(f'{name} does not take {kwargs}: {error}') from error


def _data_config(network: Any, arguments: Dict[str, Any]) -> Dict[str, Any]:
    """Return how images are prepared: as the training run did, or by default as the model does."""
    size = (network.in_chans, *network.pretrained_cfg['input_size'][1:])
    given = {key: arguments[key] for key in ('img_size', *_DATA_FIELDS) if arguments.get(key) is not None}
    if 'img_size' not in given:
        given.setdefault('input_size', size)
    try:
        config = resolve_data_config({**given, 'in_chans': network.in_chans}, model=network)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f'images cannot be prepared as args describes: {checkpoint.shown(given)}') from error
    data = {key: config[key] for key in _DATA_FIELDS}
    for key in {'mean', 'std'} - given.keys():  # defaults for three channels, of which the run took the mean as well
        if len(data[key]) != network.in_chans:
            data[key] = (sum(data[key]) / len(data[key]),) * network.in_chans
    counts = {data['input_size'][0], *(len(data[key]) for key in ('mean', 'std') if len(data[key]) > 1)}
    if counts != {network.in_chans}:
        raise ValueError(f'args must describe images of {network.in_chans} channels, got {checkpoint.shown(data)}')
    return data


def _sample_images(network: Any) -> torch.Tensor:
    """Return two images for the comparison, of the network's size unless it is larger than evaluations inherit."""
    generator = torch.Generator().manual_seed(0)
    channels, *sides = network.pretrained_cfg['input_size']
    return torch.randn(2, channels, *(min(side, checkpoint.MAX_INHERITED_SIDE) for side in sides), generator=generator)


def _save(
        network: Any, folder: Path, kwargs: Dict[str, Any], classes: Optional[List[str]], source: str,
        license: str) -> str:
    """Save a folder as timm does, with source, license and checksum in its configuration; return the checksum."""
    network.to(memory_format=torch.contiguous_format)   # safetensors has no other layout, and runs store channels_last
    network.pretrained_cfg.update(license=license)
    if source != RELEASE_URL:  # these fields describe the release's weights
        network.pretrained_cfg.update(tag=None, origin_url=None)
    labels = {'label_names': classes} if classes else {}
    try:
        save_for_hf(network, str(folder), model_config=labels, model_args=kwargs, safe_serialization=True)
    except SafetensorError as error:  # a full disk, for example
        raise OSError(f'{folder.parent.parent} cannot be written: {first_line(error)}') from error
    sha256 = file_sha256(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    # num_classes is also stored outside the arguments, and transformers reads it only there
    model_args = {name: value for name, value in config['model_args'].items() if name != 'num_classes'}
    config = {**config, 'model_args': model_args, 'source': source, 'license': license, 'sha256': sha256}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n')
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors creates files that only their owner reads
    return sha256
