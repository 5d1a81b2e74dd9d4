"""What the ``config.json`` of a repository or folder may ask of a model."""
import inspect
from typing import Any, Callable, Dict, Optional, Set

from torch import nn

from smpconv_models import checkpoint
from smpconv_models.checkpoint import shown
from smpconv_models.checkpoint.description import MAX_COUNT
from smpconv_models.layers import SMPLayer, smp_layers
from smpconv_models.utils.errors import first_line

Network = Callable[..., nn.Module]

# Parameters; blocks.
_MOST_NUMBERS, _MOST_BLOCKS = 2e9, 1000

# Numbers that sampling the kernels takes, by count_sampled. The largest published network, smpconv_speech, takes 3e7 in
# a layer and 3e8 in all.
_MOST_SAMPLED, _MOST_SAMPLED_IN_ALL = 1 << 27, 1 << 30

# Of a constructor's arguments, those that say how a network is made, not which.
_NOT_OF_NETWORK = {'device', 'dtype', 'weight_init'}

# What a constructor may stumble over.
MALFORMED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def is_of_elsewhere(pretrained_cfg: Any) -> bool:
    """Whether it comes from a repository or folder rather than from this package."""
    return isinstance(pretrained_cfg, dict) and pretrained_cfg.get('source') in ('hf-hub', 'local-dir')


def check_configuration(
        network: Network,
        pretrained_cfg: Dict[str, Any],
        pretrained_model_args: Any = None,
        **kwargs: Any,
) -> None:
    """Looks at a configuration before any of it is used.

    Args:
        network: The constructor.
        pretrained_cfg: The configuration's, of the weights.
        pretrained_model_args: The configuration's, of the constructor.
        kwargs: The constructor's, the user's among them.

    Raises:
        ValueError: It has arguments that the constructor hasn't, or values of other types.
    """
    check_names(network, {} if pretrained_model_args is None else pretrained_model_args)
    for name in ('depths', 'dims', 'kernel_sizes'):
        if not _are_counts(kwargs.get(name, ())):
            raise ValueError(f'expected {name} of a number for each stage, got {shown(kwargs[name])}')
    for name in ('points_divisor', 'kernel_size', 'small_kernel_size', 'num_points', 'num_classes', 'in_chans'):
        if not _are_counts([kwargs.get(name, 1)]):
            raise ValueError(f'expected a number as {name}, got {shown(kwargs[name])}')
    size: Any = pretrained_cfg.get('input_size')
    if not _are_counts(size) or len(size) != 3 or not all(size):
        raise ValueError(f'expected the input_size (channels, height, width) of the images, got {shown(size)}')
    if sum(kwargs.get('depths', ())) > _MOST_BLOCKS:
        raise ValueError(f'expected at most {_MOST_BLOCKS} blocks, got depths {shown(kwargs["depths"])}')
    checkpoint.check_model_kwargs(pretrained_model_args or {}, 'model_args')
    checkpoint.check_preparation(pretrained_cfg)


def check_names(network: Network, arguments: Any) -> None:
    """Raises ValueError unless these are arguments of the constructor by name."""
    known = sorted(_arguments(network))
    if not isinstance(arguments, dict) or not set(arguments) <= set(known):
        unknown = sorted(set(arguments) - set(known)) if isinstance(arguments, dict) else arguments
        raise ValueError(f"expected a network's arguments to be of {known}, got {shown(unknown)}")


def described(
        network: Network,
        pretrained_cfg: Dict[str, Any],
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> Any:
    """A configuration's network without memory: on the meta device.

    Args:
        network: The constructor.
        pretrained_cfg: Of the weights; becomes the network's.
        pretrained_cfg_overlay: The user's over it.
        kwargs: The constructor's and others.

    Raises:
        ValueError: It can't be made, or would take any amount of memory.
    """
    pretrained_cfg = {**pretrained_cfg, **(pretrained_cfg_overlay or {})}
    kwargs = {name: value for name, value in kwargs.items() if name in _arguments(network)}
    kwargs.setdefault('in_chans', pretrained_cfg['input_size'][0])
    kwargs.setdefault('num_classes', pretrained_cfg.get('num_classes', 1000))
    try:
        model: Any = network(**kwargs, device='meta')
    except MALFORMED as error:
        raise ValueError(f'there is no network of {shown(kwargs)}: {first_line(error)}') from error
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if numbers > _MOST_NUMBERS:
        raise ValueError(f'expected at most {_MOST_NUMBERS:.0e} numbers, but {shown(kwargs)} takes {numbers:.1e}')
    check_sampled(model)
    model.pretrained_cfg = pretrained_cfg
    return model


def check_sampled(model: nn.Module) -> None:
    """Raise ValueError if sampling the kernels of a network takes too many numbers, in one layer or in all."""
    counts = {layer: count_sampled(layer) for layer in smp_layers(model).values()}
    if not counts:
        return
    largest = max(counts, key=counts.__getitem__)
    if counts[largest] > _MOST_SAMPLED or sum(counts.values()) > _MOST_SAMPLED_IN_ALL:
        raise ValueError(
            f'kernels of side {largest.kernel_size} take {counts[largest]:.1e} numbers and all layers '
            f'{sum(counts.values()):.1e}, expected at most {_MOST_SAMPLED:.1e} and {_MOST_SAMPLED_IN_ALL:.1e}')


def count_sampled(layer: SMPLayer) -> int:
    """Return how many numbers the tents and the kernels of a layer have on its grid."""
    points, dimensions = layer.coords.shape[-2:]
    sets, kernels = layer.coords.numel() // (points * dimensions), layer.weight.numel() // points
    return (sets * points + kernels) * layer.kernel_size ** dimensions


def _arguments(network: Network) -> Set[str]:
    return set(inspect.signature(network).parameters) - _NOT_OF_NETWORK


def _are_counts(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT for value in values)
