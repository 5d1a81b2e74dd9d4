"""Images as sequences of their pixels, row by row: the digits, MNIST, CIFAR10."""
import json
import tarfile
import zlib
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Iterator, List

import numpy as np
import torch
from torch import Tensor

from ..utils.download import DownloadNeededError, locked, missing
from ..utils.errors import unreadable_file
from .digits import Digits
from .sequence_dataset import InMemorySequences

# Normalization in units of the pixels, 0 to 255. The digits' numbers are those of their training split. MNIST's are
# the common ones of its training images. CIFAR10 has ImageNet's, as in the original release.
_DIGITS_MEAN, _DIGITS_STD = 77.885591, 95.869077
_MNIST_MEAN, _MNIST_STD = 0.1307 * 255, 0.3081 * 255
_CIFAR10_MEAN, _CIFAR10_STD = (
    255 * torch.tensor(numbers).unsqueeze(1) for numbers in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

# MD5 of MNIST's unpacked files. torchvision has the checksums of the packed files only, and takes a file whose
# unpacking was interrupted for complete.
MNIST_MD5 = {
    'train-images-idx3-ubyte': '6bbc9ace898e44ae57da46a324031adb',
    'train-labels-idx1-ubyte': 'a25bea736e30d166cdddb491f175f624',
    't10k-images-idx3-ubyte': '2646ac647ad5339dbf082846283269ea',
    't10k-labels-idx1-ubyte': '27ae3e4e09519cfbb04c329615203637',
}

# Orders made by numpy.random.RandomState(0).permutation(length), a stream that NumPy has frozen. The original release
# samples the order of its permuted MNIST from NumPy's global generator, which its commands seed with 0. Its code
# samples nothing from that generator before, so its order should be the same.
_PERMUTATIONS = Path(__file__).with_name('permutations.json')


def open_digits(root: Path, split: str, download: bool, permuted: bool) -> InMemorySequences:
    """Open the embedded digits: 8x8 gray pixels as 64 steps; 1,437 for training, 360 for validation."""
    digits = Digits(split)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in digits.images]))
    return InMemorySequences(
        f'split {split!r} of the digits', digits.classes, pixels.reshape(-1, 1, 64), digits.labels,
        _DIGITS_MEAN, _DIGITS_STD, permutation('permuted-digits', 64) if permuted else None, (8, 8))


def open_mnist(root: Path, split: str, download: bool, permuted: bool) -> InMemorySequences:
    """Open MNIST from torchvision's folder, ``root/MNIST/raw``: 28x28 gray pixels as 784 steps; 60,000 and 10,000.

    The files are compared with their checksums before they are read.
    """
    from torchvision.datasets import mnist
    folder = root / 'MNIST' / 'raw'
    own = [name for name in MNIST_MD5 if name.startswith('train' if split == 'train' else 't10k')]
    absent = next((folder / name for name in own if not (folder / name).is_file()), None)
    if absent:
        mirrors = mnist.MNIST.mirrors
        if not download:
            raise missing(absent, f'{mirrors[0]}{absent.name}.gz, unpacked,')
        for name in MNIST_MD5:
            if (folder / name).is_file():  # torchvision would fail at a damaged file without naming it
                _check_mnist(folder / name)
        with locked(root), _named_errors(' or '.join(mirrors), folder):
            mnist.MNIST(str(root), download=True)
    for name in own:
        _check_mnist(folder / name)
    images, labels = (str(folder / name) for name in own)
    return InMemorySequences(
        f'split {split!r} of MNIST in {root}', tuple('0123456789'), mnist.read_image_file(images).reshape(-1, 1, 784),
        mnist.read_label_file(labels).tolist(), _MNIST_MEAN, _MNIST_STD,
        permutation('permuted-mnist', 784) if permuted else None, (28, 28))


def _check_mnist(path: Path) -> None:
    from torchvision.datasets.utils import check_md5
    md5 = MNIST_MD5[path.name]
    try:
        is_published = check_md5(str(path), md5)
    except OSError as error:
        raise unreadable_file(path, error) from error
    if not is_published:
        raise DownloadNeededError(f'{path} is damaged, or another file: its MD5 is not {md5}; remove it and')


def open_cifar10(root: Path, split: str, download: bool) -> InMemorySequences:
    """Open CIFAR10 from torchvision's folder, ``root/cifar-10-batches-py``: 32x32 pixels as 1,024 steps.

    The splits have 50,000 and 10,000 images. All files are compared with their checksums before one is read.
    """
    from torchvision.datasets import CIFAR10
    folder, is_training = root / CIFAR10.base_folder, split == 'train'
    if download and _bad_cifar10_files(folder):
        with locked(root), _named_errors(CIFAR10.url, root / CIFAR10.filename):
            CIFAR10(str(root), is_training, download=True)
    bad = _bad_cifar10_files(folder)
    if bad:
        raise DownloadNeededError(
            f'{folder} lacks {bad[0]}, or it is damaged ({len(bad)} such files):',
            f', or unpack {CIFAR10.url} in {root} by hand')
    found = CIFAR10(str(root), is_training)
    pixels = torch.from_numpy(found.data.transpose(0, 3, 1, 2).reshape(-1, 3, 1024).copy())
    return InMemorySequences(
        f'split {split!r} of CIFAR10 in {root}', found.classes, pixels, found.targets, _CIFAR10_MEAN, _CIFAR10_STD,
        image_size=(32, 32))


def _bad_cifar10_files(folder: Path) -> List[str]:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity
    files = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta['filename'], CIFAR10.meta['md5']]]
    return [name for name, md5 in files if not check_integrity(str(folder / name), md5)]


@contextmanager
def _named_errors(url: str, path: Path) -> Iterator[None]:
    """Raise torchvision's failures to download or unpack as ValueErrors of one line."""
    try:
        yield
    except (EOFError, HTTPException, OSError, RuntimeError, ValueError, tarfile.TarError, zlib.error) as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise ValueError(
            f'{url} cannot be downloaded or unpacked ({reason}); it can be put at {path} by hand') from error


def permutation(name: str, length: int) -> Tensor:
    """Return the fixed order of a permuted data set: step i is the element at position ``order[i]``.

    Args:
        name: Name of the data set, 'permuted-mnist' or 'permuted-digits'.
        length: Length of its sequences.

    Returns:
        ``(length,)``, int64.

    Raises:
        ValueError: If the package's file of orders is damaged.
    """
    try:
        order = json.loads(_PERMUTATIONS.read_text())[name]
        is_order = sorted(order) == list(range(length))
    except (OSError, LookupError, TypeError, ValueError):
        is_order = False
    if not is_order:
        raise ValueError(
            f'{_PERMUTATIONS} is damaged: expected the numbers 0 to {length - 1} as {name!r}; reinstall the package')
    return torch.tensor(order)
