"""Effective values of tensors that PyTorch computes from others: pruned, normed and parametrized ones."""
import logging
from typing import Any, Optional, Union

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_logger = logging.getLogger(__name__)

_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)


def refresh_(module: nn.Module, name: Optional[str] = None) -> None:
    """Recompute the tensors of ``module`` that pruning, weight norm or spectral norm recompute before each forward.

    Args:
        module: Any module.
        name: Attribute name of one tensor; by default all of them.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _HOOKS) and name in (None, _tensor_name(hook)):
            hook(module, None)


def _tensor_name(hook: Any) -> str:
    return hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name


def unparametrized_type(module: nn.Module) -> type:
    """Return the class of ``module`` without the subclass that ``torch.nn.utils.parametrize`` gives it."""
    return type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)


@torch.no_grad()
def plain_conv(conv: nn.Module) -> Optional[Union[nn.Conv1d, nn.Conv2d]]:
    """Return the convolution with its effective weight and bias as ordinary parameters.

    Returns:
        ``conv`` itself if its parameters are ordinary. Otherwise a new module: ``remove_parametrizations`` on a deep
        copy would break the original, as both share a class. None if ``conv`` is no ``nn.Conv1d`` or ``nn.Conv2d``, or
        has modules of its own: an adapter's wrapper, for example.
    """
    if not isinstance(conv, (nn.Conv1d, nn.Conv2d)) or set(conv._modules) - {'parametrizations'}:
        return None
    if set(conv._parameters) == {'weight', 'bias'}:
        return conv
    refresh_(conv)
    is_trained = any(parameter.requires_grad for parameter in conv.parameters())
    kind: Any = unparametrized_type(conv)
    plain = kind.__new__(kind)
    hooks = {
        key: hook for key, hook in conv._forward_pre_hooks.items()
        if not isinstance(hook, _HOOKS)}
    own = {name: value for name, value in vars(conv).items() if name not in ('weight', 'bias')}
    vars(plain).update(
        own, _parameters={}, _buffers={}, _modules={}, _forward_pre_hooks=type(conv._forward_pre_hooks)(hooks))
    for name in ('weight', 'bias'):
        value = getattr(conv, name)
        plain.register_parameter(name, None if value is None else nn.Parameter(value.detach().clone(), is_trained))
    return plain


def warn_not_folded(norm: nn.Module, conv: nn.Module) -> None:
    """Log that ``norm`` stays, because ``conv`` beside it can't be folded into."""
    _logger.warning(
        '%r is not folded: the convolution beside it is a %s.%s, not a plain nn.Conv1d or nn.Conv2d. '
        'Merge or remove what wraps it first.', norm, type(conv).__module__, type(conv).__qualname__)
