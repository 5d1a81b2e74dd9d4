"""Data sets of sequences: images as sequences of pixels, handwriting, speech."""
from .registry import EMBEDDED, NAMES, create_sequence_dataset
from .sequence_dataset import SequenceDataset

__all__ = ['EMBEDDED', 'NAMES', 'SequenceDataset', 'create_sequence_dataset']
