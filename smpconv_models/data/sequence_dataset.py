"""Sequences of one length with their classes."""
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.utils.data import Dataset


class SequenceDataset(Dataset):
    """Sequences and their classes, normalised; :func:`create_sequence_dataset` makes them.

    An item is a float32 tensor of shape ``shape`` (what ``transform`` makes of it, where that is set) and the index of
    its class. Sequences that are images, read row by row, have an ``image_size`` (height, width), and are given to
    ``augment``, where that is set, before all else: their pixels of shape ``shape`` in the order of the image, uint8.

    Args:
        what: What it is, for errors.
        classes: Names, by index.
        shape: (channels, length).
        labels: Of each sequence, the index of its class.
        mean: What is taken from a sequence, a number or ``(channels, 1)``.
        std: What it is divided by then, likewise.

    Raises:
        ValueError: A class has no sequence.
    """

    def __init__(
            self,
            what: str,
            classes: Sequence[str],
            shape: Tuple[int, int],
            labels: Sequence[int],
            mean: Any,
            std: Any,
    ) -> None:
        absent = sorted(set(range(len(classes))) - set(labels))
        if absent:
            raise ValueError(
                f'{what} has no sequence of {len(absent)} of {len(classes)} classes: '
                f'{[classes[label] for label in absent[:8]]}')
        self.classes = tuple(classes)
        self.shape = shape
        self.labels = list(labels)
        self.transform: Any = None
        self.image_size: Optional[Tuple[int, int]] = None
        self.augment: Any = None
        self._mean = torch.as_tensor(mean, dtype=torch.float32)
        self._std = torch.as_tensor(std, dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        sequence = (self._read(index) - self._mean) / self._std
        return (sequence if self.transform is None else self.transform(sequence)), self.labels[index]

    def name(self, index: int) -> str:
        """What a sequence is called: its file, where it has one."""
        return f'sequence {index}'

    def _read(self, index: int) -> Tensor:
        """A sequence before it is normalised, float32 of shape ``shape``."""
        raise NotImplementedError


class StoredSequences(SequenceDataset):
    """Sequences in memory, in the numbers that they come in.

    Args:
        what: As in :class:`SequenceDataset`.
        classes: As in :class:`SequenceDataset`.
        data: ``(N, channels, length)``, uint8 or float32.
        labels: As in :class:`SequenceDataset`.
        mean: As in :class:`SequenceDataset`.
        std: As in :class:`SequenceDataset`.
        order: ``(length,)``, the position from which each step is taken; as it is by default.
        image_size: (height, width), where the sequences are images.

    Raises:
        ValueError: A class has no sequence, or a number isn't finite.
    """

    def __init__(
            self,
            what: str,
            classes: Sequence[str],
            data: Tensor,
            labels: Sequence[int],
            mean: Any,
            std: Any,
            order: Optional[Tensor] = None,
            image_size: Optional[Tuple[int, int]] = None,
    ) -> None:
        channels, length = data.shape[1:]
        super().__init__(what, classes, (channels, length), labels, mean, std)
        self.image_size = image_size
        finite = data.isfinite().flatten(1).all(1)
        if not finite.all():
            bad: List[int] = (~finite).nonzero().flatten().tolist()
            raise ValueError(f'{what} has NaN or inf in {len(bad)} of {len(data)} sequences, such as {bad[:4]}')
        self._data = data
        self._order = order

    def _read(self, index: int) -> Tensor:
        sequence = self._data[index]
        if self.augment is not None:
            sequence = self.augment(sequence)
        return (sequence if self._order is None else sequence[:, self._order]).float()
