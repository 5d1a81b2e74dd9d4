"""What a checkpoint says about its network, its images and its training run: typed, bounded, and nothing that locates.

A file may describe (an architecture, image size, normalization, class names). A file never decides what is opened,
fetched or run: the data set, the folder and the split of the training run are text to show, see :class:`Origin`.
"""
import math
import re
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

MAX_IMAGE_SIDE = 1024  # pixels; larger images are asked for on the command line
MAX_COUNT = 1 << 20  # classes, channels, a kernel's side
_MAX_ENTRIES = 64  # of a sequence among a constructor's arguments
_MAX_TEXT = 4096

_PREPARATION = ('img_size', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'exif_orientation')

INTERPOLATIONS = ('bicubic', 'bilinear', 'box', 'hamming', 'lanczos', 'nearest', 'random')

# Arguments of timm's factories that load, wrap or replace a network instead of describing it.
_NOT_OF_NETWORK = re.compile(
    r'pretrained.*|checkpoint_path|cache_dir|scriptable|exportable|no_jit|features_only|feature_cfg|out_indices|'
    r'kwargs_filter|model_cfg|device|dtype|weight_init')

# Options of timm's training script that are the constructor's arguments.
_TIMM_OPTIONS = {'num_classes': 'num_classes', 'in_chans': 'in_chans', 'global_pool': 'gp'}


@dataclass(frozen=True)
class Origin:
    """The data that a checkpoint was trained on, in the file's words: to show and to compare, not to open."""
    dataset: Optional[str] = None
    data_dir: Optional[str] = None
    val_split: Optional[str] = None


@dataclass(frozen=True)
class Description:
    """What a checkpoint describes; None where the file is silent.

    Attributes:
        model: Name of the architecture, as in the file.
        model_kwargs: Arguments of the network's constructor: plain, bounded values.
        preparation: Those of ``img_size``, ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``,
            ``exif_orientation`` that the file has, unchecked: :func:`check_preparation` is for those that are used, as
            the user's options come before them.
        classes: Class names by index.
        epoch: Epoch of the weights.
        seed: Seed of the training run.
        origin: Training data.
    """
    model: Optional[str] = None
    model_kwargs: Dict[str, Any] = field(default_factory=dict)
    preparation: Dict[str, Any] = field(default_factory=dict)
    classes: Optional[List[str]] = None
    epoch: Optional[int] = None
    seed: Optional[int] = None
    origin: Origin = Origin()


def describe(checkpoint: Any) -> Description:
    """Read the description in a loaded checkpoint: this package's, timm's, or an empty one of bare weights.

    Args:
        checkpoint: Value returned by :func:`read_file`.

    Raises:
        ValueError: If a value has another type than its field or lies outside its bounds; the line names the field.
    """
    if not isinstance(checkpoint, dict):
        return Description()
    arguments = run_arguments(checkpoint)
    given = {key: value for key, value in arguments.items() if value is not None and not is_empty_text(value)}
    return Description(
        model=_optional(given, 'model', text, 'args.'),
        model_kwargs=_model_kwargs(checkpoint, given),
        preparation={key: given[key] for key in _PREPARATION if key in given},
        classes=_optional(checkpoint, 'classes', texts),
        epoch=_optional(checkpoint, 'epoch', lambda name, value: number(name, value, -1, 10 ** 9, whole=True)),
        seed=_optional(given, 'seed', lambda name, value: number(name, value, 0, 2 ** 32 - 1, whole=True), 'args.'),
        origin=Origin(*(_optional(given, key, text, 'args.') for key in ('dataset', 'data_dir', 'val_split'))),
    )


def run_arguments(checkpoint: Any) -> Dict[str, Any]:
    """Return the arguments of the training run: a dictionary in this package's files, a namespace in timm's.

    Raises:
        ValueError: If they are something else or not plain values.
    """
    arguments = checkpoint.get('args') if isinstance(checkpoint, dict) else None
    if isinstance(arguments, Namespace):
        arguments = vars(arguments)
    if arguments is None:
        return {}
    plain('args', arguments)
    if not isinstance(arguments, dict):
        raise ValueError(f'args must be a dictionary or a namespace, got {shown(arguments)}')
    return arguments


def check_preparation(values: Any, prefix: str = '') -> Dict[str, Any]:
    """Return the fields that say how images are prepared, each checked.

    Args:
        values: Dictionary with any of ``img_size``, ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``,
            ``exif_orientation``.
        prefix: Put before a field's name in errors.

    Raises:
        ValueError: If timm could not prepare images that way, or would need any amount of memory for it.
    """
    checks = {
        'img_size': _side,
        'input_size': _input_size,
        'mean': lambda name, value: numbers(name, value, -255, 255),
        'std': lambda name, value: numbers(name, value, 1e-6, 255),
        'interpolation': lambda name, value: choice(name, value, INTERPOLATIONS),
        'crop_pct': lambda name, value: number(name, value, 0.1, 2),
        'exif_orientation': boolean,
    }
    return {
        key: check(f'{prefix}{key}', values[key]) for key, check in checks.items()
        if values.get(key) is not None and not is_empty_text(values[key])}


def check_model_kwargs(kwargs: Any, name: str = 'model_kwargs') -> Dict[str, Any]:
    """Return a constructor's arguments if they are plain, bounded and describe a network.

    Raises:
        ValueError: If an argument is nested, too large, or would have timm load or wrap something.
    """
    if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
        raise ValueError(f'{name} must be a dictionary of arguments, got {shown(kwargs)}')
    for key, value in kwargs.items():
        if _NOT_OF_NETWORK.fullmatch(key):
            raise ValueError(f'{name} must describe a network, got {key}: a file does not decide what is loaded')
        items = value if isinstance(value, (list, tuple)) else [value]
        if len(items) > _MAX_ENTRIES or not all(_is_bounded(item) for item in items):
            raise ValueError(
                f'{name}.{key} must be a value of at most {MAX_COUNT}, or at most {_MAX_ENTRIES} of them, got '
                f'{shown(value)}')
    return dict(kwargs)


def _model_kwargs(checkpoint: Dict[str, Any], given: Dict[str, Any]) -> Dict[str, Any]:
    """This package's stand in a place of their own, timm's among the training script's options."""
    own = checkpoint.get('model_kwargs')
    if own is not None:
        return check_model_kwargs(own)
    options = {key: given[option] for key, option in _TIMM_OPTIONS.items() if option in given}
    more = given.get('model_kwargs', {})
    return {**check_model_kwargs(more, 'args.model_kwargs'), **check_model_kwargs(options, 'args')}


def _is_bounded(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= 100 and value.isprintable()
    if value is None or isinstance(value, bool):
        return True
    return isinstance(value, (int, float)) and abs(value) <= MAX_COUNT  # NaN is not


def _optional(values: Dict[Any, Any], key: str, check: Any, prefix: str = '') -> Any:
    value = values.get(key)
    return None if value is None else check(f'{prefix}{key}', value)


def _side(name: str, value: Any) -> int:
    return number(name, value, 1, MAX_IMAGE_SIDE, whole=True)


def _input_size(name: str, value: Any) -> List[int]:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise ValueError(f'{name} must be (channels, height, width), got {shown(value)}')
    return [number(name, value[0], 1, MAX_COUNT, whole=True), *(_side(name, side) for side in value[1:])]


# --- checks of single values: each returns the value or raises ValueError with the field's name ---


def boolean(name: str, value: Any) -> bool:
    """Check a truth value."""
    if not isinstance(value, bool):
        raise ValueError(f'{name} must be true or false, got {shown(value)}')
    return value


def number(name: str, value: Any, low: float, high: float, whole: bool = False) -> Any:
    """Check a number in [low, high]."""
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise ValueError(f'{name} must be a {"whole " if whole else ""}number from {low:g} to {high:g}, got '
                         f'{shown(value)}')
    return value


def numbers(name: str, value: Any, low: float, high: float) -> List[Any]:
    """Check a sequence of 1 to 64 numbers in [low, high]."""
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= _MAX_ENTRIES:
        raise ValueError(f'{name} must be a list of numbers, got {shown(value)}')
    return [number(name, item, low, high) for item in value]


def text(name: str, value: Any) -> str:
    """Check a text of bounded length."""
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ValueError(f'{name} must be a text of at most {_MAX_TEXT} characters, got {shown(value)}')
    return value


def texts(name: str, value: Any) -> List[str]:
    """Check a list of texts."""
    if not isinstance(value, (list, tuple)) or len(value) > MAX_COUNT:
        raise ValueError(f'{name} must be a list of names, got {shown(value)}')
    return [text(f'{name}[{index}]', item) for index, item in enumerate(value)]


def choice(name: str, value: Any, choices: Tuple[str, ...]) -> str:
    """Check that a text is one of several."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f'{name} must be one of {choices}, got {shown(value)}')
    return value


def plain(name: str, value: Any, depth: int = 6) -> None:
    """Raise ValueError unless a value is made of None, booleans, numbers, texts, and lists and dictionaries of them."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return
    if depth > 0 and isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
        for key, item in value.items():
            plain(f'{name}.{key}', item, depth - 1)
    elif depth > 0 and isinstance(value, (list, tuple)):
        for item in value:
            plain(name, item, depth - 1)
    else:
        raise ValueError(f'{name:.200} must be plain data, got {shown(value)}')


def is_empty_text(value: Any) -> bool:
    """Whether a value is timm's way to leave a text option open."""
    return isinstance(value, str) and not value


def shown(value: Any) -> str:
    """Return a value in one short line; containers and tensors by type, as their texts may be endless."""
    if isinstance(value, (list, tuple)) and len(value) <= _MAX_ENTRIES and all(
            item is None or isinstance(item, (bool, int, float, str)) for item in value):
        value = type(value)(_shortened(item) for item in value)
    elif not (value is None or isinstance(value, (bool, int, float, str))):
        return f'a {type(value).__name__}'
    return f'{_shortened(value)!r:.80}'


def printable(name: str) -> str:
    """Return a name of a file's in one short line: what is not printable is escaped."""
    name = name[:200]
    return name if name.isprintable() else repr(name)[1:-1]


def _shortened(value: Any) -> Any:
    """Printing a whole number of thousands of digits takes long or raises."""
    if isinstance(value, int) and abs(value) > 1 << 64:
        return math.inf if value > 0 else -math.inf
    return value[:80] if isinstance(value, str) else value
