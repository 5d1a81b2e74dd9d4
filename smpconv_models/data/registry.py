"""The data sets by name."""
from functools import partial
from pathlib import Path
from typing import Callable, Dict, NamedTuple, Optional, Tuple, Union

from smpconv_models.data.digits import SPLIT_SYNONYMS
from smpconv_models.utils.errors import suggestion_suffix

from . import characters, images, speech
from .sequence_dataset import SequenceDataset

# The names that a split goes by.
_TRAIN, _VALIDATION = SPLIT_SYNONYMS
_TEST = ('test', 'testing')
_Splits = Dict[str, Tuple[str, ...]]
_TWO: _Splits = {'train': _TRAIN, 'test': _TEST + _VALIDATION}
_THREE: _Splits = {'train': _TRAIN, 'validation': _VALIDATION, 'test': _TEST}


class _Source(NamedTuple):
    """What opens a data set, from its folder, the split and whether to download; its splits; whether it needs a folder.
    """
    open: Callable[[Path, str, bool], SequenceDataset]
    splits: _Splits
    needs_folder: bool = True


def _digits(permuted: bool) -> _Source:
    return _Source(
        lambda root, split, download: images.open_digits(split, permuted),
        {'train': _TRAIN, 'validation': _VALIDATION}, needs_folder=False)


_SOURCES = {
    'digits': _digits(permuted=False),
    'permuted-digits': _digits(permuted=True),
    'mnist': _Source(partial(images.open_mnist, permuted=False), _TWO),
    'permuted-mnist': _Source(partial(images.open_mnist, permuted=True), _TWO),
    'cifar10': _Source(images.open_cifar10, _TWO),
    'characters': _Source(characters.open_characters, _THREE),
    'speech-mfcc': _Source(speech.open_mfcc, _THREE),
    'speech': _Source(speech.open_waves, _THREE),
}
NAMES = tuple(_SOURCES)
EMBEDDED = tuple(name for name, source in _SOURCES.items() if not source.needs_folder)


def create_sequence_dataset(
        name: str,
        root: Union[str, Path, None],
        split: str,
        download: bool = False,
) -> SequenceDataset:
    """Opens a split of a data set of sequences.

    ==================  ============  =======  ===================================================================
    name                shape         classes  splits
    ==================  ============  =======  ===================================================================
    'digits'            (1, 64)       10       train, validation; scikit-learn's, row by row
    'permuted-digits'   (1, 64)       10       likewise, the steps in one fixed random order
    'mnist'             (1, 784)      10       train, test; the images row by row
    'permuted-mnist'    (1, 784)      10       likewise, the steps in one fixed random order
    'cifar10'           (3, 1024)     10       train, test; the images row by row
    'characters'        (3, 182)      20       train, validation, test; pen velocities and force
    'speech-mfcc'       (20, 161)     10       train, validation, test; cepstral coefficients of spoken words
    'speech'            (1, 16000)    10       train, validation, test; one second at 16 kHz
    ==================  ============  =======  ===================================================================

    MNIST and CIFAR10 have two parts: there the names of the validation split mean the test images, as they do in timm.

    Args:
        name: One of :data:`NAMES`.
        root: The folder that holds the files, or will; what is made of them is kept there too. None will do for the
            digits, which come with scikit-learn.
        split: 'train', 'validation' or 'test', or a synonym that timm knows.
        download: Whether to download what is missing. One process of a machine does, the others wait for it.

    Returns:
        The data set, normalised by its own training split, images by fixed numbers.

    Raises:
        ValueError: An unknown name or split; files are missing, damaged, or can't be downloaded or written.
    """
    if name not in NAMES:
        raise ValueError(f'sequences are one of {NAMES}, got {name!r}{suggestion_suffix(str(name), NAMES)}')
    source = _SOURCES[name]
    part = next((part for part, synonyms in source.splits.items() if split in synonyms), None)
    if part is None:
        known = tuple(synonym for synonyms in source.splits.values() for synonym in synonyms)
        raise ValueError(f'split of {name} must be one of {known}, got {split!r}')
    return source.open(_folder(name, root) if source.needs_folder else Path(), part, download)


def _folder(name: str, root: Optional[Union[str, Path]]) -> Path:
    if root is None or not str(root):
        raise ValueError(f'{name} needs a folder that holds its files, or will: got {root!r}')
    folder = Path(root).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f'{name} needs a folder that holds its files, got a file: {folder}')
    return folder
