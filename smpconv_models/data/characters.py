"""Character Trajectories: handwritten letters as velocities of the pen tip and its force.

Williams, Character Trajectories, UCI Machine Learning Repository, 2008, doi:10.24432/C58G7V.
"""
import io
import zipfile
import zlib
from pathlib import Path
from typing import Any, List, Tuple

import numpy as np
import torch

from smpconv_models.utils.download import check_sha256, fetch, locked, missing
from smpconv_models.utils.errors import first_line

from .registry import TRAIN_VAL_TEST, InMemorySequences, register_sequence_dataset

URL = 'https://archive.ics.uci.edu/static/public/175/character+trajectories.zip'
SHA256 = '5d2db017ef0d8cf0e65ed060c9e90399f78eb9f1e3cb63e22ca8c3ef4ba67d52'
ARCHIVE = 'character+trajectories.zip'
_MEMBER = 'mixoutALL_shifted.mat'
_CLASSES = tuple('abcdeghlmnopqrsuvwyz')
_LENGTH = 182  # the paper's
_MIN_LETTERS = 10  # of a class, so that each of the three splits has one

# Exceptions of zipfile and SciPy for a file of another format.
_ERRORS = (EOFError, LookupError, NotImplementedError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)


@register_sequence_dataset('characters', splits=TRAIN_VAL_TEST)
def open_characters(name: str, root: Path, split: str, download: bool) -> InMemorySequences:
    """Open 2,858 letters of one writer, 3 channels (x, y, force) at 200 Hz: 2,000 to train, 429 to validate or test.

    The published letters are padded with zeros at both ends. Here the padding is cut off, and the last values are
    repeated up to 182 steps, as in the copy of the UEA archive that the original release reads. The splits (70, 15 and
    15 %, stratified) have the release's seeds but the file's order, so that they differ from the release's. The release
    normalizes each step by the statistics of all channels at that step, which mixes velocities and force; here each
    channel has its own statistics.
    """
    path = root / ARCHIVE
    if not path.is_file():
        if not download:
            raise missing(path, URL)
        with locked(root):
            if not path.is_file():
                fetch(URL, path, SHA256)
    letters, labels = _read(path)
    data = np.stack([_fit(letter) for letter in letters])
    train, selected = _split_indices(labels, split)
    mean, std = (statistic(data[train], axis=(0, 2))[:, None] for statistic in (np.mean, np.std))
    if not std.all():
        raise ValueError(f'{path}: a channel is constant, standard deviations are {std.flatten().tolist()}')
    return InMemorySequences(
        f'split {split!r} of {path}', _CLASSES, torch.from_numpy(data[selected]).float(), labels[selected].tolist(),
        mean, std)


def _read(path: Path) -> Tuple[List[np.ndarray], np.ndarray]:
    """Return letters of shape ``(3, steps)`` and their labels."""
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise ValueError('the characters need SciPy: pip install scipy') from error
    check_sha256(path, SHA256)  # only the published file is parsed
    try:
        with zipfile.ZipFile(path) as archive:
            content = archive.read(_MEMBER)
        table = loadmat(io.BytesIO(content), variable_names=('mixout', 'consts'))
    except (*_ERRORS, MatReadError) as error:
        raise ValueError(f'{path} cannot be read: {type(error).__name__} {first_line(error)}') from error
    return _parse(path, table)


def _parse(path: Path, table: Any) -> Tuple[List[np.ndarray], np.ndarray]:
    try:
        letters = list(table['mixout'].flat)
        consts = table['consts'][0, 0]
        names = tuple(str(name.item()) for name in consts['key'].flat)
        labels = consts['charlabels'].flatten().astype(int) - 1  # MATLAB counts from 1
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{path}: expected mixout, consts.key and consts.charlabels in {_MEMBER}, found '
            f'{sorted(name for name in table if not name.startswith("__"))} ({first_line(error)})') from error
    if names != _CLASSES:
        raise ValueError(f'{path}: expected the classes {_CLASSES}, found {names}')
    if len(letters) != len(labels) or not set(labels.tolist()) <= set(range(len(_CLASSES))):
        raise ValueError(
            f'{path}: expected a label from 1 to {len(_CLASSES)} for each of {len(letters)} letters, found '
            f'{len(labels)} from {labels.min(initial=0) + 1} to {labels.max(initial=0) + 1}')
    for index, letter in enumerate(letters):
        where = f'{path}: letter {index} ({_MEMBER}, mixout{{{index + 1}}})'
        if letter.ndim != 2 or len(letter) != 3 or letter.dtype.kind not in 'fiu':
            raise ValueError(f'{where}: expected numbers of shape (3, steps), found {letter.dtype} of {letter.shape}')
        if not np.isfinite(letter).all():
            raise ValueError(f'{where} has NaN or inf')
        if not letter.any():
            raise ValueError(f'{where} is empty: the pen does not move')
    counts = np.bincount(labels, minlength=len(_CLASSES))
    rare = {name: int(count) for name, count in zip(_CLASSES, counts) if count < _MIN_LETTERS}
    if rare:
        raise ValueError(f'{path}: a class needs {_MIN_LETTERS} letters for three splits, found {rare}')
    return letters, labels


def _fit(letter: np.ndarray) -> np.ndarray:
    """Cut off the zeros at both ends, then repeat the last values or cut the end, to ``(3, 182)``."""
    steps = np.flatnonzero(letter.any(axis=0))
    letter = letter[:, steps[0]:steps[-1] + 1][:, :_LENGTH].astype(float)
    return np.pad(letter, ((0, 0), (0, _LENGTH - letter.shape[1])), mode='edge')


def _split_indices(labels: np.ndarray, split: str) -> Tuple[np.ndarray, np.ndarray]:
    """Return the indices of the training split, and those of ``split``."""
    try:
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ValueError('the characters need scikit-learn: pip install scikit-learn') from error
    train, rest = train_test_split(np.arange(len(labels)), train_size=0.7, random_state=0, stratify=labels)
    validation, test = train_test_split(rest, train_size=0.5, random_state=1, stratify=labels[rest])
    return train, {'train': train, 'validation': validation, 'test': test}[split]
