"""Samples, their order, and batches.

An image passes these places from its file to the model in training:

1. :class:`ResumableBatchSampler` lists the samples of each batch as pairs (epoch, index).
2. In a DataLoader worker, :class:`SeededDataset` seeds the random generators by (seed, epoch, index), reads the image
   from its source, converts it with :class:`ReadImage`, and applies the transform that the task has set.
3. :func:`collate_readable` stacks the readable samples to a batch, and lists the unreadable ones.
4. In the main process, :class:`~.distributed.BoundedLoader` bounds the wait for the batch, :class:`CheckedLoader`
   reports the unreadable samples and checks the class indices.
5. On a GPU, timm's ``PrefetchLoader`` copies the batch to the device and normalizes it there.

:class:`SeededIterableDataset` takes the place of 1 and 2 for a stream. Evaluation differs in the sampler and the
transform alone. A source is a map-style data set of (image, target) with two more attributes: ``classes``, the names
of the classes by index or None, and ``name(index)``, the name of an image in messages.
"""
import hashlib
import logging
from dataclasses import replace
from itertools import chain, cycle, islice, repeat
from struct import error as StructError
from subprocess import SubprocessError
from tarfile import TarError
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple, Union
from zlib import error as ZlibError

import numpy as np
import torch
from PIL import EpsImagePlugin, Image, ImageOps
from timm.data import IterableImageDataset
from timm.data.readers.shared_count import SharedCount
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from . import rng
from .class_folders import shown
from .distributed import BoundedLoader

_logger = logging.getLogger(__name__)

# Errors of Pillow's decoders and timm's readers for damaged images. AVIF's decoder raises RuntimeError; timm asserts
# that an image of a Hugging Face data set has either bytes or a path.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, OverflowError, RuntimeError,
    AssertionError, StructError, SubprocessError, TarError, ZlibError, Image.DecompressionBombError,
)

SampleKey = Tuple[int, int]  # epoch and index

# Number of samples that are tried in search of a readable one.
_MAX_REPLACEMENT_TRIES = 1000


# --- single images ---

# Pillow goes by the content of a file, whatever its name, and decodes PostScript by a program, Ghostscript. Without the
# program such a file is unreadable. Set for the process, as libraries of data sets call Pillow as well.
EpsImagePlugin.gs_binary = False

_ORIENTATION = 0x0112  # the EXIF tag

# Pillow's modes with more than 8 bits for each value; Pillow's own conversion clips their values to 255.
DEEP_MODES = ('I', 'I;16', 'I;16B', 'I;16L', 'I;16N', 'F')


class ReadImage(NamedTuple):
    """Function that reads image files and converts them to one mode."""
    mode: str  # mode of the result, ``'L'`` or ``'RGB'``
    exif_orientation: bool = False  # whether to apply the EXIF orientation tag

    def __call__(self, file: Any) -> Image.Image:
        """Return the converted image of a path or an open file."""
        with Image.open(file) as image:
            return self.convert(image)

    def convert(self, image: Image.Image) -> Image.Image:
        """Convert an opened image; raise ValueError if :func:`to_8_bits` does."""
        if self.exif_orientation:
            image = ImageOps.exif_transpose(image)
        return (to_8_bits(image) if image.mode in DEEP_MODES else image).convert(self.mode)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Convert a gray image in one of :data:`DEEP_MODES`, with 16 or 32 bits per value, to 8 bits.

    The scale depends on the mode of an image alone, never on its values. Integers range from 0 (black) to 65535
    (white); the upper byte is kept, as in Pillow's 16-bit RGB images. Floats range from 0. (black) to 1. (white).
    Values outside of the range are a ValueError.
    """
    pixels = np.asarray(image)
    highest = 1. if image.mode == 'F' else 65535
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= highest):  # also true of NaN
        kind = 'float' if image.mode == 'F' else 'integer'
        raise ValueError(f'gray values of a 32-bit {kind} image must be from 0 to {highest:g}, got {low:g} to {high:g}')
    scaled = (pixels * 255).round() if image.mode == 'F' else pixels.astype('int32') >> 8
    return Image.fromarray(scaled.astype('uint8'))


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image, 1 if it has none, without decoding the pixels."""
    # not image.getexif(), which decodes a PNG image to find a tag at the end of the file
    return Image.Image.getexif(image).get(_ORIENTATION, 1)


# --- unreadable samples ---


class Unreadable(NamedTuple):
    """Name of a sample that cannot be read, and the reason, in the place of the sample."""
    name: str
    reason: str

    @classmethod
    def from_error(cls, name: str, error: Exception) -> 'Unreadable':
        """Return the unreadable sample for an error of its reader."""
        return cls(name, f'{type(error).__name__}: {error}')


class Failure(NamedTuple):
    """Message of an error in a DataLoader worker, in the place of a sample; PyTorch would add a traceback to it."""
    message: str


OnUnreadable = Callable[[List[Unreadable]], None]


class SkippedSamples:
    """Unreadable samples of this rank, each of which is logged once.

    Args:
        limit: Number of samples that may be skipped; None for any number.
        strict: Whether a single one is an error, as in evaluation.
    """

    def __init__(self, *, limit: Optional[int] = None, strict: bool = False) -> None:
        self.limit = limit
        self.strict = strict
        self.count = 0  # times that a sample was skipped
        self.seen: Set[str] = set()  # names

    def __call__(self, unreadable: List[Unreadable]) -> None:
        """Log and count samples that are skipped; raise ValueError if no sample, or no more samples, may be skipped."""
        self.count += len(unreadable)
        for name, reason in unreadable:
            if self.strict:
                raise ValueError(f'{name} cannot be read ({reason}); --skip-unreadable evaluates without such images')
            if name not in self.seen:
                self.seen.add(name)
                _logger.warning('skipped, as it cannot be read: %s (%s)', name, reason)
            if self.limit is not None and len(self.seen) > self.limit:
                raise ValueError(
                    f'{len(self.seen)} training images cannot be read, --max-unreadable is {self.limit}; the last is '
                    f'{name} ({reason})')


# --- map-style data sets ---


class SeededDataset(Dataset):
    """Map-style data set whose items are a function of (seed, epoch, index).

    Items are (image, target), or :class:`Unreadable` if the image cannot be decoded.

    Args:
        source: Source of the images, as described at the top of this module.
        seed: Seed of the augmentation.
        convert: Conversion of the source's images; None leaves them as they are.
        is_training: Whether a batch without any readable image is filled with the next readable one.
    """
    is_stream = False

    def __init__(
            self, source: Any, seed: int, convert: Optional[Callable[[Any], Any]] = None,
            is_training: bool = False) -> None:
        self.source = source
        self.seed = seed
        self.convert = convert
        self.is_training = is_training
        self.transform: Any = None  # the task sets it
        self.classes: Optional[List[str]] = None if source.classes is None else list(source.classes)

    @property
    def num_samples(self) -> int:
        """Number of images in the split."""
        return len(self)

    @property
    def targets(self) -> Optional[List[int]]:
        """Class indices of all images; None if only the images' files tell."""
        targets = getattr(self.source, 'targets', getattr(self.source, 'labels', None))
        return None if targets is None else list(map(int, targets))

    num_images = num_samples

    def name(self, index: int) -> str:
        """Return the path of an image for messages, or the index of an image that has no path."""
        return shown(self.source.name(index))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> Union[Tuple[Any, int], Unreadable]:
        epoch, index = key
        rng.seed_everything(self.seed, 'image', epoch, index)
        try:
            image, target = self.source[index]
            if self.convert is not None:
                image = self.convert(image)
        except DECODE_ERRORS as error:
            return Unreadable.from_error(self.name(index), error)
        return (image if self.transform is None else self.transform(image)), -1 if target is None else target

    def __getitems__(self, keys: List[SampleKey]) -> List[Union[Tuple[Any, int], Unreadable, Failure]]:
        """Return the samples of a batch, as the DataLoader asks for them."""
        samples: List[Any] = []
        try:
            samples += (self[key] for key in keys)
            if self.is_training:
                epoch, index = keys[-1]
                for other in range(index + 1, index + _MAX_REPLACEMENT_TRIES):
                    if not all(isinstance(sample, Unreadable) for sample in samples):
                        break
                    samples.append(self[epoch, other % len(self)])
        except (OSError, ValueError) as error:
            if get_worker_info() is None:
                raise
            return [Failure(str(error))]
        return samples


class ResumableBatchSampler(Sampler):
    """Batch sampler for one rank and epoch that skips the batches already consumed.

    The order of an epoch's images is a function of the seed and the epoch. Each step takes the next
    ``batch_size * accumulation * world_size`` images, and each rank its part of them. Runs with the same product thus
    have the same images in each step. Images that do not fill a step are left out.
    If ``targets``, the class indices of the images, are given, each class is sampled equally often, and images of rare
    classes several times.
    """

    def __init__(
            self, length: int, batch_size: int, accumulation: int, rank: int, world_size: int, seed: int,
            targets: Optional[List[int]] = None) -> None:
        self.length = length
        self.targets = targets
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.start(0, 0)

    @property
    def steps(self) -> int:
        """Number of steps of a whole epoch."""
        return self.length // (self.batch_size * self.accumulation * self.world_size)

    def start(self, epoch: int, step: int) -> None:
        """Let the next iteration begin at this step of this epoch."""
        self.epoch = epoch
        self.first = step
        self._order = rng.seeded_permutation(self.length, self.seed, 'order', epoch)
        if self.targets is not None:
            shuffled = rng.seeded_permutation(self.length, self.seed, 'balance', epoch)
            self._order = self._balanced(self._order)[shuffled]

    def _balanced(self, order: Tensor) -> Tensor:
        """Return as many images as there are, the classes in turn, those of each class in the order of ``order``."""
        members: Dict[int, List[int]] = {}
        for index in order.tolist():
            members.setdefault(self.targets[index], []).append(index)  # type: ignore[index]
        classes = zip(*(islice(cycle(indices), -(-self.length // len(members))) for indices in members.values()))
        return torch.tensor(list(chain.from_iterable(classes))[:self.length])

    def batch(self, step: int, part: int) -> List[SampleKey]:
        """Return the samples of one batch of the current epoch, ``part`` in [0, accumulation)."""
        start = ((step * self.accumulation + part) * self.world_size + self.rank) * self.batch_size
        return [(self.epoch, index) for index in self._order[start:start + self.batch_size].tolist()]

    def indices(self, step: int) -> List[int]:
        """Return the indices of this rank's images in a step of the current epoch."""
        return [index for part in range(self.accumulation) for _, index in self.batch(step, part)]

    def __len__(self) -> int:
        return (self.steps - self.first) * self.accumulation

    def __iter__(self) -> Iterator[List[SampleKey]]:
        return (self.batch(step, part) for step in range(self.first, self.steps) for part in range(self.accumulation))


# --- streams ---


class SeededIterableDataset(IterableDataset):
    """timm's stream, augmented by (seed, rank, number of the pass, DataLoader worker).

    Items are as those of :class:`SeededDataset`. The reader shuffles by the number of the pass, and divides the samples
    among the workers. This class serves readers that decode the images themselves.
    """
    is_stream = True
    num_images = None  # a rank sees as many as its DataLoader workers give

    def __init__(self, dataset: IterableImageDataset, seed: int, convert: Callable[[Any], Any]) -> None:
        self.dataset = dataset
        self.seed = seed
        self.convert = convert
        self.reader: Any = dataset.reader
        self.transform: Any = None  # the task sets it
        self.classes = names_by_index(getattr(self.reader, 'class_to_idx', None))
        self.num_samples: int = self.reader.num_samples
        self.rank = 0
        self._pass_number = SharedCount()  # with the DataLoader workers

    def __len__(self) -> int:
        return len(self.dataset)

    def start(self, epoch: int, step: int) -> None:
        """Let the next pass begin; within an epoch, in another order than at its beginning."""
        number = rng.derive_seed(epoch, step) % 2 ** 31 if step else epoch
        self.dataset.set_epoch(number)
        self._pass_number.value = number

    def indices(self, step: int) -> List[int]:
        """Return no indices, as the samples of a stream have none."""
        return []

    def configure(self, num_workers: int, rank: int) -> None:
        """Set the number of DataLoader workers and the rank that load the samples."""
        self.rank = rank
        self.dataset.set_loader_cfg(num_workers=max(num_workers, 1))

    def num_shards(self, num_workers: int, world_size: int) -> Optional[int]:
        """Return the number of shards that the DataLoader workers of one rank divide; None if there is no limit."""
        return None

    def __iter__(self) -> Iterator[Union[Tuple[Any, Any], Unreadable, Failure]]:
        worker = get_worker_info()
        worker_id = 0 if worker is None else worker.id
        rng.seed_everything('stream', self.seed, self.rank, self._pass_number.value, worker_id)
        try:
            for image, target in self._read():
                yield image if isinstance(image, Unreadable) else (self.transform(image), target)
        except (OSError, ValueError) as error:
            if worker is None:
                raise
            yield from repeat(Failure(str(error)))  # the DataLoader would drop an incomplete batch

    def _read(self) -> Iterator[Tuple[Any, Any]]:
        try:
            yield from self.reader
        except (OSError, RuntimeError, ValueError) as error:
            source = getattr(self.reader, 'name', None) or self.reader.root
            raise ValueError(f'the stream {source} cannot be read: {error}') from error


class HuggingFaceStream(SeededIterableDataset):
    """Stream of a Hugging Face data set; timm's reader would end at an image that cannot be decoded."""

    def __init__(self, dataset: IterableImageDataset, seed: int, convert: Callable[[Any], Any]) -> None:
        super().__init__(dataset, seed, convert)
        features: Any = self.reader.builder.info.features or {}
        self._feature = features.get(self.reader.input_key)
        self._decodes = getattr(self._feature, 'decode', False)
        if self._decodes:
            features[self.reader.input_key] = replace(self._feature, decode=False)
            self.reader.input_img_mode = ''

    def num_shards(self, num_workers: int, world_size: int) -> Optional[int]:
        """Return the number of shards of one rank, None if there is no limit."""
        if self.reader.download or num_workers <= 1:
            return None
        try:
            count = self.reader.builder.as_streaming_dataset(split=self.reader.split).num_shards
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f'the stream {self.reader.name} cannot be read: {error}') from error
        return count if count % world_size else count // world_size

    def _read(self) -> Iterator[Tuple[Any, Any]]:
        for value, target in super()._read():
            yield (self._decode(value) if self._decodes else value), target

    def _decode(self, value: Dict[str, Any]) -> Any:
        try:
            return self.convert(self._feature.decode_example(value))
        except DECODE_ERRORS as error:
            name = 'an empty image entry'
            if value:
                digest = hashlib.sha1(value.get('bytes') or b'').hexdigest()[:8]
                name = shown(value.get('path') or f'the image whose SHA-1 begins with {digest}')
            return Unreadable.from_error(name, error)


class WebDatasetStream(SeededIterableDataset):
    """Stream of WebDataset's shards; timm's reader would drop an image that cannot be decoded."""

    def __init__(self, dataset: IterableImageDataset, seed: int, convert: Callable[[Any], Any]) -> None:
        super().__init__(dataset, seed, convert)
        self.reader.input_img_mode = ''

    def num_shards(self, num_workers: int, world_size: int) -> int:
        """Return the number of shards of one rank."""
        return len(self.reader.split_info.filenames) // world_size

    def _read(self) -> Iterator[Tuple[Any, Any]]:
        if self.reader.ds is None:  # in this process
            from timm.data.readers.reader_wds import _decode  # which needs webdataset
            self.reader._lazy_init()
            for stage in self.reader.ds.pipeline:  # type: ignore[attr-defined]
                decode: Any = next(iter(getattr(stage, 'args', ())), None)
                if getattr(decode, 'func', None) is _decode:
                    stage.args = (_WebDatasetDecoder(decode, self.convert), *stage.args[1:])
        return super()._read()


class _WebDatasetDecoder(NamedTuple):
    """Decoder of WebDataset's samples that returns :class:`Unreadable` as the image if timm's decoder raises."""
    decode: Callable[[Dict[str, Any]], Any]
    convert: Callable[[Any], Any]

    def __call__(self, sample: Dict[str, Any]) -> Any:
        try:
            decoded = self.decode(sample)
            if decoded is not None:
                decoded['jpg'] = self.convert(decoded['jpg'])
            return decoded
        except DECODE_ERRORS as error:
            name = shown(f'{sample.get("__url__")}/{sample.get("__key__")}')
            # timm before 1.0.29 reads 'cls'
            return {'jpg': Unreadable.from_error(name, error), 'target': -1, 'cls': -1}


def names_by_index(class_to_idx: Optional[Dict[str, int]]) -> Optional[List[str]]:
    """Return the names of the classes by index; None if there are none."""
    return sorted(class_to_idx, key=class_to_idx.__getitem__) if class_to_idx else None


# --- batches ---


def collate_readable(
        samples: List[Any], collate: Callable[[List[Any]], Any],
        size: Optional[int] = None) -> Tuple[Any, List[Unreadable]]:
    """Return a batch of the readable samples, the first of which fill it up to ``size``, and the unreadable ones."""
    for sample in samples:
        if isinstance(sample, Failure):
            return sample, []
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    if not readable:
        return None, unreadable
    if size is not None:
        readable = [readable[i % len(readable)] for i in range(size)]
    return collate(readable), unreadable


class CheckedLoader:
    """Loader of batches (images, class indices) that reports unreadable samples and checks the class indices.

    Args:
        loader: Loader that collates by :func:`collate_readable`.
        on_unreadable: Function that is called with the unreadable samples of a batch, before the batch is yielded.
        expected: Number of samples of a stream, which reports missing ones as unreadable; None for no such check.

    Raises:
        ValueError: If a target is no class of the model, or if a DataLoader worker failed.
    """

    def __init__(
            self, loader: BoundedLoader, on_unreadable: OnUnreadable, num_classes: Optional[int] = None,
            expected: Optional[int] = None) -> None:
        self.loader = loader
        self.on_unreadable = on_unreadable
        self.num_classes = num_classes
        self.expected = expected

    def __len__(self) -> int:
        if self.expected is None:
            return len(self.loader)
        return -(-self.expected // (self.loader.batch_size or 1))  # about; the loader would warn if there are more

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        count = 0
        for batch, unreadable in self.loader:
            if isinstance(batch, Failure):
                raise ValueError(batch.message)
            if unreadable:
                self.on_unreadable(unreadable)
                count += len(unreadable)
            if batch is not None:
                count += len(batch[1])
                self._check_targets(batch[1])
                yield batch
        if self.expected is not None and count < self.expected:
            self.on_unreadable([Unreadable(
                f'{self.expected - count} of {self.expected} images', 'the stream ended before they came')])

    def _check_targets(self, targets: Any) -> None:
        """Check class indices here, as on a GPU the loss would fail with an assertion that ends its use."""
        if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
            given = targets.tolist() if isinstance(targets, Tensor) else targets
            raise ValueError(f'classes of images must be whole numbers, got {str(given)[:80]}')
        if self.num_classes is not None:
            unknown = targets[(targets < 0) | (targets >= self.num_classes)]
            if len(unknown):
                raise ValueError(f'an image is of class {int(unknown[0])}, the model has {self.num_classes} classes')
