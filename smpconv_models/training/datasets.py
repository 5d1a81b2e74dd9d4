"""Single images, and in which order and batches they come."""
import hashlib
import os
from dataclasses import replace
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

from PIL import Image
from timm.data import ImageDataset, IterableImageDataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.data.readers.shared_count import SharedCount
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from smpconv_models.data import SequenceDataset

from . import rng
from .bounded import BoundedLoader
from .class_names import shown
from .image_reading import ReadImage
from .skipped import ERRORS, Unreadable

Position = Tuple[int, int]  # epoch and index

# Images that are looked at for one that can be read.
_MOST_TO_FILL = 1000


class Samples(Dataset):
    """A map-style data set by (epoch, index), augmented by draws that this key alone decides.

    Items are (image, target), or :class:`Unreadable` for an image file that can't be decoded; timm's own data set would
    give the next image in its place.

    Args:
        dataset: timm's, or any map-style data set, with its transform, which is taken from it.
        seed: Of the augmentation.
        fills: Where no image of a batch can be read, the next one that can be comes after them.
    """

    def __init__(self, dataset: Any, seed: int, fills: bool = False) -> None:
        self.dataset = dataset
        self.seed = seed
        self.fills = fills
        self.transform = getattr(dataset, 'transform', None)
        dataset.transform = None  # an image that can't be read is told from a fault of the transform
        self.read_image: Optional[ReadImage] = getattr(dataset, 'read_image', None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: Position) -> Union[Tuple[Any, int], Unreadable]:
        epoch, index = position
        rng.seed_all(self.seed, 'image', epoch, index)
        try:
            image, target = self._read(index)
        except ERRORS as error:
            return _unreadable(self.name(index), error)
        return (image if self.transform is None else self.transform(image)), -1 if target is None else target

    def __getitems__(self, positions: List[Position]) -> List[Union[Tuple[Any, int], Unreadable]]:
        """A batch, for the loader."""
        samples = [self[position] for position in positions]
        if self.fills:
            epoch, index = positions[-1]
            for other in range(index + 1, index + _MOST_TO_FILL):
                if not all(isinstance(sample, Unreadable) for sample in samples):
                    break
                samples.append(self[epoch, other % len(self)])
        return samples

    def _read(self, index: int) -> Tuple[Any, Any]:
        if isinstance(self.dataset, ImageDataset):
            file, target, *_ = self.dataset.reader[index]
            image = Image.open(file)
        else:
            image, target = self.dataset[index]
        return (image if self.read_image is None else self.read_image.convert(image)), target

    def name(self, index: int) -> str:
        """Return the path of an image for messages, or the index of an image that has no path."""
        return shown(image_name(self.dataset, index))


def image_name(dataset: Any, index: int) -> str:
    """Return the path of an image in a map-style data set, or its index if the image has no path of its own."""
    if isinstance(dataset, SequenceDataset):
        return dataset.name(index)
    if not isinstance(dataset, ImageDataset):
        files = getattr(dataset, 'samples', None)  # torchvision's
        return f'image {index}' if files is None else str(files[index][0])
    reader = dataset.reader
    if isinstance(reader, ReaderImageInTar):
        member, tar, inner = reader.samples[index]
        names = (tar, inner and inner.name, member.name)
        return os.path.join(reader.root, *(name.lstrip('/') for name in names if name))
    try:
        path = dataset.filename(index, absolute=True)
    except ERRORS:
        path = None
    if path and os.path.isabs(path):
        return path
    return f'image {index}' + (f' ({path})' if path else '')


class Stream(IterableDataset):
    """timm's stream, where :class:`Unreadable` comes in the place of an image that can't be decoded.

    timm drops such samples of WebDataset's shards with a line in the log, and ends at those of Hugging Face's streams.

    Args:
        dataset: timm's, with its transform.
        keys: Of the augmentation: the seed, the process.
    """

    def __init__(self, dataset: IterableImageDataset, *keys: int) -> None:
        self.dataset = dataset
        self.keys = keys
        self.pass_number = SharedCount()  # with the processes that load
        self.reader: Any = dataset.reader
        self.read_image: Optional[ReadImage] = getattr(dataset, 'read_image', None)
        self.feature: Any = None
        if is_hugging_face(self.reader):
            self.feature = _leave_undecoded(self.reader)
        elif is_webdataset(self.reader):
            self.reader.input_img_mode = ''  # read_image converts instead of timm

    def __len__(self) -> int:
        return len(self.dataset)

    def start(self, number: int) -> None:
        """Shuffles and augments the next pass by this number, below 2**31."""
        self.dataset.set_epoch(number)
        self.pass_number.value = number

    def __iter__(self) -> Iterator[Union[Tuple[Any, Any], Unreadable]]:
        worker = get_worker_info()
        rng.seed_all('stream', *self.keys, self.pass_number.value, 0 if worker is None else worker.id)
        if is_webdataset(self.reader) and self.reader.ds is None:
            _name_undecodable(self.reader, self.read_image)
        for image, target in self._items():
            if self.feature is not None:
                image = self._decoded(image)
            yield image if isinstance(image, Unreadable) else (self.dataset.transform(image), target)

    def _items(self) -> Iterator[Tuple[Any, Any]]:
        try:
            yield from self.reader
        except (OSError, RuntimeError, ValueError) as error:
            source = getattr(self.reader, 'name', None) or self.reader.root
            raise ValueError(f'the stream {source} cannot be read: {error}') from error

    def _decoded(self, value: Any) -> Any:
        try:
            image = self.feature.decode_example(value)
            return image if self.read_image is None else self.read_image.convert(image)
        except ERRORS as error:
            return _unreadable(_value_name(value), error)


def is_webdataset(reader: Any) -> bool:
    """Whether it is timm's reader of WebDataset's shards, by name: its packages may not be there."""
    return type(reader).__name__ == 'ReaderWds'


def is_hugging_face(reader: Any) -> bool:
    """Whether it is timm's reader of Hugging Face's streams."""
    return type(reader).__name__ == 'ReaderHfids'


def _leave_undecoded(reader: Any) -> Any:
    """Has a stream of Hugging Face's give images as they are stored; returns the feature that decodes them."""
    features = reader.builder.info.features
    if features is None or not getattr(features.get(reader.input_key), 'decode', False):
        return None
    feature = features[reader.input_key]
    features[reader.input_key] = replace(feature, decode=False)
    reader.input_img_mode = ''
    return feature


def _value_name(value: Dict[str, Any]) -> str:
    if not value:
        return 'an image of nothing'
    if value.get('path'):
        return shown(value['path'])
    return f'the image whose SHA-1 begins with {hashlib.sha1(value.get("bytes") or b"").hexdigest()[:8]}'


def _name_undecodable(reader: Any, read_image: Optional[ReadImage]) -> None:
    """Has a reader of WebDataset's shards make its pipeline, and puts :class:`_Decode` around timm's decoder in it."""
    reader._lazy_init()
    for stage in reader.ds.pipeline:
        decode: Any = next(iter(getattr(stage, 'args', ())), None)
        if getattr(getattr(decode, 'func', None), '__name__', None) == '_decode':
            stage.args = (_Decode(decode, read_image), *stage.args[1:])


class _Decode:
    """Decoder of WebDataset's samples that returns :class:`Unreadable` as the image if timm's decoder raises.

    Args:
        decode: timm's decoder.
        read_image: Conversion of the decoded images.
    """

    def __init__(self, decode: Callable[[Dict[str, Any]], Any], read_image: Optional[ReadImage] = None) -> None:
        self.decode = decode
        self.read_image = read_image

    def __call__(self, sample: Dict[str, Any]) -> Any:
        try:
            decoded = self.decode(sample)
            if decoded is not None and self.read_image is not None:
                decoded['jpg'] = self.read_image.convert(decoded['jpg'])
            return decoded
        except ERRORS as error:
            name = shown(f'{sample.get("__url__")}/{sample.get("__key__")}')
            return {'jpg': _unreadable(name, error), 'target': -1, 'cls': -1}  # the latter before timm 1.0.29


def _unreadable(name: str, error: Exception) -> Unreadable:
    return Unreadable(name, f'{type(error).__name__}: {error}')


class Batches(Sampler):
    """One process's batches of an epoch, those left out that were done before.

    The order of an epoch's images is a function of the seed and the epoch. Each step takes the next
    ``batch_size * accumulation * world_size`` of them, and each process its part; so where the product is the same, a
    step is made of the same images however they are divided. Images that fill no step are left out.

    Args:
        length: Number of images.
        batch_size: Of one process.
        accumulation: Batches that a process adds up to a step.
        rank: The process.
        world_size: Number of processes.
        seed: Of the order.
    """

    def __init__(self, length: int, batch_size: int, accumulation: int, rank: int, world_size: int, seed: int) -> None:
        self.length = length
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.start(0, 0)

    @property
    def steps(self) -> int:
        """Steps of a whole epoch."""
        return self.length // (self.batch_size * self.accumulation * self.world_size)

    def start(self, epoch: int, step: int) -> None:
        """What to iterate over next: this epoch, from this step."""
        self.epoch = epoch
        self.first = step
        self._order = rng.permutation(self.length, self.seed, 'order', epoch)

    def batch(self, step: int, part: int) -> List[Position]:
        """The images of one batch, ``part`` in [0, accumulation), of the present epoch."""
        start = ((step * self.accumulation + part) * self.world_size + self.rank) * self.batch_size
        return [(self.epoch, index) for index in self._order[start:start + self.batch_size].tolist()]

    def __len__(self) -> int:
        return (self.steps - self.first) * self.accumulation

    def __iter__(self) -> Iterator[List[Position]]:
        return (
            self.batch(step, part) for step in range(self.first, self.steps) for part in range(self.accumulation))


class InOrder(Sampler):
    """One process's part of all images for evaluation, each of them in one process only.

    Args:
        length: Number of images.
        batch_size: Of one process.
        rank: The process.
        world_size: Number of processes.
    """

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, length, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[List[Position]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start:start + self.batch_size]]


class Collate:
    """Makes a batch of the readable samples, and a list of the others.

    Args:
        collate: Makes a batch of samples.
        size: Fill up to it with the first readable ones, so that all batches of an epoch are of one size.
    """

    def __init__(self, collate: Callable[[List[Any]], Any], size: Optional[int] = None) -> None:
        self.collate = collate
        self.size = size

    def __call__(self, samples: List[Any]) -> Tuple[Any, List[Unreadable]]:
        unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
        readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
        if not readable:
            return None, unreadable
        if self.size is not None:
            readable = [readable[i % len(readable)] for i in range(self.size)]
        return self.collate(readable), unreadable


class Loader:
    """Batches (images, targets) of a loader whose unreadable images go elsewhere.

    Args:
        loader: With a :class:`Collate`.
        tell: Called with the unreadable images of a batch, before the batch is passed on.
        num_classes: Targets must be below it; None if it isn't known.
        expected: Images that there should be in all: those of them that a stream lacks are told of too.

    Raises:
        ValueError: A target is no class of the model.
    """

    def __init__(
            self,
            loader: BoundedLoader,
            tell: Callable[[List[Unreadable]], None],
            num_classes: Optional[int] = None,
            expected: Optional[int] = None,
    ) -> None:
        self.loader = loader
        self.tell = tell
        self.num_classes = num_classes
        self.expected = expected

    def __len__(self) -> int:
        if self.expected is None:
            return len(self.loader)
        return -(-self.expected // (self.loader.batch_size or 1))  # about; the loader would warn if there are more

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        count = 0
        for batch, unreadable in self._loaded():
            if unreadable:
                self.tell(unreadable)
                count += len(unreadable)
            if batch is not None:
                count += len(batch[1])
                _check_targets(batch[1], self.num_classes)
                yield batch
        if self.expected is not None and count < self.expected:
            self.tell([Unreadable(
                f'{self.expected - count} of {self.expected} images', 'the stream ended before they came')])

    def _loaded(self) -> Iterator[Tuple[Any, List[Unreadable]]]:
        try:
            yield from self.loader
        except (OSError, ValueError) as error:
            lines = str(error).strip().splitlines() or ['']
            if not lines[0].startswith('Caught ') or ': ' not in lines[-1]:
                raise
            # It came from a process that loads, with that one's traceback as text. Its own refers to itself, and would
            # keep those processes until this one has ended.
            raise ValueError(lines[-1].split(': ', 1)[1]) from error.with_traceback(None)


def _check_targets(targets: Any, num_classes: Optional[int]) -> None:
    """Here, as the loss would be an assertion of the GPU, after which the process can't use it any more."""
    if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
        given = targets if not isinstance(targets, Tensor) else targets.tolist()
        raise ValueError(f'classes of images must be whole numbers, got {str(given)[:80]}')
    if num_classes is None:
        return
    unknown = targets[(targets < 0) | (targets >= num_classes)]
    if len(unknown):
        raise ValueError(f'an image is of class {int(unknown[0])}, the model has {num_classes} classes')
