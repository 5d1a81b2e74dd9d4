"""Checks of a network that a file describes, before it takes memory or time."""
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Dict, get_type_hints

import timm
import torch
from timm.models import model_entrypoint
from torch import Tensor
from torch.nn.modules import module as hooks

from smpconv_models import checkpoint
from smpconv_models.utils.errors import first_line

from ._config_validation import MALFORMED, check_names, check_sampled
from .sequence import SMPSequenceNet, create_sequence_model, list_sequence_models


def check_arguments(name: str, arguments: Any) -> None:
    """Raise ValueError unless these are arguments of the network's constructor, by name and bounded.

    Args:
        name: One of this package's models.
        arguments: Keyword arguments that a file gives.
    """
    network = SMPSequenceNet if name in list_sequence_models() else get_type_hints(model_entrypoint(name))['return']
    check_names(network, arguments)
    checkpoint.check_model_kwargs(arguments, 'model_args')


def check_network(name: str, kwargs: Dict[str, Any], state_dict: Dict[str, Tensor]) -> None:
    """Raise ValueError unless a network exists and its weights have these names and shapes.

    The network is built without memory for its parameters, and given up as soon as it outgrows the weights.

    Args:
        name: Name of a model, this package's or timm's.
        kwargs: Arguments of its constructor, some of them from a file.
        state_dict: Weights that the network is for, by the original release's names or ours.
    """
    if checkpoint.is_original(state_dict):
        state_dict = checkpoint.convert_original(state_dict)
    try:
        with torch.device('meta'), _bounded(state_dict):
            if name in list_sequence_models():
                model: Any = create_sequence_model(name, **kwargs)
            else:
                model = timm.create_model(name, **kwargs)
        check_sampled(model)
    except MALFORMED as error:
        raise ValueError(f'{name} cannot be created: {first_line(error)}') from error
    checkpoint.adapt(state_dict, model)


@contextmanager
def _bounded(state_dict: Dict[str, Tensor]) -> Iterator[None]:
    """Raise ValueError while a network is built that has many more numbers or modules than a state dict."""
    # some buffers are in no state dict, and some modules have no parameters
    left = {'numbers': 2 * sum(value.numel() for value in state_dict.values()) + 10 ** 7,
            'modules': 20 * len(state_dict) + 1000}

    own = threading.get_ident()

    def take(kind: str, count: int) -> None:
        if threading.get_ident() != own:  # PyTorch's hooks are of the process: another thread may build a network
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
