"""Checkpoints: which files may be loaded, their descriptions, and their weights, ours or the original release's."""
from .description import (
    MAX_INHERITED_SIDE,
    Description,
    check_model_kwargs,
    check_plain,
    check_preparation,
    describe,
    get_train_args,
    printable,
    shown,
)
from .files import check_file, load_file
from .original import convert_original, is_original
from .state_dicts import check_finite, convert_and_check, describe_mismatch, select_state_dict

__all__ = [
    'MAX_INHERITED_SIDE', 'Description', 'check_file', 'check_finite', 'check_model_kwargs', 'check_plain',
    'check_preparation', 'convert_and_check', 'convert_original', 'describe', 'describe_mismatch', 'get_train_args',
    'is_original', 'load_file', 'printable', 'select_state_dict', 'shown',
]
