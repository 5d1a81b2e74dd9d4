"""Data sets of sequences: images as sequences of pixels, handwriting, speech."""
from .registry import NAMES, create_sequence_dataset
from .sequence_dataset import SequenceDataset

__all__ = ['NAMES', 'SequenceDataset', 'create_sequence_dataset']
