"""The embedded digits, and images as sequences of their pixels, row by row: the digits, MNIST, CIFAR10."""
import hashlib
import math
import struct
import tarfile
import zlib
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, Iterator, List, Optional, Tuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from smpconv_models.utils.download import DownloadNeededError, locked, missing
from smpconv_models.utils.errors import unreadable_file

from .registry import EVAL_SYNONYMS, TRAIN_SYNONYMS, TRAIN_TEST, TRAIN_VAL, InMemorySequences, register_sequence_dataset

# Of pixels from 0 to 255. The digits' numbers are computed from their training split. MNIST's are the common ones of
# its training images. CIFAR10's are ImageNet's, as in the original release.
_DIGITS_MEAN, _DIGITS_STD = 77.885591, 95.869077
_MNIST_MEAN, _MNIST_STD = 0.1307 * 255, 0.3081 * 255
_CIFAR10_MEAN, _CIFAR10_STD = (
    255 * torch.tensor(numbers).unsqueeze(1) for numbers in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

# Unpacked files of MNIST: (shape of an item, size in bytes, MD5). torchvision has checksums of the packed files only,
# and takes a file whose unpacking was interrupted for a complete one.
_MNIST_FILES = {
    'train-images-idx3-ubyte': ((28, 28), 47040016, '6bbc9ace898e44ae57da46a324031adb'),
    'train-labels-idx1-ubyte': ((), 60008, 'a25bea736e30d166cdddb491f175f624'),
    't10k-images-idx3-ubyte': ((28, 28), 7840016, '2646ac647ad5339dbf082846283269ea'),
    't10k-labels-idx1-ubyte': ((), 10008, '27ae3e4e09519cfbb04c329615203637'),
}


class Digits(Dataset):
    """Handwritten digits, as scikit-learn ships them: 1,797 gray images of 8x8 pixels, 10 classes.

    The validation split is a fixed, stratified fifth of the images (360).

    Args:
        split: 'train' or 'validation', or a synonym that timm knows.
        mode: PIL mode of the images, 'L' (gray) or 'RGB'.
        transform: Transform of the PIL image; timm's loader sets it.

    Raises:
        ValueError: If the split is unknown or scikit-learn is not installed.
    """

    classes = tuple('0123456789')

    def __init__(self, split: str, mode: str = 'L', transform: Any = None) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ValueError('the digits need scikit-learn: pip install scikit-learn') from error
        if split not in TRAIN_SYNONYMS + EVAL_SYNONYMS:
            raise ValueError(f'split of the digits must be one of {TRAIN_SYNONYMS + EVAL_SYNONYMS}, got {split!r}')
        images, labels = load_digits(return_X_y=True)
        train, validation = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
        indices = train if split in TRAIN_SYNONYMS else validation
        pixels = (images[indices] * (255 / 16)).round().astype('uint8').reshape(-1, 8, 8)
        self.images = [Image.fromarray(image).convert(mode) for image in pixels]
        self.labels = labels[indices].tolist()
        self.transform = transform

    @property
    def targets(self) -> List[int]:
        """Class indices of all images, by torchvision's name."""
        return self.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image = self.images[index]
        return (image if self.transform is None else self.transform(image)), self.labels[index]


@register_sequence_dataset('digits', 'permuted-digits', splits=TRAIN_VAL, needs_folder=False)
def open_digits(name: str, root: Path, split: str, download: bool) -> InMemorySequences:
    """Open the embedded digits: 8x8 gray pixels as 64 steps; 1,437 images to train, 360 to validate."""
    digits = Digits(split)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in digits.images]))
    return InMemorySequences(
        f'split {split!r} of the digits', digits.classes, pixels.reshape(-1, 1, 64), digits.labels, _DIGITS_MEAN,
        _DIGITS_STD, _step_order(name, 64), (8, 8))


@register_sequence_dataset('mnist', 'permuted-mnist', splits=TRAIN_TEST)
def open_mnist(name: str, root: Path, split: str, download: bool) -> InMemorySequences:
    """Open MNIST in torchvision's folder, ``root/MNIST/raw``: 28x28 gray pixels as 784 steps; 60,000 and 10,000."""
    folder = root / 'MNIST' / 'raw'
    paths = [folder / file for file in _MNIST_FILES if file.startswith('train' if split == 'train' else 't10k')]
    absent = [path for path in paths if not path.is_file()]
    if absent:
        _download_mnist(root, absent[0], download)
    pixels, labels = map(_read_mnist_file, paths)
    if len(pixels) != len(labels) or labels.max(initial=0) > 9:
        raise DownloadNeededError(
            f'{folder}: expected a label from 0 to 9 for each of {len(pixels)} images of split {split!r}, '
            f'found {len(labels)} from 0 to {labels.max(initial=0)}; remove both files and')
    return InMemorySequences(
        f'split {split!r} of MNIST in {root}', tuple('0123456789'), torch.tensor(pixels).reshape(-1, 1, 784),
        labels.tolist(), _MNIST_MEAN, _MNIST_STD, _step_order(name, 784), (28, 28))


@register_sequence_dataset('cifar10', splits=TRAIN_TEST)
def open_cifar10(name: str, root: Path, split: str, download: bool) -> InMemorySequences:
    """Open CIFAR10 in torchvision's folder: 32x32 pixels as 1,024 steps; 50,000 images to train, 10,000 to test.

    The checksums of all files are compared before a file is read.
    """
    from torchvision.datasets import CIFAR10
    if download and _damaged_cifar10_files(root):
        with locked(root), _download_errors(CIFAR10.url, root / CIFAR10.filename):
            CIFAR10(str(root), split == 'train', download=True)
    damaged = _damaged_cifar10_files(root)
    if damaged:
        raise DownloadNeededError(
            f'{root / CIFAR10.base_folder}: {damaged[0]} is missing or damaged ({len(damaged)} such files):',
            f', or unpack {CIFAR10.url} in {root} by hand')
    found = CIFAR10(str(root), split == 'train')
    pixels = torch.from_numpy(found.data.transpose(0, 3, 1, 2).reshape(-1, 3, 1024).copy())
    return InMemorySequences(
        f'split {split!r} of CIFAR10 in {root}', found.classes, pixels, found.targets, _CIFAR10_MEAN, _CIFAR10_STD,
        image_size=(32, 32))


def _step_order(name: str, length: int) -> Optional[Tensor]:
    """Return the position of each step in a permuted data set, ``(length,)``, or None if it is not permuted.

    NumPy has frozen the stream. The original release samples the order of its permuted MNIST from NumPy's global
    generator, whose seed its commands set to 0. Nothing in its code samples before that.
    """
    if not name.startswith('permuted-'):
        return None
    return torch.from_numpy(np.random.RandomState(0).permutation(length))


def _download_mnist(root: Path, absent: Path, download: bool) -> None:
    from torchvision.datasets import MNIST
    if not download:
        raise missing(absent, f'{MNIST.mirrors[0]}{absent.name}.gz, unpacked,')
    for path in map(absent.with_name, _MNIST_FILES):
        if path.is_file():  # torchvision would fail at a damaged file of either split, and not name the file
            _read_mnist_file(path)
    with locked(root), _download_errors(' or '.join(MNIST.mirrors), absent.parent):
        MNIST(str(root), download=True)


def _read_mnist_file(path: Path) -> np.ndarray:
    """Return the bytes of an IDX file, ``(N, *item)``, once header, size and, at the published size, MD5 are right."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable_file(path, error) from error
    item, published_size, md5 = _MNIST_FILES[path.name]
    dimensions = 1 + len(item)
    start = 4 * (1 + dimensions)
    magic, *sizes = struct.unpack(f'>{1 + dimensions}I', content[:start].ljust(start, b'\0'))
    problem = ''
    if magic != 0x800 + dimensions:
        problem = f'expected the IDX header of bytes in {dimensions} dimensions'
    elif tuple(sizes[1:]) != item:
        problem = f'expected items of shape {item}, found {tuple(sizes[1:])}'
    elif len(content) != start + math.prod(sizes):
        problem = f'expected {start + math.prod(sizes)} bytes by its header, found {len(content)}'
    elif len(content) == published_size and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        problem = f'its MD5 is not {md5}'
    if problem:
        raise DownloadNeededError(f'{path} is damaged: {problem}; remove it and')
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)


def _damaged_cifar10_files(root: Path) -> List[str]:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity
    files = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta['filename'], CIFAR10.meta['md5']]]
    return [name for name, md5 in files if not check_integrity(str(root / CIFAR10.base_folder / name), md5)]


@contextmanager
def _download_errors(url: str, path: Path) -> Iterator[None]:
    """Raise torchvision's errors of downloading and unpacking as a ValueError of one line."""
    try:
        yield
    except (EOFError, HTTPException, OSError, RuntimeError, ValueError, tarfile.TarError, zlib.error) as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise ValueError(
            f'{url} cannot be downloaded or unpacked ({reason}); it can be put at {path} by hand') from error
