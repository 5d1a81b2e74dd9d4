"""Single images, and in which order and batches they come."""
from typing import Any, Callable, Iterator, List, Tuple, Union

from PIL import Image
from timm.data import ImageDataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from . import draws
from .unreadable import ERRORS, Unreadable

Position = Tuple[int, int]  # epoch and index


class Samples(Dataset):
    """A map-style data set by (epoch, index), augmented by draws that this key alone decides.

    Items are (image, target), or :class:`Unreadable` for an image file that can't be decoded; timm's own data set would
    give the next image in its place.

    Args:
        dataset: timm's, or any map-style data set, with its transform.
        seed: Of the augmentation.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: Position) -> Union[Tuple[Any, int], Unreadable]:
        epoch, index = position
        draws.seed_all(self.seed, 'image', epoch, index)
        if not isinstance(self.dataset, ImageDataset):
            return self.dataset[index]
        try:
            file, target, *_ = self.dataset.reader[index]
            image = Image.open(file).convert(self.dataset.input_img_mode)
        except ERRORS as error:
            return Unreadable(self.name(index), f'{type(error).__name__}: {error}')
        return self.dataset.transform(image), -1 if target is None else target

    def name(self, index: int) -> str:
        """The image's path where it has one, else its index."""
        if isinstance(self.dataset, ImageDataset):
            return str(self.dataset.filename(index, absolute=True))
        return f'image {index}'


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
        self._order = draws.permutation(self.length, self.seed, 'order', epoch)

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
        keep_size: Fill up with the first readable ones, so that all batches of an epoch are of one size.
    """

    def __init__(self, collate: Callable[[List[Any]], Any], keep_size: bool) -> None:
        self.collate = collate
        self.keep_size = keep_size

    def __call__(self, samples: List[Any]) -> Tuple[Any, List[Unreadable]]:
        unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
        readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
        if not readable:
            return None, unreadable
        if self.keep_size:
            readable = [readable[i % len(readable)] for i in range(len(samples))]
        return self.collate(readable), unreadable


class Loader:
    """Batches (images, targets) of a loader whose unreadable images go elsewhere.

    Args:
        loader: With a :class:`Collate`.
        tell: Called with the unreadable images of a batch, before the batch is passed on.
    """

    def __init__(self, loader: DataLoader, tell: Callable[[List[Unreadable]], None]) -> None:
        self.loader = loader
        self.tell = tell

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        for batch, unreadable in self.loader:
            if unreadable:
                self.tell(unreadable)
            if batch is not None:
                yield batch
