"""Character Trajectories: handwritten letters as velocities of the pen's tip and its force.

Williams, Character Trajectories, UCI Machine Learning Repository, 2008, doi:10.24432/C58G7V.
"""
import io
import zipfile
import zlib
from pathlib import Path
from typing import Any, List, Tuple

import numpy as np
import torch

from smpconv_models.utils.errors import first_line

from ..utils.download import check_sha256, fetch, locked, missing
from .sequence_dataset import StoredSequences

URL = 'https://archive.ics.uci.edu/static/public/175/character+trajectories.zip'
SHA256 = '5d2db017ef0d8cf0e65ed060c9e90399f78eb9f1e3cb63e22ca8c3ef4ba67d52'
ARCHIVE = 'character+trajectories.zip'
_MEMBER = 'mixoutALL_shifted.mat'
_CLASSES = tuple('abcdeghlmnopqrsuvwyz')
_LENGTH = 182  # the paper's
_FEWEST = 10  # of a class, so that all three splits have one

# What zipfile and SciPy raise at a file of another form.
_ERRORS = (EOFError, LookupError, NotImplementedError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)


def open_characters(root: Path, split: str, download: bool) -> StoredSequences:
    """2,858 letters of one hand, 3 channels (x, y, force) at 200 Hz: 2,000 to train, 429 each to validate and to test.

    The repository's file pads letters with zeros at both ends. Here these are cut off, as they are in the UEA archive's
    copy, which the original release reads; and as there, the last values are repeated up to 182 steps. The splits are
    stratified, 70, 15 and 15 %, with the release's seeds but in the file's order, so that they aren't its. The release
    normalises each step by the mean and deviation of all channels at that step, which mixes velocities and force;
    here each channel is by its own.
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
    train, part = _indices(labels, split)
    mean, std = (statistic(data[train], axis=(0, 2))[:, None] for statistic in (np.mean, np.std))
    if not std.all():
        raise ValueError(f'{path}: a channel is the same everywhere, deviations are {std.flatten().tolist()}')
    return StoredSequences(
        f'split {split!r} of {path}', _CLASSES, torch.from_numpy(data[part]).float(), labels[part].tolist(), mean, std)


def _read(path: Path) -> Tuple[List[np.ndarray], np.ndarray]:
    """Letters of shape ``(3, steps)`` and their labels."""
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise ValueError('the characters need SciPy: pip install scipy') from error
    check_sha256(path, SHA256)  # nothing is parsed that isn't the published file
    try:
        with zipfile.ZipFile(path) as archive:
            content = archive.read(_MEMBER)
        table = loadmat(io.BytesIO(content), variable_names=('mixout', 'consts'))
    except (*_ERRORS, MatReadError) as error:
        raise ValueError(f'{path} cannot be read: {type(error).__name__} {first_line(error)}') from error
    return _check(path, table)


def _check(path: Path, table: Any) -> Tuple[List[np.ndarray], np.ndarray]:
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
        _check_letter(f'{path}: letter {index} ({_MEMBER}, mixout{{{index + 1}}})', letter)
    counts = np.bincount(labels, minlength=len(_CLASSES))
    rare = {_CLASSES[label]: int(count) for label, count in enumerate(counts) if count < _FEWEST}
    if rare:
        raise ValueError(f'{path}: a class needs {_FEWEST} letters for three splits, found {rare}')
    return letters, labels


def _check_letter(what: str, letter: np.ndarray) -> None:
    if letter.ndim != 2 or len(letter) != 3 or letter.dtype.kind not in 'fiu':
        raise ValueError(f'{what}: expected numbers of shape (3, steps), found {letter.dtype} of {letter.shape}')
    if not np.isfinite(letter).all():
        raise ValueError(f'{what} has NaN or inf')
    if not letter.any():
        raise ValueError(f'{what} is empty: the pen does not move')


def _fit(letter: np.ndarray) -> np.ndarray:
    """``(3, 182)``: without the zeros at the ends; the last values repeated, or the end cut off."""
    steps = np.flatnonzero(letter.any(axis=0))
    letter = letter[:, steps[0]:steps[-1] + 1][:, :_LENGTH].astype(float)
    return np.pad(letter, ((0, 0), (0, _LENGTH - letter.shape[1])), mode='edge')


def _indices(labels: np.ndarray, split: str) -> Tuple[np.ndarray, np.ndarray]:
    """The letters of the training split, and those of ``split``."""
    try:
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ValueError('the characters need scikit-learn: pip install scikit-learn') from error
    train, rest = train_test_split(np.arange(len(labels)), train_size=0.7, random_state=0, stratify=labels)
    validation, test = train_test_split(rest, train_size=0.5, random_state=1, stratify=labels[rest])
    return train, {'train': train, 'validation': validation, 'test': test}[split]
