"""Any network's depthwise convolutions, put on this package's operation."""
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Tuple, TypeGuard

import torch
from timm.layers import to_2tuple
from torch import nn

from smpconv_models.ops import validate_options

from .conv_norm import DepthwiseConv2d, times, why_not_expressed


@dataclass(frozen=True)
class DepthwiseReport:
    """What :func:`accelerate_depthwise` did, by the names of ``named_modules``; printed, it is a table.

    Args:
        swapped: Modules that were replaced, each under every name it has.
        left: Those that were not, and why. The name of the model itself is ''.
    """

    swapped: Tuple[str, ...]
    left: Dict[str, str]

    def __str__(self) -> str:
        names: Dict[str, List[str]] = {'swapped': list(self.swapped)} if self.swapped else {}
        for name, reason in self.left.items():
            names.setdefault(f'left: {reason}', []).append(name or '(the model)')
        width = max(map(len, names), default=0)
        rows = [f'{len(group):>5}  {outcome:<{width}}  {_abbreviated(group)}' for outcome, group in names.items()]
        return '\n'.join(rows) or 'no depthwise nn.Conv2d'


def accelerate_depthwise(model: nn.Module, *, min_kernel_size: int = 7, backend: str = 'auto') -> DepthwiseReport:
    """Replaces every depthwise ``nn.Conv2d`` that the operation can express by :class:`DepthwiseConv2d`, in place.

    The parameters stay the same objects, so optimizers, averages and tied weights stay valid; so do the training flag,
    the state dict's keys, device, dtype and memory layout. A module that occurs under several names is replaced by one
    object. What is a :class:`DepthwiseConv2d` already isn't touched, so a second call finds nothing to do.

    Depthwise means one group for each of at least two channels; a convolution of one channel is an ordinary one. It is
    replaced if it has stride 1, an odd kernel, "same" zero padding (as a number or by name), as many outputs as inputs,
    and nothing that a replacement would lose: hooks, a method or state of its own, a weight that is no plain floating
    ``nn.Parameter``, a subclass's behaviour (so parametrized and lazy convolutions stay; run a lazy model once first).
    ScriptModules can't be changed from within: accelerate before scripting. Who holds a replaced module otherwise than
    as a submodule keeps the old one, which still works with the same parameters.

    Args:
        model: A network of any device, meta too. Give one that wraps it if the convolution is all there is.
        min_kernel_size: Kernels whose larger side is below are left to PyTorch.
        backend: As in :func:`smpconv_models.ops.depthwise_conv2d`.

    Returns:
        The names that were replaced, and those that were not with all reasons.

    Raises:
        ValueError: ``model`` is no module or a depthwise convolution itself, ``min_kernel_size`` is no positive whole
            number, or ``backend`` is unknown. Nothing has been changed then.

    Numerics:
        The operation's: ``conv2d`` but for the order of summation. Inputs must be ``(N, C, H, W)``; an unbatched
        ``(C, H, W)``, which ``nn.Conv2d`` takes, raises ValueError.
    """
    _check_arguments(model, min_kernel_size, backend)
    swapped: Dict[str, nn.Conv2d] = {}
    left: Dict[str, str] = {}
    for name, module in _named_modules(model):
        if isinstance(module, torch.jit.ScriptModule):
            left[name] = 'a ScriptModule'
        elif _is_depthwise(module):
            if reasons := list(_why_not(module, min_kernel_size)):
                left[name] = ', '.join(reasons)
            else:
                swapped[name] = module
    layers = {conv: _replacement(conv, backend) for conv in set(swapped.values())}
    for name, conv in swapped.items():
        model.set_submodule(name, layers[conv])
    return DepthwiseReport(tuple(swapped), left)


def _check_arguments(model: Any, min_kernel_size: Any, backend: str) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f'model must be a torch.nn.Module, got {type(model).__name__}')
    if _is_depthwise(model):
        raise ValueError(
            f'model must be a network around the convolution, got the {type(model).__name__} itself, which cannot be '
            'replaced in place; give nn.Sequential(conv)')
    if type(min_kernel_size) is not int or min_kernel_size < 1:
        raise ValueError(f'min_kernel_size must be a whole number of at least 1, got {min_kernel_size!r}')
    validate_options(1, backend)


def _named_modules(module: nn.Module, name: str = '') -> Iterator[Tuple[str, nn.Module]]:
    """Every module under each of its names, as ``named_modules`` but not into ScriptModules."""
    yield name, module
    if not isinstance(module, torch.jit.ScriptModule):
        for child_name, child in module._modules.items():
            if child is not None:
                yield from _named_modules(child, f'{name}.{child_name}' if name else child_name)


def _is_depthwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    if not isinstance(module, nn.Conv2d) or isinstance(module, DepthwiseConv2d):
        return False
    channels = module.in_channels or module.out_channels  # a lazy one doesn't know its input yet
    return module.groups == channels > 1


def _why_not(conv: nn.Conv2d, min_kernel_size: int) -> Iterator[str]:
    """All reasons against replacing a depthwise convolution."""
    if type(conv) is not nn.Conv2d:
        yield f'{type(conv).__name__}, not nn.Conv2d itself'
        return
    yield from why_not_expressed(conv)
    if max(conv.kernel_size) < min_kernel_size:
        yield f'kernel {times(conv.kernel_size)} below {min_kernel_size}'
    yield from _what_would_be_lost(conv)


def _what_would_be_lost(conv: nn.Conv2d) -> Iterator[str]:
    """What somebody has added to it and a new module wouldn't have."""
    for name, value in vars(conv).items():
        if name.endswith('_hooks') and value:
            yield name.strip('_').replace('_', ' ')
        elif hasattr(nn.Conv2d, name):  # forward replaced by assignment, or compiled by itself
            yield f'{name} of its own'
    if {*conv._parameters, *conv._buffers, *conv._modules} != {'weight', 'bias'}:
        yield 'state other than weight and bias'
    for parameter in conv.parameters():
        if type(parameter) is not nn.Parameter:  # sharded or quantized
            yield f'parameter of type {type(parameter).__name__}'
        elif not parameter.is_floating_point():
            yield f'parameter of dtype {parameter.dtype}'


def _replacement(conv: nn.Conv2d, backend: str) -> DepthwiseConv2d:
    layer = DepthwiseConv2d(
        conv.in_channels, conv.out_channels, to_2tuple(conv.kernel_size), padding='same',
        dilation=to_2tuple(conv.dilation), groups=conv.groups, bias=conv.bias is not None, device='meta',
        backend=backend,
    )
    layer.weight, layer.bias = conv.weight, conv.bias
    layer.padding = conv.padding  # code that fuses convolutions may do arithmetic with it
    # marks that others set, such as that the weights are initialized
    vars(layer).update({name: value for name, value in vars(conv).items() if name not in vars(layer)})
    return layer.train(conv.training)


def _abbreviated(names: List[str]) -> str:
    return ', '.join(names if len(names) <= 2 else [names[0], '...', names[-1]])
