"""Speech Commands: ten spoken words, as sound and as cepstral coefficients.

Warden, Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition, 2018, arXiv:1804.03209; version 0.02.
"""
import functools
import hashlib
import logging
import math
import os
import re
import wave
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from smpconv_models.utils.download import DownloadNeededError, check_sha256, extract_tar, fetch, locked, missing
from smpconv_models.utils.errors import first_line, unreadable_file

from .registry import TRAIN_VAL_TEST, InMemorySequences, SequenceDataset, register_sequence_dataset

_logger = logging.getLogger(__name__)

URL = 'https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz'
SHA256 = 'af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58'
ARCHIVE = 'speech_commands_v0.02.tar.gz'
WORDS = ('yes', 'no', 'up', 'down', 'left', 'right', 'on', 'off', 'stop', 'go')
CLIPS = {'train': 30_769, 'validation': 3_703, 'test': 4_074}  # of these words, by the lists of the archive
Tensors = Dict[str, Tensor]
_SplitFiles = Dict[str, List[str]]  # sorted files of each split, 'WORD/NAME.wav'
_LISTS = {'validation': 'validation_list.txt', 'test': 'testing_list.txt'}
_CACHE_VERSION = 1
_BATCH = 256  # clips whose coefficients are computed at once

RATE = 16000  # samples of a second, and of a clip
_WINDOW, _HOP = 200, 100  # samples: 12.5 ms, and half of it
_BANDS, _COEFFICIENTS = 64, 20
_LOG_OFFSET = 1e-6  # added to the energies before the logarithm


class SpeechCommands(SequenceDataset):
    """Clips that are loaded on access; a file that cannot be read raises a ValueError or OSError with its name."""

    def _read(self, index: int) -> Tensor:
        return load_wav(Path(self._files[index])).unsqueeze(0)


@register_sequence_dataset('speech', splits=TRAIN_VAL_TEST)
def open_speech(name: str, root: Path, split: str, download: bool) -> SpeechCommands:
    """Open one-second clips at 16 kHz, normalized by one mean and standard deviation of the training split.

    The splits are the lists of the archive, by which each speaker is in one split only. The original release splits
    the clips of exactly one second (34,975) at random, in the order of the file system, so that its splits cannot be
    reproduced. It normalizes each of the 16,000 positions by statistics of its own.
    """
    folder, names = _prepare(root, download)
    found = cached_tensors(
        folder.parent / 'speech-statistics.safetensors', _cache_key(folder, names['train']),
        lambda: _sound_statistics(folder, names['train']))
    return SpeechCommands(shape=(1, RATE), **_shared_arguments(folder, names[split], split, found))


@register_sequence_dataset('speech-mfcc', splits=TRAIN_VAL_TEST)
def open_speech_mfcc(name: str, root: Path, split: str, download: bool) -> InMemorySequences:
    """Open 20 cepstral coefficients at 161 steps (:func:`mfcc`), each normalized over the training split.

    The coefficients of a split are computed once and kept in ``root/SpeechCommands``: 0.4 GB for the training split.
    """
    folder, names = _prepare(root, download)
    found = _load_mfcc(folder, names, split)
    return InMemorySequences(data=found['coefficients'], **_shared_arguments(folder, names[split], split, found))


def load_wav(path: Path) -> Tensor:
    """Load a clip of at most one second at 16 kHz: ``(16000,)``, float32 in [-1, 1), padded with silence at its end.

    The padding keeps the time of each sample, and the causal network, which answers at the last step, has seen the
    whole clip by then. Raise ValueError if the file has another format or is damaged, OSError if it cannot be read.
    """
    try:
        with wave.open(str(path), 'rb') as file:
            found = (file.getnchannels(), 8 * file.getsampwidth(), file.getframerate())
            count = file.getnframes()
            content = file.readframes(min(count, RATE))
    except (EOFError, wave.Error) as error:
        raise ValueError(f'{path} is not a WAV file or is damaged: {first_line(error)}') from error
    if found != (1, 16, RATE):
        raise ValueError(f'{path}: expected (channels, bits, Hz) of (1, 16, {RATE}), found {found}')
    if not 0 < count <= RATE:
        raise ValueError(f'{path}: expected 1 to {RATE} samples, found {count}')
    if len(content) != 2 * count:
        raise ValueError(f'{path} is damaged: expected {2 * count} bytes of sound by its header, found {len(content)}')
    samples = torch.zeros(RATE)
    samples[:count] = torch.from_numpy(np.frombuffer(content, '<i2').astype(np.float32))
    return samples / 2 ** 15


def mfcc(samples: Tensor) -> Tensor:
    """Return ``(..., 20, 1 + S // 100)`` mel-frequency cepstral coefficients of sound ``(..., S)`` at 16 kHz, S > 100.

    They are torchaudio's, in the dtype of the samples, float32 or float64. The power of 12.5 ms Hann windows, half a
    window apart, with the sound reflected at its ends, is summed in 64 mel bands. The logarithms of the sums are
    transformed by the first 20 rows of an orthonormal DCT. The original release takes
    ``torchaudio.transforms.MFCC(sample_rate=16000, n_mfcc=20, log_mels=True, melkwargs=dict(n_fft=200, n_mels=64))``;
    torchaudio is no longer built for the newest PyTorch.
    """
    flat = samples.reshape(-1, samples.shape[-1])
    window = torch.hann_window(_WINDOW, dtype=samples.dtype, device=samples.device)
    power = torch.stft(flat, _WINDOW, _HOP, window=window, return_complex=True).abs().square()  # (N, 101, T)
    energies = _mel_filterbank().to(samples) @ power
    coefficients = _dct_matrix().to(samples) @ (energies + _LOG_OFFSET).log()
    return coefficients.reshape(*samples.shape[:-1], *coefficients.shape[1:])


@functools.lru_cache(maxsize=1)
def _mel_filterbank() -> Tensor:
    """Return ``(64, 101)``: triangles over frequency between the neighbors' centers, evenly spaced on the mel scale.

    The lowest triangles are narrower than the distance of two frequencies, and some are zero at every frequency.
    """
    frequencies = torch.linspace(0, RATE / 2, _WINDOW // 2 + 1, dtype=torch.float64)
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    centers = 700 * (10 ** (torch.linspace(0, top, _BANDS + 2, dtype=torch.float64) / 2595) - 1)
    rising = (frequencies - centers[:-2, None]) / (centers[1:-1] - centers[:-2])[:, None]
    falling = (centers[2:, None] - frequencies) / (centers[2:] - centers[1:-1])[:, None]
    return torch.minimum(rising, falling).relu()


@functools.lru_cache(maxsize=1)
def _dct_matrix() -> Tensor:
    """Return ``(20, 64)``, the first rows of the orthonormal DCT-II."""
    angles = (torch.arange(_BANDS, dtype=torch.float64) + 0.5) * math.pi / _BANDS
    rows = torch.cos(torch.arange(_COEFFICIENTS, dtype=torch.float64)[:, None] * angles) * math.sqrt(2 / _BANDS)
    rows[0] /= math.sqrt(2)
    return rows


def _prepare(root: Path, download: bool) -> Tuple[Path, _SplitFiles]:
    """Return the folder of the words, unpacked where torchaudio expects it too, and the files of its splits."""
    folder = root / 'SpeechCommands' / 'speech_commands_v0.02'
    archive = root / ARCHIVE
    if not folder.is_dir():
        if not download and not archive.is_file():
            raise missing(archive, URL)
        with locked(root):
            if not folder.is_dir():
                if archive.is_file():
                    check_sha256(archive, SHA256)
                else:
                    fetch(URL, archive, SHA256)
                extract_tar(archive, folder)
    return folder, _split_files(folder)


def _split_files(folder: Path) -> _SplitFiles:
    present = {f'{word}/{path.name}' for word in WORDS for path in (folder / word).glob('*.wav')}
    empty = sorted(set(WORDS) - {name.partition('/')[0] for name in present})
    if empty:
        raise DownloadNeededError(
            f'{folder}: expected WAV files for each of {WORDS}, found none for {empty}; remove {folder} and')
    lists = {split: _read_list(folder / file) for split, file in _LISTS.items()}
    twice = sorted(lists['validation'] & lists['test'])
    if twice:
        raise ValueError(f'{folder} has {len(twice)} files in both of its lists, such as {twice[:4]}')
    listed = lists['validation'] | lists['test']
    absent = sorted(listed - present)
    if absent:
        raise ValueError(f'{folder} lacks {len(absent)} files of its lists, such as {absent[:4]}')
    splits = {'train': present - listed, **lists}
    counts = {split: len(names) for split, names in splits.items()}
    if counts != CLIPS:  # if another program unpacked the folder, or files were lost
        raise DownloadNeededError(f'{folder}: expected the clips {CLIPS}, found {counts}; remove {folder} and')
    return {split: sorted(names) for split, names in splits.items()}


def _read_list(path: Path) -> Set[str]:
    """Return the files of the ten words that a list names."""
    try:
        lines = path.read_text('utf-8').split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'{path}, the list of a split, cannot be read: {first_line(error)}') from error
    wrong = [line for line in lines if not re.fullmatch(r'[\w-]+/[\w-]+\.wav', line)]
    if wrong or not lines:
        raise ValueError(f'{path}: expected lines such as yes/0132a06d_nohash_1.wav, found {wrong[:1] or "none"}')
    return {line for line in lines if line.partition('/')[0] in WORDS}


def _shared_arguments(folder: Path, names: Sequence[str], split: str, found: Tensors) -> Dict[str, Any]:
    """Return the arguments that the data sets of sound and of coefficients share."""
    return dict(
        description=f'split {split!r} of {folder}', classes=WORDS, mean=found['mean'], std=found['std'],
        labels=[WORDS.index(name.partition('/')[0]) for name in names], files=[str(folder / name) for name in names])


def _cache_key(folder: Path, names: Sequence[str]) -> str:
    """Return a key of the names and sizes of files."""
    try:
        lines = [f'{name} {(folder / name).stat().st_size}' for name in names]
    except OSError as error:
        raise ValueError(f'{folder} cannot be read: {first_line(error)}') from error
    return f'{_CACHE_VERSION} {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}'


def _load_mfcc(folder: Path, names: _SplitFiles, split: str) -> Tensors:
    """Return the coefficients of a split, and the mean and standard deviation over the training split."""
    def compute() -> Tensors:
        if split != 'train':
            return {**_load_mfcc(folder, names, 'train'), 'coefficients': _coefficients(folder, names[split])}
        coefficients = _coefficients(folder, names['train'])
        std, mean = torch.std_mean(coefficients.double(), dim=(0, 2), correction=0)
        return {'coefficients': coefficients, 'mean': mean.float().unsqueeze(1), 'std': std.float().unsqueeze(1)}

    key = _cache_key(folder, names['train'] if split == 'train' else names[split] + names['train'])
    return cached_tensors(folder.parent / f'speech-mfcc-{split}.safetensors', key, compute)


def _coefficients(folder: Path, names: Sequence[str]) -> Tensor:
    """Return coefficients of shape ``(N, 20, 161)``; raise ValueError if a clip cannot be read."""
    parts, clips = [], []
    for index, name in enumerate(tqdm(names, desc='cepstral coefficients', unit=' clips', disable=None), 1):
        try:
            clips.append(load_wav(folder / name))
        except OSError as error:
            raise unreadable_file(folder / name, error) from error
        if len(clips) == _BATCH or index == len(names):
            parts.append(mfcc(torch.stack(clips)))
            clips = []
    return torch.cat(parts)


def _sound_statistics(folder: Path, names: Sequence[str]) -> Tensors:
    """Return the mean and standard deviation of all samples. Clips that cannot be read are skipped with a warning."""
    total, squares, clips = 0., 0., 0
    bad: List[str] = []
    for name in tqdm(names, desc='mean and standard deviation of the sound', unit=' clips', disable=None):
        try:
            samples = load_wav(folder / name).double()
        except (OSError, ValueError) as error:
            bad.append(first_line(error))
            continue
        total, squares, clips = total + samples.sum().item(), squares + samples.square().sum().item(), clips + 1
    if bad:
        _logger.warning('skipped %d of %d clips in mean and standard deviation, such as: %s',
                        len(bad), len(names), bad[0])
    if not clips or not squares:
        raise ValueError(f'{folder} has no sound to train on: {clips} of {len(names)} clips are readable')
    mean = total / (clips * RATE)
    std = (squares / (clips * RATE) - mean ** 2) ** 0.5
    return {'mean': torch.tensor(mean), 'std': torch.tensor(std)}


# --- results that are computed once and kept in a file ---


def cached_tensors(path: Path, key: str, compute: Callable[[], Tensors]) -> Tensors:
    """Load tensors from a file, or compute the tensors and write the file.

    One process computes the tensors, and the others wait. A file that is damaged or has another key is computed again
    and replaced, with a warning. If the file cannot be written, the tensors are computed on each use. ``path`` is a
    safetensors file, ``key`` a line that stands for everything on which the tensors depend, and ``compute`` a function
    that returns contiguous tensors on the CPU.
    """
    found = _read_cache(path, key, logging.DEBUG)
    if found is not None:
        return found
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path.parent, path.name))
        except ValueError as error:  # then every process computes the tensors, and warns if it cannot write the file
            _logger.debug('%s', error)
        found = _read_cache(path, key, logging.WARNING)  # another process may have written the file
        if found is None:
            found = compute()
            _write_cache(path, key, found)
    return found


def _read_cache(path: Path, key: str, level: int) -> Optional[Tensors]:
    """Return the tensors of an intact file; otherwise log the reason at ``level`` and return None."""
    if not path.exists():
        return None
    try:
        with safe_open(path, 'pt') as file:
            metadata = file.metadata() or {}
            # safe_open is not a dict
            tensors = {name: file.get_tensor(name) for name in file.keys() if metadata.get('key') == key}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        problem = f'cannot be read ({first_line(error)})'
    else:
        if metadata.get('key') != key:
            problem = 'was computed from other files or by another version'
        elif metadata.get('sha256') != _digest(tensors):
            problem = 'is damaged: its checksum differs'
        else:
            return tensors
    _logger.log(level, '%s %s; recomputing it', path, problem)
    return None


def _write_cache(path: Path, key: str, tensors: Tensors) -> None:
    partial = path.with_name(f'{path.name}.partial')
    try:
        # safetensors' save_file would make the file readable by its owner alone
        partial.write_bytes(save(tensors, {'key': key, 'sha256': _digest(tensors)}))
        os.replace(partial, path)
    except OSError as error:
        _logger.warning(
            '%s cannot be written, and is recomputed on each use: %s', path, error.strerror or first_line(error))
        partial.unlink(missing_ok=True)


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.reshape(-1).numpy().view('uint8').data)
    return digest.hexdigest()
