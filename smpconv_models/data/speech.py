"""Speech Commands: ten spoken words, as waveforms and as cepstral coefficients.

Warden, Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition, 2018, arXiv:1804.03209; version 0.02.
"""
import functools
import hashlib
import logging
import math
import re
import wave
from pathlib import Path
from typing import Dict, List, Sequence, Set

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..utils.download import DownloadNeededError, check_sha256, extract_tar, fetch, locked, missing
from ..utils.errors import first_line, unreadable_file
from .cache import Tensors, cached_tensors
from .sequence_dataset import InMemorySequences, SequenceDataset

_logger = logging.getLogger(__name__)

URL = 'https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz'
SHA256 = 'af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58'
ARCHIVE = 'speech_commands_v0.02.tar.gz'
WORDS = ('yes', 'no', 'up', 'down', 'left', 'right', 'on', 'off', 'stop', 'go')
CLIPS = {'train': 30_769, 'validation': 3_703, 'test': 4_074}  # clips of these words in the archive's lists
_LISTS = {'validation': 'validation_list.txt', 'test': 'testing_list.txt'}
_CACHE_VERSION = 1
_BATCH = 256  # clips whose coefficients are computed at a time

_RATE = 16000  # Hz; also the number of samples in a clip of one second
_WINDOW, _HOP = 200, 100  # samples: 12.5 ms and half of it
_BANDS, _COEFFICIENTS = 64, 20
_LOG_OFFSET = 1e-6  # added to the energies before their logarithm


class Waveforms(SequenceDataset):
    """Clips that are read from their files on access.

    An item whose file cannot be read raises ValueError or OSError with the path of the file.
    """

    def _read(self, index: int) -> Tensor:
        return read_wav(Path(self.name(index))).unsqueeze(0)


def open_waveforms(root: Path, split: str, download: bool) -> Waveforms:
    """Open clips of one second at 16 kHz, normalized by one mean and deviation over the training split.

    The splits are the archive's lists, in which each speaker belongs to one split. The original release divides the
    34,975 clips of exactly one second at random, over the order of the file system, so its splits cannot be
    reproduced. The release normalizes each position of a sample by its own statistics.
    """
    folder = _prepare_folder(root, download)
    clips = _split_clips(folder)
    statistics = cached_tensors(
        folder.parent / 'speech-statistics.safetensors', _cache_key(folder, clips['train']),
        lambda: _waveform_statistics(folder, clips['train']))
    return Waveforms(
        f'split {split!r} of {folder}', WORDS, (1, _RATE), _labels(clips[split]), **statistics,
        names=_paths(folder, clips[split]))


def open_mfcc(root: Path, split: str, download: bool) -> InMemorySequences:
    """Open 20 cepstral coefficients at 161 times (:func:`mfcc`), each normalized over the training split.

    The coefficients of a split are computed once and kept in ``root/SpeechCommands``: 0.4 GB for the training split.
    """
    folder = _prepare_folder(root, download)
    clips = _split_clips(folder)

    def of_training() -> Tensors:
        return cached_tensors(
            folder.parent / 'speech-mfcc-train.safetensors', _cache_key(folder, clips['train']),
            lambda: _with_statistics(_coefficients(folder, clips['train'])))

    found = of_training() if split == 'train' else cached_tensors(
        folder.parent / f'speech-mfcc-{split}.safetensors', _cache_key(folder, clips[split] + clips['train']),
        lambda: {**of_training(), 'coefficients': _coefficients(folder, clips[split])})
    return InMemorySequences(
        f'split {split!r} of {folder}', WORDS, found['coefficients'], _labels(clips[split]), found['mean'],
        found['std'], names=_paths(folder, clips[split]))


def _labels(clips: Sequence[str]) -> List[int]:
    return [WORDS.index(clip.partition('/')[0]) for clip in clips]


def _paths(folder: Path, clips: Sequence[str]) -> List[str]:
    return [str(folder / clip) for clip in clips]


# --- files ---


def _prepare_folder(root: Path, download: bool) -> Path:
    """Return the folder of the words, which torchaudio uses too, after extracting the archive if necessary."""
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


def _split_clips(folder: Path) -> Dict[str, List[str]]:
    """Return the clips of each split, 'WORD/NAME.wav', sorted."""
    found = {f'{word}/{path.name}' for word in WORDS for path in (folder / word).glob('*.wav')}
    empty = sorted(set(WORDS) - {clip.partition('/')[0] for clip in found})
    if empty:
        raise DownloadNeededError(
            f'{folder}: expected a folder of wav files for each of {WORDS}, found none for {empty}; remove {folder} '
            'and')
    lists = {split: _read_list(folder / name) for split, name in _LISTS.items()}
    twice = sorted(lists['validation'] & lists['test'])
    if twice:
        raise ValueError(f'{folder} has {len(twice)} files in both of its lists, such as {twice[:4]}')
    absent = sorted((lists['validation'] | lists['test']) - found)
    if absent:
        raise ValueError(f'{folder} lacks {len(absent)} files of its lists, such as {absent[:4]}')
    splits = {'train': found - lists['validation'] - lists['test'], **lists}
    counts = {split: len(clips) for split, clips in splits.items()}
    if counts != CLIPS:  # in a folder that other programs extracted, or that lost files
        raise DownloadNeededError(f'{folder}: expected the clips {CLIPS}, found {counts}; remove {folder} and')
    return {split: sorted(clips) for split, clips in splits.items()}


def _read_list(path: Path) -> Set[str]:
    """Return the clips of the ten words in the list of a split."""
    try:
        lines = path.read_text('utf-8').split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'{path}, the list of a split, cannot be read: {first_line(error)}') from error
    wrong = [line for line in lines if not re.fullmatch(r'[\w-]+/[\w-]+\.wav', line)]
    if wrong or not lines:
        raise ValueError(f'{path}: expected lines such as yes/0132a06d_nohash_1.wav, found {wrong[:1] or "none"}')
    return {line for line in lines if line.partition('/')[0] in WORDS}


def read_wav(path: Path) -> Tensor:
    """Read a clip of at most one second at 16 kHz.

    A shorter clip is padded with silence at its end. The words keep their times, and the causal network, which
    answers at the last step, has received all of them.

    Returns:
        ``(16000,)``, float32 in [-1, 1).

    Raises:
        ValueError: If the file is no such sound, or damaged.
        OSError: If the file cannot be read.
    """
    try:
        with wave.open(str(path), 'rb') as file:
            found = (file.getnchannels(), 8 * file.getsampwidth(), file.getframerate())
            count = file.getnframes()
            content = file.readframes(min(count, _RATE))
    except (EOFError, wave.Error) as error:
        raise ValueError(f'{path} is no sound file, or damaged: {first_line(error)}') from error
    if found != (1, 16, _RATE):
        raise ValueError(f'{path}: expected 1 channel of 16 bits at {_RATE} Hz, found {found[0]} of {found[1]} at '
                         f'{found[2]} Hz')
    if not 0 < count <= _RATE:
        raise ValueError(f'{path}: expected 1 to {_RATE} samples, found {count}')
    if len(content) != 2 * count:
        raise ValueError(f'{path} is damaged: expected {2 * count} bytes of sound by its header, found {len(content)}')
    samples = torch.zeros(_RATE)
    samples[:count] = torch.from_numpy(np.frombuffer(content, '<i2').astype(np.float32))
    return samples / 2 ** 15


# --- cached tensors ---


def _cache_key(folder: Path, clips: Sequence[str]) -> str:
    """Return a line that depends on the names and the sizes of files."""
    try:
        lines = [f'{clip} {(folder / clip).stat().st_size}' for clip in clips]
    except OSError as error:
        raise ValueError(f'{folder} cannot be read: {first_line(error)}') from error
    return f'{_CACHE_VERSION} {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}'


def _waveform_statistics(folder: Path, clips: Sequence[str]) -> Tensors:
    """Return mean and deviation of all samples, without the clips that cannot be read."""
    total, squares, count = 0., 0., 0
    bad: List[str] = []
    for clip in tqdm(clips, desc='mean and deviation of the sound', unit=' clips', disable=None):
        try:
            samples = read_wav(folder / clip).double()
        except (OSError, ValueError) as error:
            bad.append(first_line(error))
            continue
        total, squares, count = total + samples.sum().item(), squares + samples.square().sum().item(), count + 1
    if bad:
        _logger.warning('%d of %d clips are left out of mean and deviation, such as: %s', len(bad), len(clips), bad[0])
    if not count or not squares:
        raise ValueError(f'{folder} has no sound to train on: {len(clips)} files, {count} could be read')
    mean = total / (count * _RATE)
    std = (squares / (count * _RATE) - mean ** 2) ** 0.5
    return {'mean': torch.tensor(mean), 'std': torch.tensor(std)}


def _coefficients(folder: Path, clips: Sequence[str]) -> Tensor:
    """Return ``(N, 20, 161)``; raise ValueError at a clip that cannot be read."""
    parts = []
    with tqdm(total=len(clips), desc='cepstral coefficients', unit=' clips', disable=None) as bar:
        for start in range(0, len(clips), _BATCH):
            samples = []
            for clip in clips[start:start + _BATCH]:
                try:
                    samples.append(read_wav(folder / clip))
                except OSError as error:
                    raise unreadable_file(folder / clip, error) from error
            parts.append(mfcc(torch.stack(samples)))
            bar.update(len(samples))
    return torch.cat(parts)


def _with_statistics(coefficients: Tensor) -> Tensors:
    std, mean = torch.std_mean(coefficients.double(), dim=(0, 2), correction=0)
    return {'coefficients': coefficients, 'mean': mean.float().unsqueeze(1), 'std': std.float().unsqueeze(1)}


# --- cepstral coefficients ---


def mfcc(samples: Tensor) -> Tensor:
    """Return mel-frequency cepstral coefficients of sound at 16 kHz, as torchaudio computes them.

    The power of 12.5 ms Hann windows, at a distance of half a window, is summed in 64 bands. The logarithms of the
    sums are transformed by the first 20 rows of an orthonormal cosine transform. The sound is reflected at its ends.

    The original release uses ``torchaudio.transforms.MFCC(sample_rate=16000, n_mfcc=20, log_mels=True,
    melkwargs=dict(n_fft=200, n_mels=64))``, which gives the same numbers. torchaudio is not released for the newest
    PyTorch.

    Args:
        samples: ``(..., S)``, more than 100 samples, float32 or float64.

    Returns:
        ``(..., 20, 1 + S // 100)`` in the dtype of the samples; 161 steps for one second.
    """
    flat = samples.reshape(-1, samples.shape[-1])
    window = torch.hann_window(_WINDOW, dtype=samples.dtype, device=samples.device)
    power = torch.stft(flat, _WINDOW, _HOP, window=window, return_complex=True).abs().square()  # (N, 101, T)
    energies = _mel_filters().to(samples) @ power
    coefficients = _cosines().to(samples) @ (energies + _LOG_OFFSET).log()
    return coefficients.reshape(*samples.shape[:-1], *coefficients.shape[1:])


@functools.lru_cache(maxsize=1)
def _mel_filters() -> Tensor:
    """Return ``(64, 101)``: triangles over frequency, between neighbors of centers that are even on the mel scale.

    The lowest triangles are narrower than the distance of two frequencies. Some contain no frequency and are zero.
    """
    frequencies = torch.linspace(0, _RATE / 2, _WINDOW // 2 + 1, dtype=torch.float64)
    top = 2595 * math.log10(1 + _RATE / 2 / 700)
    centers = 700 * (10 ** (torch.linspace(0, top, _BANDS + 2, dtype=torch.float64) / 2595) - 1)
    rising = (frequencies - centers[:-2, None]) / (centers[1:-1] - centers[:-2])[:, None]
    falling = (centers[2:, None] - frequencies) / (centers[2:] - centers[1:-1])[:, None]
    return torch.minimum(rising, falling).relu()


@functools.lru_cache(maxsize=1)
def _cosines() -> Tensor:
    """Return ``(20, 64)``, the first rows of the orthonormal cosine transform of the second type."""
    position = (torch.arange(_BANDS, dtype=torch.float64) + 0.5) * math.pi / _BANDS
    rows = torch.cos(torch.arange(_COEFFICIENTS, dtype=torch.float64)[:, None] * position) * math.sqrt(2 / _BANDS)
    rows[0] /= math.sqrt(2)
    return rows
