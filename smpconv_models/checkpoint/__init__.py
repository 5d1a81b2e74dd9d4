"""Checkpoints: which files may be read, what weights they hold, and the original release's names for them."""
from .description import (
    MAX_INHERITED_SIDE,
    Description,
    check_model_kwargs,
    check_preparation,
    describe,
    get_train_args,
    plain,
    printable,
    shown,
)
from .files import check_file, read_file
from .original import convert_original, is_original
from .state_dicts import adapt, check_finite, describe_mismatch, load_into, select_state_dict

__all__ = [
    'MAX_INHERITED_SIDE',
    'Description',
    'adapt',
    'check_file',
    'check_finite',
    'check_model_kwargs',
    'check_preparation',
    'convert_original',
    'describe',
    'describe_mismatch',
    'get_train_args',
    'is_original',
    'load_into',
    'plain',
    'printable',
    'read_file',
    'select_state_dict',
    'shown',
]
