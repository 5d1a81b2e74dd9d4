"""Data sets of sequences: images as sequences of pixels, handwriting, speech."""
from functools import partial
from pathlib import Path
from typing import Callable, Dict, NamedTuple, Tuple, Union

from smpconv_models.utils.errors import suggestion_suffix

from .characters import open_characters
from .digits import SPLIT_SYNONYMS
from .images import open_cifar10, open_digits, open_mnist
from .sequence_dataset import SequenceDataset
from .speech import open_mfcc, open_waveforms

__all__ = ['DATASET_NAMES', 'EMBEDDED', 'SequenceDataset', 'create_sequence_dataset']

# Split -> its names; MNIST and CIFAR10 have no validation split, and timm takes their test images for one.
_TRAIN, _VALIDATION = SPLIT_SYNONYMS
_TEST = ('test', 'testing')
_DIGITS_SPLITS = {'train': _TRAIN, 'validation': _VALIDATION}
_TWO_SPLITS = {'train': _TRAIN, 'test': _TEST + _VALIDATION}
_THREE_SPLITS = {'train': _TRAIN, 'validation': _VALIDATION, 'test': _TEST}


class _DatasetSpec(NamedTuple):
    """Splits of a data set, and the function that opens a split from a folder and may download missing files."""
    splits: Dict[str, Tuple[str, ...]]
    open: Callable[[Path, str, bool], SequenceDataset]


_SPECS = {
    'digits': _DatasetSpec(_DIGITS_SPLITS, partial(open_digits, permuted=False)),
    'permuted-digits': _DatasetSpec(_DIGITS_SPLITS, partial(open_digits, permuted=True)),
    'mnist': _DatasetSpec(_TWO_SPLITS, partial(open_mnist, permuted=False)),
    'permuted-mnist': _DatasetSpec(_TWO_SPLITS, partial(open_mnist, permuted=True)),
    'cifar10': _DatasetSpec(_TWO_SPLITS, open_cifar10),
    'characters': _DatasetSpec(_THREE_SPLITS, open_characters),
    'speech-mfcc': _DatasetSpec(_THREE_SPLITS, open_mfcc),
    'speech': _DatasetSpec(_THREE_SPLITS, open_waveforms),
}
DATASET_NAMES = tuple(_SPECS)
EMBEDDED = ('digits', 'permuted-digits')  # data sets that need no folder


def create_sequence_dataset(
        name: str,
        root: Union[str, Path, None],
        split: str,
        download: bool = False,
) -> SequenceDataset:
    """Create a split of a data set of sequences.

    ==================  ============  =======  ===================================================================
    name                shape         classes  splits
    ==================  ============  =======  ===================================================================
    'digits'            (1, 64)       10       train, validation; scikit-learn's, row by row
    'permuted-digits'   (1, 64)       10       train, validation; the steps in one fixed random order
    'mnist'             (1, 784)      10       train, test; the images row by row
    'permuted-mnist'    (1, 784)      10       train, test; the steps in one fixed random order
    'cifar10'           (3, 1024)     10       train, test; the images row by row
    'characters'        (3, 182)      20       train, validation, test; pen velocities and force
    'speech-mfcc'       (20, 161)     10       train, validation, test; cepstral coefficients of spoken words
    'speech'            (1, 16000)    10       train, validation, test; one second at 16 kHz
    ==================  ============  =======  ===================================================================

    For MNIST and CIFAR10, the names of a validation split stand for the test images, as in timm.

    Args:
        name: One of :data:`DATASET_NAMES`.
        root: Folder of the data set's files and of what is computed from the files. Not used for the digits, which
            scikit-learn contains.
        split: 'train', 'validation' or 'test', or a synonym that timm accepts.
        download: Whether missing files are downloaded. One process of a machine downloads, the others wait.

    Returns:
        The data set. Images are normalized by fixed numbers, other sequences by statistics of their training split.

    Raises:
        ValueError: If the name or the split is unknown, or files are missing, damaged, or cannot be downloaded or
            written.
    """
    if name not in _SPECS:
        raise ValueError(
            f'sequences must be one of {DATASET_NAMES}, got {name!r}{suggestion_suffix(str(name), DATASET_NAMES)}')
    spec = _SPECS[name]
    part = next((part for part, synonyms in spec.splits.items() if split in synonyms), None)
    if part is None:
        known = tuple(synonym for synonyms in spec.splits.values() for synonym in synonyms)
        raise ValueError(f'split of {name} must be one of {known}, got {split!r}')
    if name in EMBEDDED:
        return spec.open(Path(), part, download)
    if root is None or not str(root):
        raise ValueError(f'{name} needs a folder for its files, got {root!r}')
    folder = Path(root).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f'{name} needs a folder for its files, got a file: {folder}')
    return spec.open(folder, part, download)
