"""Replacement of any network's depthwise convolutions by layers that use this package's operation."""
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Tuple, TypeGuard, Union

import torch
from torch import nn

from smpconv_models.ops import validate_options

from .conv_norm import DepthwiseConv1d, DepthwiseConv2d, times, unsupported_arguments


@dataclass(frozen=True)
class DepthwiseReport:
    """Result of :func:`accelerate_depthwise`, by the names of ``named_modules``; printed, it is a table."""

    replaced: Tuple[str, ...]  # names of the modules that were replaced, each under every name that it has
    skipped: Dict[str, str]  # reason for each module that was not replaced; '' names the model itself

    def __str__(self) -> str:
        names: Dict[str, List[str]] = {'replaced': list(self.replaced)} if self.replaced else {}
        for name, reason in self.skipped.items():
            names.setdefault(f'skipped: {reason}', []).append(name or '(the model)')
        width = max(map(len, names), default=0)
        rows = []
        for outcome, group in names.items():
            shown = group if len(group) <= 2 else [group[0], '...', group[-1]]
            rows.append(f'{len(group):>5}  {outcome:<{width}}  {", ".join(shown)}')
        return '\n'.join(rows) or 'no depthwise nn.Conv1d or nn.Conv2d'


_Conv = Union[nn.Conv1d, nn.Conv2d]
_REPLACEMENTS: Dict[type, type] = {nn.Conv1d: DepthwiseConv1d, nn.Conv2d: DepthwiseConv2d}


def accelerate_depthwise(model: nn.Module, *, min_kernel_size: int = 7, backend: str = 'auto') -> DepthwiseReport:
    """Replace a network's depthwise ``nn.Conv1d`` and ``nn.Conv2d`` by this package's layers, in place.

    The parameters stay the same objects, so optimizers, EMA weights and tied weights stay valid. So do the training
    flag, the state dict's keys, device, dtype and memory layout. A module that occurs under several names is replaced
    by one object. :class:`DepthwiseConv1d` and :class:`DepthwiseConv2d` are not touched, so a second call changes
    nothing.

    Depthwise means one group for each of at least two channels; a convolution of one channel is an ordinary one. It is
    replaced if it pads by zeros, has as many outputs as inputs, and nothing that a replacement would lose: hooks, a
    method or state of its own, a weight that is no plain floating ``nn.Parameter``, a subclass's behaviour. So
    parametrized and lazy convolutions stay; run a lazy model once first.
    ScriptModules cannot be changed from within: accelerate before scripting. References to a replaced module other than
    as a submodule keep the old module, which still works with the same parameters.

    Args:
        model: Network on any device, meta too; a single convolution needs a module around it.
        min_kernel_size: Smallest size of a kernel's larger side to replace.
        backend: Name of a backend, see :func:`smpconv_models.depthwise_conv2d`.

    Returns:
        The names that were replaced, and those that were not, with all reasons.

    Raises:
        ValueError: ``model`` is no module or a depthwise convolution itself, ``min_kernel_size`` is no positive whole
            number, or ``backend`` is unknown. The model is unchanged then.

    Numerics:
        The operation's: ``conv2d`` up to the order of summation.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f'model must be a torch.nn.Module, got {type(model).__name__}')
    if _is_depthwise(model):
        raise ValueError(
            f'model must be a network around the convolution, got the {type(model).__name__} itself, which cannot be '
            'replaced in place; give nn.Sequential(conv)')
    if type(min_kernel_size) is not int or min_kernel_size < 1:
        raise ValueError(f'min_kernel_size must be a whole number of at least 1, got {min_kernel_size!r}')
    validate_options(backend=backend)
    replaced: Dict[str, _Conv] = {}
    skipped: Dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.jit.ScriptModule):
            if not any(name.startswith(f'{outer}.' if outer else '') for outer in skipped):  # not those within
                skipped[name] = 'a ScriptModule'
        elif _is_depthwise(module):
            if reasons := list(_blockers(module, min_kernel_size)):
                skipped[name] = ', '.join(reasons)
            else:
                replaced[name] = module
    layers = {conv: _replacement(conv, backend) for conv in set(replaced.values())}
    for name, conv in replaced.items():
        model.set_submodule(name, layers[conv])
    return DepthwiseReport(tuple(replaced), skipped)


def _is_depthwise(module: nn.Module) -> TypeGuard[_Conv]:
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)) or isinstance(module, tuple(_REPLACEMENTS.values())):
        return False
    channels = module.in_channels or module.out_channels  # a lazy convolution does not know its input yet
    return module.groups == channels > 1


def _blockers(conv: _Conv, min_kernel_size: int) -> Iterator[str]:
    """Yield all reasons against replacing a depthwise convolution, and what a new module would lose."""
    if type(conv) not in _REPLACEMENTS:
        plain = next(kind for kind in _REPLACEMENTS if isinstance(conv, kind))
        yield f'{type(conv).__name__}, not nn.{plain.__name__} itself'
        return
    yield from unsupported_arguments(conv)
    if max(conv.kernel_size) < min_kernel_size:
        yield f'kernel {times(conv.kernel_size)} below {min_kernel_size}'
    for name, value in vars(conv).items():
        if name.endswith('_hooks') and value:
            yield name.strip('_').replace('_', ' ')
        elif hasattr(type(conv), name):  # forward replaced by assignment, or compiled separately
            yield f'{name} of its own'
    if {*conv._parameters, *conv._buffers, *conv._modules} != {'weight', 'bias'}:
        yield 'state other than weight and bias'
    for parameter in conv.parameters():
        if type(parameter) is not nn.Parameter:  # sharded or quantized
            yield f'parameter of type {type(parameter).__name__}'
        elif not parameter.is_floating_point():
            yield f'parameter of dtype {parameter.dtype}'


def _replacement(conv: _Conv, backend: str) -> nn.Module:
    layer: Any = _REPLACEMENTS[type(conv)](
        conv.in_channels, conv.out_channels, 1, groups=conv.groups, bias=conv.bias is not None, device='meta',
        backend=backend)
    layer.weight, layer.bias = conv.weight, conv.bias
    # arguments, which may have been set since, and what others set, such as a mark that the weights are initialized
    vars(layer).update({
        name: value for name, value in vars(conv).items()
        if name not in vars(layer) or not isinstance(value, (dict, set))})
    return layer
