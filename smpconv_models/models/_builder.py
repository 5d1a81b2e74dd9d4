"""From the user's arguments to a timm model with or without pretrained weights, for all families.

Also: which registered model a state dict belongs to, and which sizes a checkpoint's kernels were trained at.
"""
import math
from functools import lru_cache
from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence, Union

import timm
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from smpconv_models import checkpoint
from smpconv_models.layers.checks import check_odd

from ._config_validation import ModelCtor, build_on_meta, is_external_cfg, validate_config
from ._pretrained import NO_WEIGHTS, ResolvedWeights, resolve_weights

StateDict = Dict[str, Tensor]


def build_model(
        model_cls: ModelCtor, variant: str, pretrained: bool, model_args: Dict[str, Any],
        filter_fn: Callable[[StateDict, Any], StateDict], overrides: Dict[str, Any],
        args_for_weights: Callable[[ResolvedWeights], Dict[str, Any]] = lambda weights: {}) -> Any:
    """Build a variant; one that a repository or folder describes is validated before it takes memory.

    Args:
        model_cls: Constructor, with ``first_convs``; see :func:`convert_state_dict`.
        overrides: User and config arguments; they take precedence over ``model_args``.
        args_for_weights: Function that returns further arguments with which the weights load.

    Raises:
        ValueError: The config, the arguments or the weights are invalid.
    """
    kwargs = {**model_args, **overrides, 'pretrained_filter_fn': filter_fn}
    is_external = is_external_cfg(kwargs.get('pretrained_cfg'))
    if is_external:
        validate_config(model_cls, **kwargs)
    weights = NO_WEIGHTS
    if pretrained:
        weights = resolve_weights(variant, **kwargs)
        kwargs.update(
            pretrained_cfg_overlay=weights.overlay, pretrained_filter_fn=weights.verifying(filter_fn),
            **args_for_weights(weights))
    if is_external:
        model = build_on_meta(model_cls, **kwargs)
        with weights.error_context():
            convert_state_dict(weights.state_dict or model.state_dict(), model)
    num_stages = len(kwargs['depths'])
    if kwargs.get('features_only'):
        kwargs.setdefault('num_classes', 0)  # features need no classifier, and none of a file's
        _check_out_indices(kwargs.get('out_indices'), num_stages)
    return build_model_with_cfg(
        model_cls, variant, pretrained,
        feature_cfg=dict(out_indices=tuple(range(num_stages)), flatten_sequential=True),
        **kwargs,
    )


def convert_state_dict(state_dict: StateDict, model: Any) -> StateDict:
    """Convert a state dict in the original release's names or ours to our names, and check that it fits the model.

    If the model differs from its ``pretrained_cfg`` in classes or input channels, the classifier and the weights
    named in ``model.first_convs`` may differ.

    Raises:
        ValueError: The state dict is of another model; the message names the model if it is one of this package.
    """
    cfg = getattr(model, 'pretrained_cfg', {})
    ignored = []
    if model.in_chans != cfg.get('input_size', (model.in_chans,))[0]:
        ignored += model.first_convs
    if model.num_classes != cfg.get('num_classes', model.num_classes):
        ignored += ['head.fc.weight', 'head.fc.bias']
    try:
        return checkpoint.convert_and_check(state_dict, model, ignore=ignored)
    except ValueError as error:
        raise ValueError(f'{error}{architecture_hint(state_dict)}') from error


def _check_out_indices(out_indices: Union[int, Sequence[int], None], num_stages: int) -> None:
    if out_indices is None:
        return
    if isinstance(out_indices, int):
        if not 1 <= out_indices <= num_stages:
            raise ValueError(f'out_indices as a number of last stages must lie in [1, {num_stages}], got {out_indices}')
    elif any(not -num_stages <= index < num_stages for index in out_indices):
        raise ValueError(f'out_indices must lie in [{-num_stages}, {num_stages - 1}], got {tuple(out_indices)}')


# --- identification ---


class ArchitectureMatch(NamedTuple):
    """Registered model with the arguments that follow from the weights."""
    name: str
    num_classes: int
    in_chans: int

    def __str__(self) -> str:
        return f'{self.name} with {self.num_classes} classes and {self.in_chans} input channels'


def architecture_hint(state_dict: StateDict) -> str:
    """Return which registered model a state dict fits, to be appended to an error message; '' if it fits none."""
    found = identify(state_dict)
    return f'; the weights fit {found}' if found else ''


def identify(state_dict: StateDict) -> Optional[ArchitectureMatch]:
    """Return the registered model that a state dict fits exactly, by names and shapes; None if there is none.

    Args:
        state_dict: Weights by the original release's names or ours, without wrappers' prefixes.
    """
    state_dict = _by_our_names(state_dict)
    head = state_dict.get('head.fc.weight')
    stem = state_dict.get('stem.0.conv.weight', state_dict.get('stem.large.conv.weight'))
    if head is None or stem is None or head.ndim != 2 or stem.ndim < 3:
        return None
    for name in timm.list_models('smpconv*'):
        match = ArchitectureMatch(name, len(head), stem.shape[1])
        if checkpoint.describe_mismatch(state_dict, _on_meta(match)) is None:
            return match
    return None


@lru_cache(maxsize=32)  # a model takes up to half a second
def _on_meta(match: ArchitectureMatch) -> nn.Module:
    return timm.create_model(match.name, num_classes=match.num_classes, in_chans=match.in_chans, device='meta')


def _by_our_names(state_dict: StateDict) -> StateDict:
    return checkpoint.convert_original(state_dict) if checkpoint.is_original(state_dict) else state_dict


# --- kernel sizes ---


def infer_kernel_scale(
        weights: StateDict, default_sizes: Sequence[int], kernel_sizes: Sequence[int], points_divisor: int,
        kernel_scale: Union[float, Sequence[float]] = 1., **kwargs: Any) -> Dict[str, Any]:
    """Return the arguments with which kernels of other sizes than the weights' are sampled from the weights' points.

    Args:
        weights: State dict, by the original release's names or ours.
        default_sizes: Kernel sizes of the model without the user's arguments.
        kernel_sizes: Kernel sizes that the user asks for, of each stage.
        kernel_scale: Argument of the constructor; must be 1 if the sizes differ from the weights'.

    Raises:
        ValueError: The sizes are even, or differ from the weights' and a scale is given too.
    """
    for size in kernel_sizes:
        check_odd(size)
    weights = _by_our_names(weights)
    points: list = []  # of the kernels of each stage
    while (name := f'stages.{len(points)}.blocks.0.mixer.large_kernel.large.conv.coords') in weights:
        points.append(len(weights[name]))
    if list(kernel_sizes) == list(default_sizes) or len(kernel_sizes) != len(points) or points_divisor < 1:
        return {}
    # the smallest odd sides of kernels with this number of points
    smallest = [(math.isqrt(max(count * points_divisor, 1) - 1) + 1) | 1 for count in points]
    trained = next(
        (sizes for sizes in (kernel_sizes, default_sizes, smallest)
         if [size ** 2 // points_divisor for size in sizes] == points), None)
    if trained is None or list(trained) == list(kernel_sizes):  # loading reports weights that do not fit
        return {}
    if kernel_scale != 1:
        raise ValueError(f'kernel_sizes {kernel_sizes} contradict kernel_scale: the weights have {trained}')
    return {
        'kernel_sizes': trained,
        'kernel_scale': [(size - 1) / max(base - 1, 1) for size, base in zip(kernel_sizes, trained)],
    }
