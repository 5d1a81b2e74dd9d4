"""Data sets of sequences by name, and the classes that hold a split."""
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch.utils.data import Dataset

from smpconv_models.utils.errors import suggestion_suffix

# Names by which timm finds the folder of a split.
TRAIN_SYNONYMS = ('train', 'training')
EVAL_SYNONYMS = ('val', 'valid', 'validation', 'eval', 'evaluation')
_TEST_SYNONYMS = ('test', 'testing')

# Splits of a data set, each with the names that select the split.
Splits = Dict[str, Tuple[str, ...]]
TRAIN_VAL: Splits = {'train': TRAIN_SYNONYMS, 'validation': EVAL_SYNONYMS}
TRAIN_TEST: Splits = {'train': TRAIN_SYNONYMS, 'test': _TEST_SYNONYMS + EVAL_SYNONYMS}
TRAIN_VAL_TEST: Splits = {**TRAIN_VAL, 'test': _TEST_SYNONYMS}


def create_sequence_dataset(
        name: str, root: Union[str, Path, None], split: str, download: bool = False) -> 'SequenceDataset':
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

    MNIST and CIFAR10 have two splits. Their test split also has the names of the validation split, as in timm.

    Args:
        name: Name of the data set.
        root: Folder of the downloaded files and of the tensors that are computed from the files. Unused for the
            digits, which scikit-learn ships.
        split: 'train', 'validation' or 'test', or a synonym that timm knows.
        download: Whether to download missing files. One process of a machine downloads, and the others wait.

    Returns:
        The data set, normalized by statistics of its training split, and images by fixed numbers.

    Raises:
        ValueError: If the name or split is unknown, or if files are missing or damaged, or cannot be downloaded or
            written.
    """
    if name not in _SPECS:
        known = list_sequence_datasets()
        raise ValueError(
            f'a data set of sequences must be one of {known}, got {name!r}{suggestion_suffix(str(name), known)}')
    spec = _SPECS[name]
    selected = next((key for key, synonyms in spec.splits.items() if split in synonyms), None)
    if selected is None:
        choices = sum(spec.splits.values(), ())
        raise ValueError(f'split of {name} must be one of {choices}, got {split!r}')
    if not spec.needs_folder:
        return spec.open(name, Path(), selected, download)
    if root is None or not str(root):
        raise ValueError(f'{name} needs a folder for its files: root is {root!r}')
    folder = Path(root).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f'{name} needs a folder for its files: root is the file {folder}')
    return spec.open(name, folder, selected, download)


def list_sequence_datasets(embedded: bool = False) -> Tuple[str, ...]:
    """Return the sorted names of all data sets, or of those that need no download."""
    return tuple(sorted(name for name, spec in _SPECS.items() if not (embedded and spec.needs_folder)))


class SequenceDataset(Dataset):
    """Normalized sequences of one length and their classes, as :func:`create_sequence_dataset` creates them.

    An item is a float32 tensor of shape ``shape``, or the result of ``transform`` for the tensor, and the class index.
    Sequences that are images, read row by row, have an ``image_size`` (height, width), and ``augment``, if set, is
    applied to them first: to uint8 pixels of shape ``shape`` in the order of the image.

    Args:
        description: Description for error messages.
        classes: Class names by index.
        shape: Shape of a sequence: (channels, length).
        labels: Class index of each sequence.
        mean: Number or ``(channels, 1)`` that is subtracted from a sequence.
        std: Number or ``(channels, 1)`` by which the difference is divided.
        files: Path of each sequence, or none if the sequences are not files of their own.

    Raises:
        ValueError: If a class has no sequence.
    """

    def __init__(
            self, description: str, classes: Sequence[str], shape: Tuple[int, int], labels: Sequence[int], mean: Any,
            std: Any, files: Sequence[str] = ()) -> None:
        absent = sorted(set(range(len(classes))) - set(labels))
        if absent:
            raise ValueError(
                f'{description} has no sequence of {len(absent)} of {len(classes)} classes: '
                f'{[classes[label] for label in absent[:8]]}')
        self.classes = tuple(classes)
        self.shape = shape
        self.labels = list(labels)
        self.transform: Any = None
        self.image_size: Optional[Tuple[int, int]] = None
        self.augment: Any = None
        self._mean = torch.as_tensor(mean, dtype=torch.float32)
        self._std = torch.as_tensor(std, dtype=torch.float32)
        self._files = list(files)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        sequence = (self._read(index) - self._mean) / self._std
        return (sequence if self.transform is None else self.transform(sequence)), self.labels[index]

    def name(self, index: int) -> str:
        """Return the path of a sequence, or 'sequence INDEX' if the sequence is not a file of its own."""
        return self._files[index] if self._files else f'sequence {index}'

    def _read(self, index: int) -> Tensor:
        """Return a sequence before normalization, float32 of shape ``shape``."""
        raise NotImplementedError


class InMemorySequences(SequenceDataset):
    """Sequences in memory, ``(N, channels, length)`` in the dtype of their source, uint8 or float32.

    Arguments that are not listed are those of :class:`SequenceDataset`.

    Args:
        order: Position of each step in the source, ``(length,)``. Default: the order of the source.
        image_size: (height, width) of sequences that are images.

    Raises:
        ValueError: If a class has no sequence, or a value is not finite.
    """

    def __init__(
            self, description: str, classes: Sequence[str], data: Tensor, labels: Sequence[int], mean: Any, std: Any,
            order: Optional[Tensor] = None, image_size: Optional[Tuple[int, int]] = None,
            files: Sequence[str] = ()) -> None:
        super().__init__(description, classes, (data.shape[1], data.shape[2]), labels, mean, std, files)
        self.image_size = image_size
        bad: List[int] = (~data.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f'{description} has NaN or inf in {len(bad)} of {len(data)} sequences, such as {bad[:4]}')
        self._data = data
        self._order = order

    def _read(self, index: int) -> Tensor:
        sequence = self._data[index]
        if self.augment is not None:
            sequence = self.augment(sequence)
        return (sequence if self._order is None else sequence[:, self._order]).float()


# Arguments of an opener: the name of the data set, its folder, the split as a key of its splits, whether to download.
_Opener = Callable[[str, Path, str, bool], SequenceDataset]


class _DatasetSpec(NamedTuple):
    open: _Opener
    splits: Splits
    needs_folder: bool


_SPECS: Dict[str, _DatasetSpec] = {}


def register_sequence_dataset(*names: str, splits: Splits, needs_folder: bool = True) -> Callable[[_Opener], _Opener]:
    """Return a decorator that registers a function as the opener of data sets."""
    def register(opener: _Opener) -> _Opener:
        _SPECS.update(dict.fromkeys(names, _DatasetSpec(opener, splits, needs_folder)))
        return opener
    return register
