"""Devices and models: by name, or from a checkpoint."""
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import timm
import torch
from torch import Tensor, nn

from smpconv_models import checkpoint
from smpconv_models.checkpoint import Description
from smpconv_models.models import (
    architecture_hint,
    check_network,
    create_sequence_model,
    identify,
    list_sequence_models,
)
from smpconv_models.utils import hub_download
from smpconv_models.utils.errors import first_line, suggestion_suffix

from .config import ModelOptions

# Sources of models with a configuration of their own, by timm's names.
_SOURCES = ('hf-hub', 'local-dir')


def select_device(name: Optional[str], local_rank: Optional[int] = None) -> torch.device:
    """Return the named device, by default the GPU if there is one, otherwise the CPU.

    Args:
        name: PyTorch's name of the device.
        local_rank: Rank on this machine if there are several, each of which takes the GPU of its number.

    Raises:
        ValueError: If the device cannot be used.
    """
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    if name == 'cuda' and local_rank is not None:
        name = f'cuda:{local_rank}'
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f'--device {name} cannot be used: {first_line(error)}') from error
    return device


def model_arguments(
        model: ModelOptions,
        img_size: Optional[int],
        input_size: Optional[List[int]],
        defaults: Dict[str, Any],
) -> Dict[str, Any]:
    """Return the arguments of a model's constructor: the options, over ``defaults`` for what they leave open.

    Args:
        model: Options of the network.
        img_size: Image side, for models of a fixed size.
        input_size: (channels, height, width), instead of ``img_size``.
        defaults: Arguments that the options override.

    Raises:
        ValueError: If options contradict each other.
    """
    in_chans = model.in_chans
    if input_size is not None:
        if in_chans not in (None, input_size[0]):
            raise ValueError(f'--in-chans {in_chans} contradicts --input-size {input_size}')
        in_chans = input_size[0]
        if img_size is not None and list(input_size[1:]) != [img_size] * 2:
            raise ValueError(f'--img-size {img_size} contradicts --input-size {input_size}')
    counts = {'num_classes': model.num_classes, 'in_chans': in_chans}
    check_no_conflict(model.model_kwargs, {name: value for name, value in counts.items() if value is not None})
    cfg = timm.get_pretrained_cfg(model.model) if model.model and timm.is_model(model.model) else None
    fixed_img_size = None
    if cfg is not None and cfg.fixed_input_size:  # a ViT
        fixed_img_size = tuple(input_size[1:]) if input_size else None if img_size is None else (img_size, img_size)
    given = {**counts, 'img_size': fixed_img_size, **model.model_kwargs}
    return {**defaults, **{key: value for key, value in given.items() if value is not None}}


def check_no_conflict(model_kwargs: Dict[str, Any], given: Dict[str, Any]) -> None:
    """Raise ValueError if ``--model-kwargs`` and another option give an argument different values."""
    for name, value in given.items():
        if model_kwargs.get(name, value) != value:
            raise ValueError(
                f'--model-kwargs {name}={model_kwargs[name]} contradicts the {value} that another option gives')


def check_model_name(name: str) -> None:
    """Raise ValueError unless a name is timm's, ours, ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``."""
    source, _ = parse_model_name(name)
    if source not in _SOURCES and not timm.is_model(name) and name not in list_sequence_models():
        for_images, for_sequences = timm.list_models('smpconv*'), list_sequence_models()
        hub_hint = f'; hf-hub:{name} is a repository of the Hub'
        hint = hub_hint if '/' in name else suggestion_suffix(name, [*for_images, *for_sequences])
        raise ValueError(
            f'no model is named {name!r}; this package has {for_images} for images and {for_sequences} for '
            f'sequences{hint}')


def parse_model_name(name: str) -> Tuple[str, str]:
    """Return the source of a model, ``hf-hub`` or ``local-dir``, and its name there; '' for timm's own names."""
    source, _, rest = name.partition(':')
    return (source, rest) if rest else ('', name)


def create_model(name: Optional[str], pretrained: bool = False, **kwargs: Any) -> Any:
    """Create a model by ``timm.create_model``, or by ``create_sequence_model`` if timm has none of this name.

    Raises:
        ValueError: If there is no such model, it does not accept the arguments, has no pretrained weights, or cannot be
            downloaded.
    """
    if name is None:
        raise ValueError('--model is needed, e.g. smpconv_t, or smpconv_sdigits for sequences')
    check_model_name(name)
    source, repo = parse_model_name(name)
    if source == 'hf-hub':  # timm fetches the file as well, with other errors
        hub_download.download_verified(repo, 'config.json')
    try:
        if name not in list_sequence_models():
            return timm.create_model(name, pretrained=pretrained, **kwargs)
        if pretrained:
            raise ValueError('there are no pretrained weights except in files: --checkpoint, --initial-checkpoint')
        return create_sequence_model(name, **kwargs)
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'{name} cannot be created: {first_line(error)}') from error


class CheckpointedModel(NamedTuple):
    """Model in a checkpoint file, not created yet.

    Attributes:
        path: Path of the file.
        name: Name of the model.
        kwargs: Described arguments of its constructor.
        described: Description in the file.
        state_dict: Weights in the file.
        weights_key: Key of the weights in the file, '' for a bare state dict.
    """
    path: str
    name: str
    kwargs: Dict[str, Any]
    described: Description
    state_dict: Dict[str, Tensor]
    weights_key: str

    def create(self, kwargs: Dict[str, Any]) -> Any:
        """Create the model with its weights, after a check that takes no memory for the model.

        Args:
            kwargs: Arguments of the constructor, in place of the described ones.

        Raises:
            ValueError: If there is no such network, or the weights are another network's.
        """
        check_model_name(self.name)
        try:
            check_network(self.name, kwargs, self.state_dict)
        except ValueError as error:
            trained = self.described.arguments.get('model')
            suffix = f'; it was trained as {checkpoint.printable(trained)}' if isinstance(trained, str) else ''
            raise ValueError(f'{self.path}: {error}{architecture_hint(self.state_dict)}{suffix}') from error
        model = create_model(self.name, **kwargs)
        load_weights(model, self.state_dict, self.path)
        return model


def open_checkpoint(path: str, name: Optional[str] = None, use_ema: bool = True) -> CheckpointedModel:
    """Read a checkpoint, and find out which model it holds.

    Args:
        path: Path of a checkpoint of ours, of timm or of the original release.
        name: Name of the model, by default the described one, otherwise that of the model that the weights fit; it may
            be of a repository or a folder.
        use_ema: Prefer the EMA weights.

    Raises:
        ValueError: If the file is no checkpoint, or no known model is named and the weights fit none of this package.
    """
    loaded = checkpoint.load_file(path)
    described = checkpoint.describe(loaded, path)
    state_dict, key = select_weights(loaded, path, use_ema)
    if name is None:
        name = described.model
        if name is None or not (timm.is_model(name) or name in list_sequence_models()):
            match = identify(state_dict)
            if match is None:
                found = f'names {checkpoint.shown(name)}, no model of this package or of timm' if name else (
                    'names no model')
                raise ValueError(f'{path} {found}: --model is needed, e.g. smpconv_t')
            kwargs = {'num_classes': match.num_classes, 'in_chans': match.in_chans}
            return CheckpointedModel(path, match.name, kwargs, described, state_dict, key)
    return CheckpointedModel(path, name, described.model_kwargs, described, state_dict, key)


def select_weights(loaded: Any, path: str, use_ema: bool = True) -> Tuple[Dict[str, Tensor], str]:
    """Return :func:`.checkpoint.select_state_dict` of a file; an error names the path."""
    try:
        return checkpoint.select_state_dict(loaded, use_ema)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


def load_weights(model: nn.Module, state_dict: Dict[str, Tensor], path: str) -> None:
    """Load weights, ours, timm's or the original release's, into a model that must fit them exactly.

    Args:
        model: Model to load into.
        state_dict: Weights from :func:`select_weights`.
        path: Path of the file, for messages.

    Raises:
        ValueError: If the weights are another model's, which is named if it is one of this package.
    """
    try:
        model.load_state_dict(checkpoint.convert_and_check(state_dict, model))
    except ValueError as error:
        raise ValueError(f'{path}: {error}{architecture_hint(state_dict)}') from error
