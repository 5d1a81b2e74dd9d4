"""From the user's arguments to a model of timm's, with pretrained weights or without; the same for all families."""
from typing import Any, Callable, Dict, Sequence, Union

from timm.models import build_model_with_cfg
from torch import Tensor

from smpconv_models import checkpoint

from ._config_validation import Network, check_configuration, described, is_of_elsewhere
from ._pretrained import NO_WEIGHTS, LocalWeights, local_weights
from .identify import architecture_hint

StateDict = Dict[str, Tensor]


def create(
        network: Network,
        variant: str,
        pretrained: bool,
        model_args: Dict[str, Any],
        filter_fn: Callable[[StateDict, Any], StateDict],
        wished: Dict[str, Any],
        for_weights: Callable[[LocalWeights], Dict[str, Any]] = lambda weights: {},
) -> Any:
    """A variant, looked at before it takes memory where a repository or folder describes it.

    Args:
        network: The constructor, with ``first_convs``; see :func:`adapt`.
        variant: The model's name.
        pretrained: Whether to load weights.
        model_args: The variant's arguments.
        filter_fn: timm's ``pretrained_filter_fn``.
        wished: What comes before those: the user's arguments, and those of a repository's configuration.
        for_weights: Further arguments with which the weights load.

    Raises:
        ValueError: The configuration, the arguments or the weights can't be.
    """
    kwargs = {**model_args, **wished, 'pretrained_filter_fn': filter_fn}
    is_checked = is_of_elsewhere(kwargs.get('pretrained_cfg'))
    if is_checked:
        check_configuration(network, **kwargs)
    weights = NO_WEIGHTS
    if pretrained:
        weights = local_weights(variant, **kwargs)
        kwargs.update(
            pretrained_cfg_overlay=weights.overlay, pretrained_filter_fn=weights.checked(filter_fn),
            **for_weights(weights))
    if is_checked:
        model = described(network, **kwargs)
        with weights.named():
            adapt(weights.state_dict or model.state_dict(), model)
    num_stages = len(kwargs['depths'])
    if kwargs.get('features_only'):
        kwargs.setdefault('num_classes', 0)  # features have no use for a classifier, nor for a file's
        _check_out_indices(kwargs.get('out_indices'), num_stages)
    return build_model_with_cfg(
        network, variant, pretrained,
        feature_cfg=dict(out_indices=tuple(range(num_stages)), flatten_sequential=True),
        **kwargs,
    )


def adapt(state_dict: StateDict, model: Any) -> StateDict:
    """A state dict of the original release or of ours by our names, after a check that it is the model's.

    Where the model differs from its ``pretrained_cfg`` in classes or input channels, the classifier and the weights
    named in ``model.first_convs`` may differ.

    Raises:
        ValueError: It is another model's; says which one where that is one of this package.
    """
    cfg = getattr(model, 'pretrained_cfg', {})
    ignored = []
    if model.in_chans != cfg.get('input_size', (model.in_chans,))[0]:
        ignored += model.first_convs
    if model.num_classes != cfg.get('num_classes', model.num_classes):
        ignored += ['head.fc.weight', 'head.fc.bias']
    try:
        return checkpoint.adapt(state_dict, model, ignore=ignored)
    except ValueError as error:
        raise ValueError(f'{error}{architecture_hint(state_dict)}') from error


def _check_out_indices(out_indices: Union[int, Sequence[int], None], num_stages: int) -> None:
    if out_indices is None:
        return
    if isinstance(out_indices, int):
        if not 1 <= out_indices <= num_stages:
            raise ValueError(f'out_indices as a number of last stages must lie in [1, {num_stages}], got {out_indices}')
    elif any(not -num_stages <= index < num_stages for index in out_indices):
        raise ValueError(
            f'out_indices must lie in [{-num_stages}, {num_stages - 1}], got {tuple(out_indices)}')
