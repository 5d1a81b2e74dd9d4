"""Speech Commands: ten spoken words, as sound and as cepstral coefficients.

Warden, Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition, 2018, arXiv:1804.03209; version 0.02.
"""
import hashlib
import logging
import re
from pathlib import Path
from typing import Any, Dict, List, Sequence, Set

import torch
from torch import Tensor
from tqdm import tqdm

from smpconv_models.utils.errors import first_line

from ..utils.download import DownloadNeededError, check_sha256, extract_tar, fetch, locked, missing
from .audio import RATE, read_wave
from .cache import Tensors, cached
from .mfcc import mfcc
from .sequence_dataset import SequenceDataset, StoredSequences

_logger = logging.getLogger(__name__)

URL = 'https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz'
SHA256 = 'af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58'
ARCHIVE = 'speech_commands_v0.02.tar.gz'
WORDS = ('yes', 'no', 'up', 'down', 'left', 'right', 'on', 'off', 'stop', 'go')
CLIPS = {'train': 30_769, 'validation': 3_703, 'test': 4_074}  # of these words, by the archive's lists
_LISTS = {'validation': 'validation_list.txt', 'test': 'testing_list.txt'}
_VERSION = 1  # of what is cached
_BATCH = 256  # clips whose coefficients are computed at a time


class Waves(SequenceDataset):
    """Clips, read from their files when they are asked for.

    A file that can't be read is an error of its item: ValueError or OSError, with the file's name.
    """

    def __init__(self, what: str, folder: Path, names: Sequence[str], mean: Any, std: Any) -> None:
        super().__init__(what, WORDS, (1, RATE), _labels(names), mean, std)
        self._folder, self._names = folder, list(names)

    def name(self, index: int) -> str:
        return str(self._folder / self._names[index])

    def _read(self, index: int) -> Tensor:
        return read_wave(self._folder / self._names[index]).unsqueeze(0)


class Coefficients(StoredSequences):
    """Clips' cepstral coefficients, which know the clips' files."""

    def __init__(self, what: str, folder: Path, names: Sequence[str], found: Tensors) -> None:
        super().__init__(what, WORDS, found['coefficients'], _labels(names), found['mean'], found['std'])
        self._folder, self._names = folder, list(names)

    def name(self, index: int) -> str:
        return str(self._folder / self._names[index])


def open_waves(root: Path, split: str, download: bool) -> Waves:
    """One second of 16 kHz sound, normalised by one mean and deviation over the training split.

    The splits are the archive's lists, in which a speaker is in one split alone. (The original release divides the
    clips of exactly a second, 34,975, at random; in an order of the file system's, so that its splits can't be made
    again. It normalises each sample's place by itself.)
    """
    folder = _make_sure(root, download)
    names = _members(folder)
    found = cached(
        folder.parent / 'speech-statistics.safetensors', _key(folder, names['train']),
        lambda: _wave_statistics(folder, names['train']))
    return Waves(f'split {split!r} of {folder}', folder, names[split], found['mean'], found['std'])


def open_mfcc(root: Path, split: str, download: bool) -> Coefficients:
    """20 cepstral coefficients at 161 times (:func:`mfcc`), each normalised over the training split.

    They are computed once for a split and kept in ``root/SpeechCommands``: 0.4 GB of the training split.
    """
    folder = _make_sure(root, download)
    names = _members(folder)

    def of_training() -> Tensors:
        return cached(
            folder.parent / 'speech-mfcc-train.safetensors', _key(folder, names['train']),
            lambda: _with_statistics(_coefficients(folder, names['train'])))

    found = of_training() if split == 'train' else cached(
        folder.parent / f'speech-mfcc-{split}.safetensors', _key(folder, names[split] + names['train']),
        lambda: {**of_training(), 'coefficients': _coefficients(folder, names[split])})
    return Coefficients(f'split {split!r} of {folder}', folder, names[split], found)


def _key(folder: Path, names: Sequence[str]) -> str:
    """Of these files with these sizes."""
    try:
        lines = [f'{name} {(folder / name).stat().st_size}' for name in names]
    except OSError as error:
        raise ValueError(f'{folder} cannot be read: {first_line(error)}') from error
    return f'{_VERSION} {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}'


def _labels(names: Sequence[str]) -> List[int]:
    return [WORDS.index(name.partition('/')[0]) for name in names]


# --- files ---


def _make_sure(root: Path, download: bool) -> Path:
    """The folder of the words, where torchaudio looks for it too."""
    folder = root / 'SpeechCommands' / 'speech_commands_v0.02'
    archive = root / ARCHIVE
    if folder.is_dir():
        return folder
    if not download and not archive.is_file():
        raise missing(archive, URL)
    with locked(root):
        if not folder.is_dir():
            if archive.is_file():
                check_sha256(archive, SHA256)
            else:
                fetch(URL, archive, SHA256)
            extract_tar(archive, folder)
    return folder


def _members(folder: Path) -> Dict[str, List[str]]:
    """The files of each split, 'WORD/NAME.wav', sorted."""
    there = {f'{word}/{path.name}' for word in WORDS for path in (folder / word).glob('*.wav')}
    empty = sorted(set(WORDS) - {name.partition('/')[0] for name in there})
    if empty:
        raise DownloadNeededError(
            f'{folder}: expected a folder of wav files for each of {WORDS}, found none for {empty}; remove {folder} '
            'and')
    lists = {part: _listed(folder / name) for part, name in _LISTS.items()}
    twice = sorted(lists['validation'] & lists['test'])
    if twice:
        raise ValueError(f'{folder} has {len(twice)} files in both of its lists, such as {twice[:4]}')
    absent = sorted((lists['validation'] | lists['test']) - there)
    if absent:
        raise ValueError(f'{folder} lacks {len(absent)} files of its lists, such as {absent[:4]}')
    splits = {'train': there - lists['validation'] - lists['test'], **lists}
    counts = {split: len(names) for split, names in splits.items()}
    if counts != CLIPS:  # of a folder that others have unpacked, or lost files of
        raise DownloadNeededError(
            f'{folder}: expected the clips {CLIPS}, found {counts}; remove {folder} and')
    return {split: sorted(names) for split, names in splits.items()}


def _listed(path: Path) -> Set[str]:
    """The files of the ten words that a list names."""
    try:
        lines = path.read_text('utf-8').split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'{path}, the list of a split, cannot be read: {first_line(error)}') from error
    wrong = [line for line in lines if not re.fullmatch(r'[\w-]+/[\w-]+\.wav', line)]
    if wrong or not lines:
        raise ValueError(f'{path}: expected lines such as yes/0132a06d_nohash_1.wav, found {wrong[:1] or "none"}')
    return {line for line in lines if line.partition('/')[0] in WORDS}


# --- what is cached ---


def _coefficients(folder: Path, names: Sequence[str]) -> Tensor:
    """``(N, 20, 161)``. Raises ValueError at a clip that can't be read."""
    parts = []
    with tqdm(total=len(names), desc='cepstral coefficients', unit=' clips', disable=None) as bar:
        for start in range(0, len(names), _BATCH):
            batch = names[start:start + _BATCH]
            parts.append(mfcc(torch.stack([_read_or_refuse(folder / name) for name in batch])))
            bar.update(len(batch))
    return torch.cat(parts)


def _read_or_refuse(path: Path) -> Tensor:
    try:
        return read_wave(path)
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror or first_line(error)}') from error


def _with_statistics(coefficients: Tensor) -> Tensors:
    std, mean = torch.std_mean(coefficients.double(), dim=(0, 2), correction=0)
    return {'coefficients': coefficients, 'mean': mean.float().unsqueeze(1), 'std': std.float().unsqueeze(1)}


def _wave_statistics(folder: Path, names: Sequence[str]) -> Tensors:
    """Mean and deviation of all samples, but for clips that can't be read: these are told when they are asked for."""
    total, squares, clips = 0., 0., 0
    bad: List[str] = []
    for name in tqdm(names, desc='mean and deviation of the sound', unit=' clips', disable=None):
        try:
            samples = read_wave(folder / name).double()
        except (OSError, ValueError) as error:
            bad.append(first_line(error))
            continue
        total, squares, clips = total + samples.sum().item(), squares + samples.square().sum().item(), clips + 1
    if bad:
        _logger.warning('%d of %d clips are left out of mean and deviation, such as: %s', len(bad), len(names), bad[0])
    if not clips or not squares:
        raise ValueError(f'{folder} has no sound to train on: {len(names)} files, {clips} could be read')
    mean = total / (clips * RATE)
    std = (squares / (clips * RATE) - mean ** 2) ** 0.5
    return {'mean': torch.tensor(mean), 'std': torch.tensor(std)}
