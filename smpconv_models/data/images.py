"""Images as sequences of their pixels, row by row: the digits, MNIST, CIFAR10."""
import tarfile
import zlib
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from smpconv_models.data.digits import Digits

from ..utils.download import DownloadNeededError, locked, missing
from .idx import read_idx
from .permutations import permutation
from .sequence_dataset import StoredSequences

# In the pixels' numbers, 0 to 255. Of the digits' training split, counted; of MNIST's training images as everybody
# gives them; of ImageNet's for CIFAR10, as the original release has it.
_DIGITS_MEAN, _DIGITS_STD = 77.885591, 95.869077
_MNIST_MEAN, _MNIST_STD = 0.1307 * 255, 0.3081 * 255
_CIFAR10_MEAN, _CIFAR10_STD = (
    255 * torch.tensor(numbers).unsqueeze(1) for numbers in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def open_digits(split: str, permuted: bool) -> StoredSequences:
    """The embedded digits: 8x8 pixels of gray as 64 steps; 1,437 for training, 360 held out."""
    digits = Digits('train' if split == 'train' else 'validation')
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in digits.images]))
    return StoredSequences(
        f'split {split!r} of the digits', digits.classes, pixels.reshape(-1, 1, 64), digits.labels,
        _DIGITS_MEAN, _DIGITS_STD, _order('permuted-digits', 64, permuted), (8, 8))


def _order(name: str, length: int, permuted: bool) -> Optional[Tensor]:
    return permutation(name, length) if permuted else None


def open_mnist(root: Path, split: str, download: bool, permuted: bool) -> StoredSequences:
    """MNIST from torchvision's folder, ``root/MNIST/raw``: 28x28 pixels of gray as 784 steps; 60,000 and 10,000."""
    folder = root / 'MNIST' / 'raw'
    files = {
        part: {folder / f'{part}-images-idx3-ubyte': (28, 28), folder / f'{part}-labels-idx1-ubyte': ()}
        for part in ('train', 't10k')}
    own = files['train' if split == 'train' else 't10k']
    absent = [path for path in own if not path.is_file()]
    if absent:
        _fetch_mnist(root, {**files['train'], **files['t10k']}, absent[0], download)
    pixels, labels = (read_idx(path, item) for path, item in own.items())
    if len(pixels) != len(labels) or labels.max(initial=0) > 9:
        raise DownloadNeededError(
            f'{folder}: expected a label from 0 to 9 for each of {len(pixels)} images of split {split!r}, '
            f'found {len(labels)} from 0 to {labels.max(initial=0)}; remove both files and')
    return StoredSequences(
        f'split {split!r} of MNIST in {root}', tuple('0123456789'), torch.tensor(pixels).reshape(-1, 1, 784),
        labels.tolist(), _MNIST_MEAN, _MNIST_STD, _order('permuted-mnist', 784, permuted), (28, 28))


def _fetch_mnist(root: Path, files: Dict[Path, Tuple[int, ...]], absent: Path, download: bool) -> None:
    from torchvision.datasets import MNIST
    if not download:
        raise missing(absent, f'{MNIST.mirrors[0]}{absent.name}.gz, unpacked,')
    for path, item in files.items():
        if path.is_file():  # torchvision would fail at a damaged one of either part, and not say of which
            read_idx(path, item)
    with locked(root), _told(' or '.join(MNIST.mirrors), absent.parent):
        MNIST(str(root), download=True)


def open_cifar10(root: Path, split: str, download: bool) -> StoredSequences:
    """CIFAR10 from torchvision's folder, ``root/cifar-10-batches-py``: 32x32 pixels as 1,024 steps; 50,000 and 10,000.

    torchvision holds all files against their checksums before it reads one.
    """
    from torchvision.datasets import CIFAR10
    is_training = split == 'train'
    if download and _cifar10_lacks(root):
        with locked(root), _told(CIFAR10.url, root / CIFAR10.filename):
            CIFAR10(str(root), is_training, download=True)
    absent = _cifar10_lacks(root)
    if absent:
        raise DownloadNeededError(
            f'{root / CIFAR10.base_folder} lacks {absent[0]}, or it is damaged ({len(absent)} such files):',
            f', or unpack {CIFAR10.url} in {root} by hand')
    found = CIFAR10(str(root), is_training)
    pixels = torch.from_numpy(found.data.transpose(0, 3, 1, 2).reshape(-1, 3, 1024).copy())
    return StoredSequences(
        f'split {split!r} of CIFAR10 in {root}', found.classes, pixels, found.targets, _CIFAR10_MEAN, _CIFAR10_STD,
        image_size=(32, 32))


def _cifar10_lacks(root: Path) -> List[str]:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity
    files = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta['filename'], CIFAR10.meta['md5']]]
    folder = root / CIFAR10.base_folder
    return [name for name, md5 in files if not check_integrity(str(folder / name), md5)]


@contextmanager
def _told(url: str, path: Path) -> Iterator[None]:
    """torchvision's failures to download or unpack, in a line."""
    try:
        yield
    except (EOFError, HTTPException, OSError, RuntimeError, ValueError, tarfile.TarError, zlib.error) as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise ValueError(
            f'{url} cannot be downloaded or unpacked ({reason}); it can be put at {path} by hand') from error
