"""Description in a checkpoint: its network, the preparation of its images and its training run.

Described values are checked for type and bounds before they are used. A file does not choose what is fetched or run: of
the data that it names, :func:`smpconv_models.training.validate.fill_from_checkpoint` opens only an embedded data set or
an image folder that exists on this machine.
"""
import logging
import re
import reprlib
import unicodedata
from argparse import Namespace
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple, Union

MAX_IMAGE_SIDE = 4096  # pixels
MAX_INHERITED_SIDE = 1024  # pixels; an evaluation at a larger size has to be asked for
MAX_COUNT = 1 << 20  # classes, channels, a kernel's side
_MAX_ENTRIES = 64  # values of one argument of a constructor
_MAX_DEPTH = 4  # of containers in containers, in such an argument
_MAX_TEXT = 4096

PREPARATION = ('img_size', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'exif_orientation')

INTERPOLATIONS = ('bicubic', 'bilinear', 'box', 'hamming', 'lanczos', 'nearest')

# Arguments of timm's factories that load, wrap or replace a network instead of describing it.
_NOT_OF_NETWORK = re.compile(
    r'pretrained.*|checkpoint_path|cache_dir|scriptable|exportable|no_jit|features_only|feature_cfg|out_indices|'
    r'kwargs_filter|model_cfg|device|dtype|weight_init')

# Options of timm's training script that are the constructor's arguments.
_TIMM_OPTIONS = {'num_classes': 'num_classes', 'in_chans': 'in_chans', 'global_pool': 'gp'}

_logger = logging.getLogger(__name__)


class Description:
    """Description in a loaded checkpoint of this package or of timm; empty for bare weights.

    A field is checked when it is read, so a wrong value that the user's options replace does no harm. Fields are None
    if the file has no value for them.

    Args:
        checkpoint: Value returned by :func:`load_file`.
        path: Path of the checkpoint, with which errors begin.

    Attributes:
        arguments: Arguments of the training run as in the file, unchecked.

    Raises:
        ValueError: If a field is read whose value has another type or lies outside its bounds; it names the field.
    """

    def __init__(self, checkpoint: Any = None, path: Union[str, Path] = '') -> None:
        self._content = checkpoint if isinstance(checkpoint, dict) else {}
        self._path = path
        arguments = _stored_arguments(self._content)
        if not isinstance(arguments, (dict, type(None))):
            _logger.warning('checkpoint: args is %s, not a dictionary or a namespace, and is ignored', shown(arguments))
            arguments = None
        self.arguments: Dict[str, Any] = {
            key: value for key, value in (arguments or {}).items() if value is not None and not is_empty_text(value)}

    @property
    def model(self) -> Optional[str]:
        """Name of the architecture."""
        return self._argument('model', check_text)

    @property
    def model_kwargs(self) -> Dict[str, Any]:
        """Arguments of the network's constructor, which are plain, bounded values."""
        with self._named():
            own = self._content.get('model_kwargs')
            if own is not None:
                return check_model_kwargs(own)
            options = {key: self.arguments[option] for key, option in _TIMM_OPTIONS.items() if option in self.arguments}
            more = check_model_kwargs(self.arguments.get('model_kwargs', {}), 'args.model_kwargs')
            return {**more, **check_model_kwargs(options, 'args')}

    @property
    def classes(self) -> Optional[List[str]]:
        """Class names by index. A count of classes in their place has no names."""
        classes = self._content.get('classes')
        if classes is None or isinstance(classes, int):
            return None
        with self._named():
            return check_texts('classes', classes)

    @property
    def epoch(self) -> Optional[int]:
        """Epoch of the weights."""
        epoch = self._content.get('epoch')
        with self._named():
            return None if epoch is None else check_number('epoch', epoch, -1, 10 ** 9, whole=True)

    @property
    def seed(self) -> Optional[int]:
        """Seed of the training run."""
        return self._argument('seed', lambda name, value: check_number(name, value, 0, 2 ** 32 - 1, whole=True))

    @property
    def val_split_fraction(self) -> Optional[float]:
        """Fraction of the images of a folder without splits that the training run was evaluated on."""
        return self._argument('val_split_fraction', lambda name, value: check_number(name, value, 0.001, 0.999))

    @property
    def split(self) -> Optional[Dict[str, str]]:
        """Hashes of the names of the images that the run was trained and evaluated on, of a folder without splits."""
        split = self._content.get('split')
        with self._named():
            return None if split is None else check_split(split)

    def text(self, key: str) -> Optional[str]:
        """Return a text of the training run: ``dataset``, ``data_dir`` or ``val_split``."""
        return self._argument(key, check_text)

    def preparation(
            self, fields: Iterable[str] = PREPARATION, max_side: int = MAX_IMAGE_SIDE,
            hint: str = '') -> Dict[str, Any]:
        """Return how images are prepared, of the fields of :func:`check_preparation`; errors end with ``hint``."""
        with self._named(hint):
            return check_preparation({key: self.arguments.get(key) for key in fields}, 'args.', max_side)

    def _argument(self, key: str, check: Callable[[str, Any], Any]) -> Any:
        value = self.arguments.get(key)
        with self._named():
            return None if value is None else check(f'args.{key}', value)

    @contextmanager
    def _named(self, hint: str = '') -> Iterator[None]:
        """Put the path before an error."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f'{self._path}: {error}{hint}' if self._path else f'{error}{hint}') from error


def describe(checkpoint: Any, path: Union[str, Path] = '') -> Description:
    """Return the :class:`Description` in a loaded checkpoint; errors begin with ``path``."""
    return Description(checkpoint, path)


def _stored_arguments(content: Dict[Any, Any]) -> Any:
    """Return the unchecked arguments in a checkpoint: this package stores a dictionary, timm a namespace."""
    arguments = content.get('args')
    return vars(arguments) if isinstance(arguments, Namespace) else arguments


def get_train_args(checkpoint: Any) -> Dict[str, Any]:
    """Return the arguments of the training run: a dictionary in this package's files, a namespace in timm's.

    Raises:
        ValueError: If they are something else or not plain values.
    """
    arguments = _stored_arguments(checkpoint) if isinstance(checkpoint, dict) else None
    if arguments is None:
        return {}
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise ValueError(f'args must be a dictionary or a namespace of options by name, got {shown(arguments)}')
    check_plain('args', arguments)
    return arguments


def check_preparation(values: Any, prefix: str = '', max_side: int = MAX_IMAGE_SIDE) -> Dict[str, Any]:
    """Return the fields that describe how images are prepared, each checked.

    Args:
        values: Dictionary with any of ``img_size``, ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``,
            ``exif_orientation``.
        prefix: Text before a field's name in errors.
        max_side: Largest side of an image, in pixels.

    Raises:
        ValueError: If timm could not prepare images that way, or would need unbounded memory for it.
    """
    checks = {
        'img_size': lambda name, value: check_number(name, value, 1, max_side, whole=True),
        'input_size': lambda name, value: _input_size(name, value, max_side),
        'mean': lambda name, value: check_numbers(name, value, -255, 255),
        'std': lambda name, value: check_numbers(name, value, 1e-6, 255),
        'interpolation': lambda name, value: check_choice(name, value, (*INTERPOLATIONS, 'random')),
        'crop_pct': lambda name, value: check_number(name, value, 0.1, 2),
        'exif_orientation': check_boolean,
    }
    return {
        key: check(f'{prefix}{key}', values[key]) for key, check in checks.items()
        if values.get(key) is not None and not is_empty_text(values[key])}


def check_model_kwargs(kwargs: Any, name: str = 'model_kwargs') -> Dict[str, Any]:
    """Return a constructor's arguments if they are plain, bounded and describe a network.

    Raises:
        ValueError: If an argument is nested too deeply, too large, or would make timm load or wrap something.
    """
    is_right = isinstance(kwargs, dict) and all(isinstance(key, str) for key in kwargs)
    _require(is_right, name, 'a dictionary of arguments', kwargs)
    for key, value in kwargs.items():
        parts = list(islice(_parts(name, {key: value}), _MAX_ENTRIES + 2))
        if len(parts) > _MAX_ENTRIES + 1 or not all(map(_is_bounded, parts)):
            raise ValueError(
                f'{name}.{printable(key)} must be a short text or a number of at most {MAX_COUNT}, or at most '
                f'{_MAX_ENTRIES} of them, got {shown(value)}')
    return dict(kwargs)


def _parts(name: str, value: Any, depth: int = _MAX_DEPTH) -> Iterator[Any]:
    """Yield keys and leaves of a constructor's arguments; a container at the maximum depth is a leaf."""
    if depth and isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str) and _NOT_OF_NETWORK.fullmatch(key):
                raise ValueError(f'{name} must describe a network, got {printable(key)}, which loads or wraps one')
            yield key
            yield from _parts(name, item, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(name, item, depth - 1)
    else:
        yield value


def _is_bounded(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= 100 and value.isprintable()
    if value is None or isinstance(value, bool):
        return True
    return isinstance(value, (int, float)) and abs(value) <= MAX_COUNT  # NaN is not


def _input_size(name: str, value: Any, max_side: int) -> List[int]:
    _require(isinstance(value, (list, tuple)) and len(value) == 3, name, '(channels, height, width)', value)
    sides = [check_number(name, side, 1, max_side, whole=True) for side in value[1:]]
    return [check_number(name, value[0], 1, MAX_COUNT, whole=True), *sides]


# --- checks of single values: each returns the value or raises ValueError with the field's name ---


def _require(is_right: bool, name: str, expected: str, value: Any) -> Any:
    if not is_right:
        raise ValueError(f'{name} must be {expected}, got {shown(value)}')
    return value


def check_boolean(name: str, value: Any) -> bool:
    """Check a truth value."""
    return _require(isinstance(value, bool), name, 'true or false', value)


def check_number(name: str, value: Any, low: float, high: float, whole: bool = False) -> Any:
    """Check a number in [low, high]."""
    kinds = int if whole else (int, float)
    is_right = isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high
    return _require(is_right, name, f'a {"whole " if whole else ""}number from {low:g} to {high:g}', value)


def check_numbers(name: str, value: Any, low: float, high: float) -> List[Any]:
    """Check a sequence of 1 to 64 numbers in [low, high]."""
    _require(isinstance(value, (list, tuple)) and 1 <= len(value) <= _MAX_ENTRIES, name, 'a list of numbers', value)
    return [check_number(name, item, low, high) for item in value]


def check_text(name: str, value: Any) -> str:
    """Check a text of bounded length."""
    is_right = isinstance(value, str) and len(value) <= _MAX_TEXT
    return _require(is_right, name, f'a text of at most {_MAX_TEXT} characters', value)


def check_texts(name: str, value: Any) -> List[str]:
    """Check a list of texts."""
    _require(isinstance(value, (list, tuple)) and len(value) <= MAX_COUNT, name, 'a list of names', value)
    return [check_text(f'{name}[{index}]', item) for index, item in enumerate(value)]


def check_split(value: Any) -> Dict[str, str]:
    """Check the hashes of both parts of a folder's images."""
    is_right = isinstance(value, dict) and value.keys() == {'training', 'validation'}
    _require(is_right, 'split', "a dictionary with 'training' and 'validation'", value)
    return {part: check_text(f'split.{part}', digest) for part, digest in value.items()}


def check_choice(name: str, value: Any, choices: Tuple[str, ...]) -> str:
    """Check that a text is one of several."""
    return _require(isinstance(value, str) and value in choices, name, f'one of {choices}', value)


def check_plain(name: str, value: Any, depth: int = 6) -> None:
    """Raise ValueError unless a value is made of None, booleans, numbers, texts, and lists and dictionaries of them."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return
    if depth > 0 and isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
        for key, item in value.items():
            check_plain(f'{name}.{printable(str(key))}', item, depth - 1)
    elif depth > 0 and isinstance(value, (list, tuple)):
        for item in value:
            check_plain(name, item, depth - 1)
    else:
        raise ValueError(f'{name:.200} must be plain data, got {shown(value)}')


def is_empty_text(value: Any) -> bool:
    """Return whether a value is an empty text, by which timm leaves an option open."""
    return isinstance(value, str) and not value


class _Bounded(reprlib.Repr):
    """Representations of plain values, of bounded length and depth; other values by their type."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = 8
        self.maxlevel = 3
        self.maxstring = 80

    def repr_int(self, value: int, level: int) -> str:
        # printing thousands of digits takes long, or raises
        return repr(value) if value.bit_length() <= 128 else f'a number of {value.bit_length()} bits'

    def repr_instance(self, value: Any, level: int) -> str:
        return repr(value) if value is None or isinstance(value, (bool, float)) else f'a {type(value).__name__}'


def shown(value: Any) -> str:
    """Return a value in one short line; tensors and other objects by their type."""
    return f'{_Bounded().repr(value):.200}'


def printable(name: str, limit: Optional[int] = 200) -> str:
    """Return a name for messages, escaped as in a Python string if it cannot be printed or looks like another name.

    Names with bytes that are not UTF-8, with control characters or with a backslash are escaped, and so are names that
    are not in Unicode's composed form (NFC). Different names are shown differently, unless they are cut.

    Args:
        name: Name of a class, a file or a tensor.
        limit: Number of characters after which the name is cut, None to keep all.
    """
    name = name[:limit]
    if name.isprintable() and '\\' not in name and unicodedata.is_normalized('NFC', name):
        return name
    return name.encode('unicode_escape').decode('ascii')
