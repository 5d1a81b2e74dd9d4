"""Checkpoints: which files may be read, what weights they hold, and the original release's names for them."""
from .description import (
    MAX_INHERITED_SIDE,
    Description,
    check_model_kwargs,
    check_preparation,
    describe,
    plain,
    printable,
    run_arguments,
    shown,
)
from .files import check_file, file_sha256, first_line, read_file
from .release import from_release, is_release
from .state_dicts import (
    adapt,
    check_finite,
    describe_mismatch,
    load_into,
    select_state_dict,
)

__all__ = [
    'MAX_INHERITED_SIDE', 'Description', 'adapt', 'check_file', 'check_finite', 'check_model_kwargs',
    'check_preparation', 'describe', 'describe_mismatch', 'file_sha256', 'first_line', 'from_release', 'is_release',
    'load_into', 'plain', 'printable', 'read_file', 'run_arguments', 'select_state_dict', 'shown',
]
