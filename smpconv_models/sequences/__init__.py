"""Data sets of sequences: images as sequences of pixels, handwriting, speech."""
from .dataset import SequenceDataset
from .opening import NAMES, open_sequences

__all__ = ['NAMES', 'SequenceDataset', 'open_sequences']
