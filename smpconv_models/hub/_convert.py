"""Folders for the Hub of checkpoints."""
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
from smpconv_models.models import check_arguments, identify
from smpconv_models.utils.download import file_sha256
from smpconv_models.utils.errors import first_line

from ._load import CARD, CONFIG, WEIGHTS

# Of how images are made ready.
_DATA = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')


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


@torch.no_grad()
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
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f'{folder} is there already: expected a new or an empty folder')
    if len(f'{source}{license}'.splitlines()) > 1:
        raise ValueError(f'expected one line each as source and licence, got {source!r} and {license!r}')
    loaded = checkpoint.load_file(path, lazy=True)
    try:
        state_dict, key = checkpoint.select_state_dict(loaded, use_ema)
        described = checkpoint.describe(loaded)
        name, kwargs = _described(described, state_dict, model)
        network = _create(name, kwargs)
        network.load_state_dict(_adapted(state_dict, network), assign=True)
        network.pretrained_cfg.update(_data(network, described.preparation()), license=license)
        labels = _labels(network, described.classes)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    images = _images(network)
    logits = network(images)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'.{folder.name}.') as temporary:
        made = Path(temporary, 'folder')
        sha256 = _save(network, made, kwargs, labels, {'source': source, 'license': license})
        if card is not None:
            (made / CARD).write_text(card.format(
                architecture=name, source=source or Path(path).name, license=license, sha256=sha256,
                classes=network.num_classes))
        del loaded, state_dict, network  # one model at a time
        difference = _difference(logits, timm.create_model(f'local-dir:{made}', pretrained=True).eval()(images))
        folder.mkdir(exist_ok=True)
        for file in (WEIGHTS, CARD, CONFIG):  # the last is looked for first
            if (made / file).exists():
                (made / file).replace(folder / file)
    return Converted(folder, name, key, sha256, difference)


def _described(
        described: checkpoint.Description, state_dict: Dict[str, Any], model: Optional[str],
) -> Tuple[str, Dict[str, Any]]:
    """The model's name and its constructor's arguments; what the weights' shapes tell is surest."""
    kwargs = described.model_kwargs
    found = identify(state_dict)
    if found is not None:
        kwargs = {**kwargs, 'num_classes': found.num_classes, 'in_chans': found.in_chans}
    name = model or (found.name if found else described.model)
    if name is None:
        raise ValueError(f'it is of none of {timm.list_models("smpconv*")}: which one?')
    return name, kwargs


def _create(name: str, kwargs: Dict[str, Any]) -> Any:
    """The network, without memory; a checkpoint's arguments are believed as little as those of a repository."""
    known = timm.list_models('smpconv*')
    if name not in known:
        raise ValueError(f'expected one of {known}, got {name!r}')
    check_arguments(name, kwargs)
    cfg: Any = timm.get_pretrained_cfg(name)
    try:
        return timm.create_model(
            name, pretrained_cfg={**cfg.to_dict(), 'source': 'local-dir'}, device='meta', **kwargs).eval()
    except TypeError as error:
        raise ValueError(f'{name} does not take {kwargs}: {error}') from error


def _adapted(state_dict: Dict[str, Any], network: Any) -> Dict[str, Any]:
    """The weights under our names and in the model's precision."""
    state_dict = checkpoint.convert_and_check(state_dict, network)
    checkpoint.check_finite(state_dict)
    dtypes = {name: value.dtype for name, value in network.state_dict().items()}
    return {name: value.to(dtypes[name]) for name, value in state_dict.items()}


def _data(network: Any, arguments: Dict[str, Any]) -> Dict[str, Any]:
    """How its images are made ready, as the run said, where it did."""
    size = (network.in_chans, *network.pretrained_cfg['input_size'][1:])
    given = {key: arguments[key] for key in ('img_size', *_DATA) if arguments.get(key) is not None}
    if 'img_size' not in given:
        given.setdefault('input_size', size)
    try:
        config = resolve_data_config({**given, 'in_chans': network.in_chans}, model=network)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f'images cannot be prepared as args describes: {checkpoint.shown(given)}') from error
    data = {key: config[key] for key in _DATA}
    for key in {'mean', 'std'} - given.keys():  # of three channels; the run took their mean too
        if len(data[key]) != network.in_chans:
            data[key] = (sum(data[key]) / len(data[key]),) * network.in_chans
    counts = {data['input_size'][0], *(len(data[key]) for key in ('mean', 'std') if len(data[key]) > 1)}
    if counts != {network.in_chans}:
        raise ValueError(f'args must describe images of {network.in_chans} channels, got {checkpoint.shown(data)}')
    return data


def _labels(network: Any, classes: Optional[List[str]]) -> Dict[str, Any]:
    if not classes:
        return {}
    if len(classes) != network.num_classes:
        raise ValueError(f'expected {network.num_classes} names of classes, got {checkpoint.shown(classes)}')
    return {'label_names': list(classes)}


def _save(network: Any, folder: Path, kwargs: Dict[str, Any], labels: Dict[str, Any], more: Dict[str, Any]) -> str:
    """timm's folder, whose configuration also tells where the weights are from and their checksum."""
    try:
        save_for_hf(network, str(folder), model_config=labels, model_args=kwargs, safe_serialization=True)
    except SafetensorError as error:  # a full disk, say
        raise OSError(f'{folder.parent.parent} cannot be written: {first_line(error)}') from error
    sha256 = file_sha256(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    # the classes stand beside the arguments too, and transformers takes them from there only
    model_args = {name: value for name, value in config['model_args'].items() if name != 'num_classes'}
    config = {**config, 'model_args': model_args, **more, 'sha256': sha256}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n')
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors makes files for their owner alone
    return sha256


def _images(network: Any) -> torch.Tensor:
    """Return two images for the comparison, of the network's size unless it is larger than evaluations inherit."""
    generator = torch.Generator().manual_seed(0)
    channels, *sides = network.pretrained_cfg['input_size']
    return torch.randn(2, channels, *(min(side, checkpoint.MAX_INHERITED_SIDE) for side in sides), generator=generator)


def _difference(before: torch.Tensor, after: torch.Tensor) -> float:
    """Of the logits, relative to the largest; ValueError where it is more than rounding."""
    difference = ((after - before).abs().max() / before.abs().max().clamp_min(1e-30)).item()
    if not difference <= 1e-5:
        raise ValueError(f'the outputs after the conversion differ from those before by {difference:.1e}')
    return difference
