"""The device and the model that the arguments ask for."""
from argparse import Namespace
from contextlib import AbstractContextManager
from typing import Any, Dict, Optional, Tuple

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


def select_device(name: Optional[str], local_rank: Optional[int] = None) -> torch.device:
    """The device named, or the GPU if there is one, else the CPU.

    Args:
        name: As PyTorch names it.
        local_rank: Of several processes, each of which takes the GPU of its number.

    Raises:
        ValueError: It isn't there.
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


def autocast(args: Namespace, device: torch.device) -> AbstractContextManager:
    """Automatic mixed precision as the arguments ask for it."""
    return torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype), enabled=args.amp)


def memory_format(args: Namespace) -> torch.memory_format:
    """The images' layout as the arguments ask for it."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


def model_arguments(args: Namespace, defaults: Dict[str, Any]) -> Dict[str, Any]:
    """What the arguments say of the model's constructor, over ``defaults`` where they leave it open.

    Raises:
        ValueError: They contradict each other.
    """
    in_chans = args.in_chans
    if args.input_size is not None:
        if in_chans not in (None, args.input_size[0]):
            raise ValueError(f'--in-chans {in_chans} contradicts --input-size {args.input_size}')
        in_chans = args.input_size[0]
        if args.img_size is not None and args.input_size[1:] != [args.img_size] * 2:
            raise ValueError(f'--img-size {args.img_size} contradicts --input-size {args.input_size}')
    counts = {'num_classes': args.num_classes, 'in_chans': in_chans}
    check_options_agree(args.model_kwargs, {name: value for name, value in counts.items() if value is not None})
    given = {**counts, 'img_size': _fixed_size(args), **args.model_kwargs}
    return {**defaults, **{key: value for key, value in given.items() if value is not None}}


def check_options_agree(model_kwargs: Dict[str, Any], given: Dict[str, Any]) -> None:
    """Raises ValueError where ``--model-kwargs`` has another value than the one that an option gives an argument."""
    for name, value in given.items():
        if model_kwargs.get(name, value) != value:
            raise ValueError(
                f'--model-kwargs {name}={model_kwargs[name]} contradicts {value}, which an option gives it')


def _fixed_size(args: Namespace) -> Optional[Tuple[int, int]]:
    """The images' size for a model that is made for one (ViT); None for the others, and where none was given."""
    cfg = timm.get_pretrained_cfg(args.model) if args.model and timm.is_model(args.model) else None
    if cfg is None or not cfg.fixed_input_size:
        return None
    if args.input_size is not None:
        return tuple(args.input_size[1:])
    return None if args.img_size is None else (args.img_size, args.img_size)


def check_name(name: str) -> None:
    """Raises ValueError unless it is a model of timm's or of ours, ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``."""
    source, _ = parse_name(name)
    if source not in _SOURCES and not timm.is_model(name) and name not in list_sequence_models():
        ours, for_sequences = timm.list_models('smpconv*'), list_sequence_models()
        of_hub = f'; hf-hub:{name} is a repository of the Hub'
        hint = of_hub if '/' in name else suggestion_suffix(name, [*ours, *for_sequences])
        raise ValueError(
            f'no model is named {name!r}; this package has {ours} for images and {for_sequences} for sequences{hint}')


# Of models with a configuration of their own, as timm names them.
_SOURCES = ('hf-hub', 'local-dir')


def parse_name(name: str) -> Tuple[str, str]:
    """Where a model is, ``hf-hub`` or ``local-dir``, and what it is called there; '' and the name of timm's own."""
    source, _, where = name.partition(':')
    return (source, where) if where else ('', name)


def create_model(name: Optional[str], **kwargs: Any) -> Any:
    """``timm.create_model``, or ``create_sequence_model`` where timm has no such model; users' mistakes as one line.

    Raises:
        ValueError: No such model, or it doesn't take the arguments, has no pretrained weights, or can't be downloaded.
    """
    if name is None:
        raise ValueError('--model is needed, e.g. smpconv_t, or smpconv_sdigits for sequences')
    check_name(name)
    source, where = parse_name(name)
    if source == 'hf-hub':  # timm fetches it too, with other errors
        hub_download.from_hub(where, 'config.json')
    try:
        if name in list_sequence_models():
            return _create_for_sequences(name, **kwargs)
        return timm.create_model(name, **kwargs)
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'{name} cannot be created: {first_line(error)}') from error


def _create_for_sequences(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
    if pretrained:
        raise ValueError('there are no pretrained weights for it but in files: --checkpoint, --initial-checkpoint')
    return create_sequence_model(name, **kwargs)


def choose_model(
        name: Optional[str], described: Description, state_dict: Dict[str, Tensor], path: str,
) -> Tuple[str, Dict[str, Any]]:
    """Return the name of a checkpoint's model and its constructor's arguments.

    Args:
        name: Name that the user has given, if any; it may be of a repository or a folder.
        described: Description in the checkpoint.
        state_dict: Weights in the checkpoint.
        path: Path of the checkpoint, for messages.

    Returns:
        Given name, otherwise the described one, otherwise that of the model that the weights fit; described arguments.

    Raises:
        ValueError: If no known model is named and the weights fit none of this package.
    """
    if name is not None:
        return name, described.model_kwargs
    name = described.model
    if name is not None and (timm.is_model(name) or name in list_sequence_models()):
        return name, described.model_kwargs
    identity = identify(state_dict)
    if identity is not None:
        return identity.name, {'num_classes': identity.num_classes, 'in_chans': identity.in_chans}
    reason = f'names {checkpoint.shown(name)}, no model of this package or of timm' if name else 'names no model'
    raise ValueError(f'{path} {reason}: --model is needed, e.g. smpconv_t')


def create_for_checkpoint(
        name: str, kwargs: Dict[str, Any], described: Description, state_dict: Dict[str, Tensor], path: str,
) -> Any:
    """Create a model with a checkpoint's weights, after a check that takes no memory for the model.

    Args:
        name: Name of the model.
        kwargs: Arguments of its constructor, the user's over those of the checkpoint.
        described: Description in the checkpoint, for messages.
        state_dict: Weights in the checkpoint, as :func:`select_weights` returns them.
        path: Path of the checkpoint, for messages.

    Raises:
        ValueError: If there is no such network, or the weights are another network's.
    """
    check_name(name)
    try:
        check_network(name, kwargs, state_dict)
    except ValueError as error:
        trained = described.arguments.get('model')
        as_what = f'; it was trained as {checkpoint.printable(trained)}' if isinstance(trained, str) else ''
        raise ValueError(f'{path}: {error}{architecture_hint(state_dict)}{as_what}') from error
    model = create_model(name, **kwargs)
    _load(model, state_dict, path)
    return model


def select_weights(loaded: Any, path: str, use_ema: bool = True) -> Tuple[Dict[str, Tensor], str]:
    """Return :func:`.checkpoint.select_state_dict` of a file; an error names the path."""
    try:
        return checkpoint.select_state_dict(loaded, use_ema)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


def load_weights(model: nn.Module, loaded: Any, path: str, use_ema: bool = True) -> str:
    """Loads a checkpoint's weights, ours, timm's or the original release's, into a model that must fit them exactly.

    Args:
        model: Where to.
        loaded: What was in the file.
        path: The file, for messages.
        use_ema: Prefer the averaged weights.

    Returns:
        The key that the weights were under ('' for a bare state dict).

    Raises:
        ValueError: It is another model's; says which one where that is one of this package.
    """
    state_dict, key = select_weights(loaded, path, use_ema)
    _load(model, state_dict, path)
    return key


def _load(model: nn.Module, state_dict: Dict[str, Tensor], path: str) -> None:
    try:
        model.load_state_dict(checkpoint.adapt(state_dict, model))
    except ValueError as error:
        raise ValueError(f'{path}: {error}{architecture_hint(state_dict)}') from error
