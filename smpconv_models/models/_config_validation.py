"""Checks of networks that a file describes, before they take memory or time.

A file is the ``config.json`` of a repository or folder (:func:`validate_config`), or a checkpoint
(:func:`check_arguments`, :func:`check_network`).
"""
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable, Dict, Optional, Set, get_type_hints

import timm
import torch
from timm.models import model_entrypoint
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from smpconv_models import checkpoint
from smpconv_models.checkpoint import shown
from smpconv_models.checkpoint.description import MAX_COUNT
from smpconv_models.layers import SMPLayer, smp_layers
from smpconv_models.utils.errors import first_line

from .sequence import SMPSequenceNet, create_sequence_model, list_sequence_models

ModelCtor = Callable[..., nn.Module]

_MAX_PARAMETERS, _MAX_BLOCKS = 2e9, 1000

# Numbers that sampling the kernels takes, by _count_sampled. The largest published network, smpconv_speech, takes 3e7
# in a layer and 3e8 in all.
_MAX_SAMPLED, _MAX_SAMPLED_IN_ALL = 1 << 27, 1 << 30

# Arguments of a constructor that do not describe the network.
_NOT_OF_NETWORK = {'device', 'dtype', 'weight_init'}

# Errors that constructors raise on malformed arguments.
_MALFORMED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def is_external_cfg(pretrained_cfg: Any) -> bool:
    """Return whether a config comes from a repository or folder, not from this package."""
    return isinstance(pretrained_cfg, dict) and pretrained_cfg.get('source') in ('hf-hub', 'local-dir')


def validate_config(
        model_cls: ModelCtor, pretrained_cfg: Dict[str, Any], pretrained_model_args: Any = None, **kwargs: Any) -> None:
    """Validate a config before any of it is used; ``kwargs`` are the constructor's arguments, the user's among them.

    Raises:
        ValueError: The config has arguments that the constructor lacks, or values of other types.
    """
    _check_names(model_cls, {} if pretrained_model_args is None else pretrained_model_args)
    for name in ('depths', 'dims', 'kernel_sizes'):
        if not _are_counts(kwargs.get(name, ())):
            raise ValueError(f'expected {name} of a number for each stage, got {shown(kwargs[name])}')
    for name in ('points_divisor', 'kernel_size', 'small_kernel_size', 'num_points', 'num_classes', 'in_chans'):
        if not _are_counts([kwargs.get(name, 1)]):
            raise ValueError(f'expected a number as {name}, got {shown(kwargs[name])}')
    size: Any = pretrained_cfg.get('input_size')
    if not _are_counts(size) or len(size) != 3 or not all(size):
        raise ValueError(f'expected the input_size (channels, height, width) of the images, got {shown(size)}')
    if sum(kwargs.get('depths', ())) > _MAX_BLOCKS:
        raise ValueError(f'expected at most {_MAX_BLOCKS} blocks, got depths {shown(kwargs["depths"])}')
    checkpoint.check_model_kwargs(pretrained_model_args or {}, 'model_args')
    checkpoint.check_preparation(pretrained_cfg)


def check_arguments(name: str, arguments: Any) -> None:
    """Raise ValueError unless these are arguments of the network's constructor, by name and bounded.

    Args:
        name: Name of a model of this package.
        arguments: Keyword arguments that a file gives.
    """
    is_sequence_model = name in list_sequence_models()
    _check_names(SMPSequenceNet if is_sequence_model else get_type_hints(model_entrypoint(name))['return'], arguments)
    checkpoint.check_model_kwargs(arguments, 'model_args')


def _check_names(model_cls: ModelCtor, arguments: Any) -> None:
    known = sorted(_parameters(model_cls))
    if not isinstance(arguments, dict) or not set(arguments) <= set(known):
        unknown = sorted(set(arguments) - set(known)) if isinstance(arguments, dict) else arguments
        raise ValueError(f"expected a network's arguments to be of {known}, got {shown(unknown)}")


def build_on_meta(
        model_cls: ModelCtor, pretrained_cfg: Dict[str, Any], pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        **kwargs: Any) -> Any:
    """Build a config's network on the meta device, where it takes no memory; arguments of others are ignored.

    Raises:
        ValueError: The network cannot be built, or would take any amount of memory.
    """
    pretrained_cfg = {**pretrained_cfg, **(pretrained_cfg_overlay or {})}
    kwargs = {name: value for name, value in kwargs.items() if name in _parameters(model_cls)}
    kwargs.setdefault('in_chans', pretrained_cfg['input_size'][0])
    kwargs.setdefault('num_classes', pretrained_cfg.get('num_classes', 1000))
    try:
        model: Any = model_cls(**kwargs, device='meta')
    except _MALFORMED as error:
        raise ValueError(f'there is no network of {shown(kwargs)}: {first_line(error)}') from error
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > _MAX_PARAMETERS:
        raise ValueError(f'expected at most {_MAX_PARAMETERS:.0e} numbers, but {shown(kwargs)} takes {count:.1e}')
    _check_sampled(model)
    model.pretrained_cfg = pretrained_cfg
    return model


def check_network(name: str, kwargs: Dict[str, Any], state_dict: Dict[str, Tensor]) -> None:
    """Raise ValueError unless a network exists and its weights have these names and shapes.

    The network is built without memory for its parameters, and the build stops once it outgrows the weights.

    Args:
        name: Name of a model, this package's or timm's.
        kwargs: Arguments of its constructor, some of them from a file.
        state_dict: Weights of the network, by the original release's names or ours.
    """
    if checkpoint.is_original(state_dict):
        state_dict = checkpoint.convert_original(state_dict)
    try:
        with torch.device('meta'), _bounded(state_dict):
            if name in list_sequence_models():
                model: Any = create_sequence_model(name, **kwargs)
            else:
                model = timm.create_model(name, **kwargs)
        _check_sampled(model)
    except _MALFORMED as error:
        raise ValueError(f'{name} cannot be created: {first_line(error)}') from error
    checkpoint.convert_and_check(state_dict, model)


@contextmanager
def _bounded(state_dict: Dict[str, Tensor]) -> Iterator[None]:
    """Raise ValueError while a network is built that has many more numbers or modules than a state dict."""
    # some buffers are in no state dict, and some modules have no parameters
    left = {'numbers': 2 * sum(value.numel() for value in state_dict.values()) + 10 ** 7,
            'modules': 20 * len(state_dict) + 1000}
    own = threading.get_ident()

    def take(kind: str, count: int) -> None:
        if threading.get_ident() != own:  # the hooks are global: another thread may build a network
            return
        left[kind] -= count
        if left[kind] < 0:
            raise ValueError(f'the network has many more {kind} than the weights')

    def take_tensor(module: Any, tensor_name: str, tensor: Any) -> None:
        if isinstance(tensor, Tensor):
            take('numbers', tensor.numel())

    handles = [
        hooks.register_module_parameter_registration_hook(take_tensor),
        hooks.register_module_buffer_registration_hook(take_tensor),
        hooks.register_module_module_registration_hook(lambda *_: take('modules', 1))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_sampled(model: nn.Module) -> None:
    """Raise ValueError if sampling the kernels of a network takes too many numbers, in one layer or in all."""
    counts = {layer: _count_sampled(layer) for layer in smp_layers(model).values()}
    if not counts:
        return
    largest = max(counts, key=counts.__getitem__)
    if counts[largest] > _MAX_SAMPLED or sum(counts.values()) > _MAX_SAMPLED_IN_ALL:
        raise ValueError(
            f'kernels of side {largest.kernel_size} take {counts[largest]:.1e} numbers and all layers '
            f'{sum(counts.values()):.1e}, expected at most {_MAX_SAMPLED:.1e} and {_MAX_SAMPLED_IN_ALL:.1e}')


def _count_sampled(layer: SMPLayer) -> int:
    """Return how many numbers the tents and the kernels of a layer have on its grid."""
    points, dimensions = layer.coords.shape[-2:]
    sets, kernels = layer.coords.numel() // (points * dimensions), layer.weight.numel() // points
    return (sets * points + kernels) * layer.kernel_size ** dimensions


def _parameters(model_cls: ModelCtor) -> Set[str]:
    return set(inspect.signature(model_cls).parameters) - _NOT_OF_NETWORK


def _are_counts(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT for value in values)
