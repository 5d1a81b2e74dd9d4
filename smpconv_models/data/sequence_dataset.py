"""Sequences of one length with their classes."""
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.utils.data import Dataset


class SequenceDataset(Dataset):
    """Normalized sequences and their classes, as :func:`create_sequence_dataset` returns them.

    An item is a float32 tensor of shape ``shape``, after ``transform`` if it is set, and the index of its class.
    Sequences that are images, read row by row, have an ``image_size`` (height, width). If ``augment`` is set, it is
    called first, with the pixels in the order of the image: uint8, of shape ``shape``.

    Args:
        description: Description of the data set, for errors.
        classes: Names of the classes by index.
        shape: (channels, length).
        labels: Index of the class of each sequence.
        mean: Value subtracted from a sequence, a number or ``(channels, 1)``.
        std: Value by which the difference is divided, a number or ``(channels, 1)``.
        names: Names of the sequences, such as the paths of their files.

    Raises:
        ValueError: If a class has no sequence.
    """

    def __init__(
            self,
            description: str,
            classes: Sequence[str],
            shape: Tuple[int, int],
            labels: Sequence[int],
            mean: Any,
            std: Any,
            names: Optional[Sequence[str]] = None,
    ) -> None:
        absent = sorted(set(range(len(classes))) - set(labels))
        if absent:
            raise ValueError(
                f'{description} has no sequence of {len(absent)} of {len(classes)} classes: '
                f'{[classes[label] for label in absent[:8]]}')
        self.classes = tuple(classes)
        self.shape = shape
        self.labels = list(labels)
        self.transform: Any = None
        self.image_size: Optional[Tuple[int, int]] = None
        self.augment: Any = None
        self._mean = torch.as_tensor(mean, dtype=torch.float32)
        self._std = torch.as_tensor(std, dtype=torch.float32)
        self._names = names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        sequence = (self._read(index) - self._mean) / self._std
        return (sequence if self.transform is None else self.transform(sequence)), self.labels[index]

    def name(self, index: int) -> str:
        """Return the name of a sequence: the path of its file if it has one."""
        return self._names[index] if self._names else f'sequence {index}'

    def _read(self, index: int) -> Tensor:
        """Return a sequence before normalization, float32 of shape ``shape``."""
        raise NotImplementedError


class InMemorySequences(SequenceDataset):
    """Sequences in memory, in the dtype of their source.

    Args:
        data: ``(N, channels, length)``, uint8 or float32.
        order: ``(length,)``, the position from which each step is taken; None keeps the order.
        image_size: (height, width) if the sequences are images.

    The other arguments are those of :class:`SequenceDataset`.

    Raises:
        ValueError: If a class has no sequence, or a value is not finite.
    """

    def __init__(
            self,
            description: str,
            classes: Sequence[str],
            data: Tensor,
            labels: Sequence[int],
            mean: Any,
            std: Any,
            order: Optional[Tensor] = None,
            image_size: Optional[Tuple[int, int]] = None,
            names: Optional[Sequence[str]] = None,
    ) -> None:
        channels, length = data.shape[1:]
        super().__init__(description, classes, (channels, length), labels, mean, std, names)
        self.image_size = image_size
        finite = data.isfinite().flatten(1).all(1)
        if not finite.all():
            bad: List[int] = (~finite).nonzero().flatten().tolist()
            raise ValueError(
                f'{description} has NaN or inf in {len(bad)} of {len(data)} sequences, such as {bad[:4]}')
        self._data = data
        self._order = order

    def _read(self, index: int) -> Tensor:
        sequence = self._data[index]
        if self.augment is not None:
            sequence = self.augment(sequence)
        return (sequence if self._order is None else sequence[:, self._order]).float()
