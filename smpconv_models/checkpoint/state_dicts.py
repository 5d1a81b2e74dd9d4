"""Weights in a checkpoint, and whether they fit a model."""
import logging
from collections import OrderedDict
from typing import Any, Iterable, List, Optional, Tuple

from torch import Tensor, nn

from .description import printable, shown
from .original import StateDict, convert_original, is_original

_logger = logging.getLogger(__name__)

# In the order in which they are preferred: the published accuracies are those of the EMA weights.
_EMA_KEYS = ('state_dict_ema', 'model_ema')
_MODEL_KEYS = ('state_dict', 'model')
_WRAPPER_PREFIXES = ('_orig_mod.', 'module.')


def select_state_dict(checkpoint: Any, use_ema: Optional[bool] = None) -> Tuple[StateDict, str]:
    """Return the weights in a loaded checkpoint and their key ('' if the checkpoint is itself a state dict).

    The prefixes of wrappers (``module.``, ``_orig_mod.``) are removed from the names.

    Args:
        checkpoint: Value returned by :func:`load_file`.
        use_ema: True for the EMA weights, False for the model's own. By default the EMA weights if there are any and
            the checkpoint does not name the model's own as better.

    Raises:
        ValueError: If there are no such weights in it.
    """
    if not isinstance(checkpoint, dict):
        raise ValueError(f'expected a checkpoint to be a dict, got {type(checkpoint).__name__}')
    if use_ema and not any(checkpoint.get(key) is not None for key in _EMA_KEYS):
        raise ValueError('expected EMA weights, found none: leave out --use-ema')
    if use_ema is None:
        use_ema = checkpoint.get('best_weights') not in _MODEL_KEYS
    keys = (*_EMA_KEYS, *_MODEL_KEYS) if use_ema else _MODEL_KEYS
    # timm's script stores None if there are no EMA weights
    found = next((key for key in keys if key in checkpoint and (checkpoint[key] is not None or key in _MODEL_KEYS)), '')
    state_dict = checkpoint[found] if found else checkpoint
    if not isinstance(state_dict, dict) or not all(isinstance(key, str) for key in state_dict):
        raise ValueError(
            f'expected {found or "a checkpoint"} to be a dictionary of tensors by name, got {shown(state_dict)}')
    cleaned = _unwrap({_strip(key): value for key, value in state_dict.items() if isinstance(value, Tensor)})
    metadata = getattr(state_dict, '_metadata', None)
    if isinstance(metadata, dict):
        cleaned = OrderedDict(cleaned)
        cleaned._metadata = {  # type: ignore[attr-defined]
            _strip(f'{name}.').rstrip('.'): {key: size for key, size in value.items() if type(size) is int}
            for name, value in metadata.items() if isinstance(name, str) and isinstance(value, dict)}
    if not cleaned:
        names = sorted(str(key)[:80] for key in checkpoint)[:8]
        raise ValueError(f'expected a state dict in the checkpoint, found the keys {names}')
    return cleaned, found


def _unwrap(state_dict: StateDict) -> StateDict:
    """Return the weights without what other trainers add to them; the additions are logged in one line."""
    found = []
    if 'n_averaged' in state_dict:
        found.append('the count of torch.optim.swa_utils.AveragedModel is left out')
        state_dict = {key: value for key, value in state_dict.items() if key != 'n_averaged'}
    if state_dict and all(key.startswith('model.') for key in state_dict):
        found.append("Lightning's prefix model. is removed")
        state_dict = {_strip(key.removeprefix('model.')): value for key, value in state_dict.items()}
    averaged = [
        key for key, value in state_dict.items()
        if key.endswith('.num_batches_tracked') and value.is_floating_point() and value.isfinite().all()]
    if averaged:
        found.append('averaged counts of batches (num_batches_tracked) are rounded')
        state_dict = {**state_dict, **{key: state_dict[key].round().long() for key in averaged}}
    if found:
        _logger.warning('checkpoint: %s', '; '.join(found))
    return state_dict


def _strip(key: str) -> str:
    while key.startswith(_WRAPPER_PREFIXES):
        key = key.split('.', 1)[1]
    return key


def describe_mismatch(state_dict: StateDict, model: nn.Module, ignore: Iterable[str] = ()) -> Optional[str]:
    """Return in one line how a state dict differs from a model's; None if it fits.

    Args:
        state_dict: Tensors by our names.
        model: Model that it is meant for.
        ignore: Names that may differ.
    """
    ignored = set(ignore)
    own = model.state_dict()
    expected = {key: tuple(value.shape) for key, value in own.items() if key not in ignored}
    given = {key: tuple(value.shape) for key, value in state_dict.items() if key not in ignored}
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    reshaped = [key for key in expected if key in given and expected[key] != given[key]]
    retyped = [
        key for key, value in own.items()
        if key in given and value.is_floating_point() != state_dict[key].is_floating_point()]
    if retyped and not (missing or unexpected or reshaped):
        dtype = state_dict[retyped[0]].dtype
        return f'{len(retyped)} of {len(expected)} tensors have other numbers ({retyped[0]}: {dtype})'
    if not (missing or unexpected or reshaped):
        return _describe_sizes(state_dict, model)
    examples: List[str] = [f'{key} expected {expected[key]}, got {given[key]}' for key in reshaped[:3]]
    examples += [f'no {key}' for key in missing[:2]] + [f'unknown {printable(key)}' for key in unexpected[:2]]
    return (
        f'{len(missing)} of {len(expected)} tensors missing, {len(unexpected)} unexpected, '
        f'{len(reshaped)} of another shape ({"; ".join(examples[:5])})'
    )


def _describe_sizes(state_dict: StateDict, model: nn.Module) -> Optional[str]:
    """Return which points were trained for another kernel size, which their shapes do not show.

    The size of 1-D and ordinary layers is a tensor, 0 if it is unknown; that of depthwise layers is in ``_metadata``.
    """
    metadata = getattr(state_dict, '_metadata', {})
    for name, module in model.named_modules():
        expected = getattr(module, 'base_size', None)
        key = f'{name}._extra_state' if name else '_extra_state'
        given = int(state_dict[key]) if key in state_dict else metadata.get(name, {}).get('base_size')
        if expected is not None and given not in (None, 0, expected):
            return f'the points of {name or "the layer"} are for kernels of size {shown(given)}, not of {expected}'
    return None


def convert_and_check(state_dict: StateDict, model: nn.Module, ignore: Iterable[str] = ()) -> StateDict:
    """Return a state dict, ours or the original release's, under our names if it fits a model exactly.

    Args:
        state_dict: Weights as in the file, without the prefixes of wrappers.
        model: Model to fit.
        ignore: Our names that may differ.

    Raises:
        ValueError: If it is another model's.
    """
    if is_original(state_dict):
        state_dict = convert_original(state_dict)
    mismatch = describe_mismatch(state_dict, model, ignore)
    if mismatch is not None:
        raise ValueError(f'the checkpoint does not fit the model: {mismatch}')
    return state_dict


def check_finite(state_dict: StateDict) -> None:
    """Raise ValueError if a weight is NaN or infinite: the model's outputs would be NaN."""
    for name, value in state_dict.items():
        if value.is_floating_point() and value.element_size() == 1:
            value = value.half()  # represents all values of 8-bit types, which have no sum
        # the sum is five times as quick; finite values whose sum overflows are checked one by one
        if not value.sum().isfinite() and not value.isfinite().all():
            raise ValueError(f'the checkpoint has weights that are not finite: {printable(name)}')
