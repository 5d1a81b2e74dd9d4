"""Data sets of sequences: images as sequences of pixels, handwriting, speech."""
from . import characters, images, speech  # noqa: F401 (each registers its data sets)
from .registry import SequenceDataset, create_sequence_dataset, list_sequence_datasets

DATASET_NAMES = list_sequence_datasets()
EMBEDDED_NAMES = list_sequence_datasets(embedded=True)

__all__ = ['DATASET_NAMES', 'EMBEDDED_NAMES', 'SequenceDataset', 'create_sequence_dataset']
