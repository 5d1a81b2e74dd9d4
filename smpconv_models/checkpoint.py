"""Checkpoint files: what may be read, what they hold, and the original release's names for it.

The release is the code published with the paper (github.com/sangnekim/SMPConv). Its files are pickled dictionaries
written by timm's CheckpointSaver. Its modules alternate in one list where ours pair up, and its points carry a leading
dimension of size 1.
"""
import argparse
import os
import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple, Union

import torch
from torch import Tensor, nn

StateDict = Dict[str, Tensor]

# In the order in which they are preferred: the published accuracies are the averaged weights'.
_EMA_KEYS = ('state_dict_ema', 'model_ema')
_MODEL_KEYS = ('state_dict', 'model')
_WRAPPER_PREFIXES = ('_orig_mod.', 'module.')

# Release name -> ours, tried in order on every key.
_RELEASE_RULES: Tuple[Tuple[str, Union[str, Callable[[re.Match], str]]], ...] = (
    (r'^transitions\.(\d+)\.(\d+)\.', lambda m: f'stages.{int(m[1]) + 1}.downsample.{m[2]}.'),
    (r'^stages\.(\d+)\.blocks\.(\d+)\.', lambda m: f'stages.{m[1]}.blocks.{int(m[2]) // 2}.{_branch(int(m[2]))}.'),
    (r'\.large_kernel\.smp\.', '.large_kernel.large.'),
    (r'\.large_kernel\.small_conv\.', '.large_kernel.small.'),
    (r'\.(prelkb_bn|preffn_bn|bn)\.', '.norm.'),
    (r'\.weight_coord$', '.coords'),
    (r'\.weights$', '.weight'),
    (r'^head\.', 'head.fc.'),
)


def _branch(index: int) -> str:
    return 'mixer' if index % 2 == 0 else 'ffn'


def is_release(state_dict: StateDict) -> bool:
    """Whether the names are those of the original release's ImageNet models."""
    return any(key.endswith('.smp.conv.weight_coord') for key in state_dict)


def from_release(state_dict: StateDict) -> StateDict:
    """The original release's ImageNet state dict under our names and shapes.

    The sampling grid that the files carry (``kernel_coord``) is left out: it is computed here.
    """
    converted = {}
    for key, tensor in state_dict.items():
        if key.endswith('.kernel_coord'):
            continue
        if key.endswith(('.weight_coord', '.weights')):
            tensor = tensor.squeeze(0)
        elif key.endswith('.radius'):
            tensor = tensor.flatten()
        for pattern, replacement in _RELEASE_RULES:
            key = re.sub(pattern, replacement, key)
        converted[key] = tensor
    return converted


def read_file(path: Union[str, Path]) -> Any:
    """Loads a checkpoint file: safetensors, or a pickle of plain data, tensors and ``argparse.Namespace`` only.

    Raises:
        ValueError: No such file, or it isn't a whole checkpoint; one line that names the path and the cause.
    """
    check_file(path)
    if _is_safetensors(path):
        from safetensors.torch import load_file
        return load_file(path)
    try:
        # Namespace is what timm's training script stores its arguments in
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = _why_refused(path, error)
        raise ValueError(f'{path} is not a checkpoint of plain tensors and data: {reason}') from error


def _why_refused(path: Union[str, Path], error: Exception) -> str:
    """Torch's own message advises to unpickle everything; what it would have run is the better reason."""
    if not isinstance(error, pickle.UnpicklingError):
        return first_line(error)
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except (ValueError, RuntimeError, pickle.UnpicklingError):  # only zip files can be asked
        unsafe = []
    return f'it wants to call {", ".join(unsafe)}' if unsafe else 'it holds other objects'


def check_file(path: Union[str, Path]) -> None:
    """Looks at a file, without unpickling anything, for whether a checkpoint can be in it.

    Raises:
        ValueError: It doesn't exist, is empty, truncated or damaged, or is something else (an HTML page, say).
    """
    if not os.path.isfile(path):
        found = 'a folder' if os.path.isdir(path) else 'nothing'
        raise ValueError(f'expected a checkpoint file, found {found} at {path}')
    with open(path, 'rb') as file:
        start = file.read(512)
    if _is_safetensors(path):
        _check_safetensors(path)
    elif start.startswith(b'PK\x03\x04'):
        _check_zip(path)
    elif not start.startswith(b'\x80'):  # a pickle's first opcode, in every protocol torch.save has used
        raise ValueError(f'expected a checkpoint, but {path} {_describe(start)}')


def _is_safetensors(path: Union[str, Path]) -> bool:
    return str(path).endswith('.safetensors')


def _check_safetensors(path: Union[str, Path]) -> None:
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework='pt'):
            pass
    except SafetensorError as error:
        raise ValueError(f'{path} is not a whole safetensors file: {first_line(error)}') from error


# A flipped bit of a header may ask for decompression, another version, a place before the beginning. (No RuntimeError:
# PyTorch raises one in the midst of anything where a process that loads images dies.)
_BAD_ZIP = (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, OSError, ValueError, OverflowError)


def _check_zip(path: Union[str, Path]) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.flag_bits & 1 for member in archive.infolist()):  # encrypted, which no checkpoint is
                raise zipfile.BadZipFile('it asks for a password')
            damaged = archive.testzip()
    except _BAD_ZIP as error:
        raise ValueError(f'{path} is a truncated or damaged checkpoint: {first_line(error)}') from error
    if damaged is not None:
        raise ValueError(f'{path} is a damaged checkpoint: the checksum of {damaged} does not match')


def _describe(start: bytes) -> str:
    if not start:
        return 'is empty'
    if start.lstrip()[:1] == b'<':
        return 'is an HTML or XML page (a download that asked for a login or a confirmation?)'
    if start.startswith(b'version https://git-lfs'):
        return 'is a Git LFS pointer, not the file itself (run git lfs pull)'
    return f'starts with {start[:8]!r}'


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def select_state_dict(checkpoint: Any, use_ema: bool = True) -> Tuple[StateDict, str]:
    """The weights in a loaded checkpoint and the key they were under ('' for a bare state dict).

    Wrappers' prefixes (``module.``, ``_orig_mod.``) are removed from the names.

    Args:
        checkpoint: What :func:`read_file` returned.
        use_ema: Prefer the averaged weights.

    Raises:
        ValueError: There are no weights in it.
    """
    if not isinstance(checkpoint, dict):
        raise ValueError(f'expected a checkpoint to be a dict, got {type(checkpoint).__name__}')
    keys = (*_EMA_KEYS, *_MODEL_KEYS) if use_ema else _MODEL_KEYS
    found = next((key for key in keys if isinstance(checkpoint.get(key), dict)), '')
    state_dict = checkpoint[found] if found else checkpoint
    cleaned = {_strip(key): value for key, value in state_dict.items() if isinstance(value, Tensor)}
    if not cleaned:
        raise ValueError(f'expected a state dict in the checkpoint, found the keys {sorted(map(str, checkpoint))[:8]}')
    return cleaned, found


def _strip(key: str) -> str:
    while key.startswith(_WRAPPER_PREFIXES):
        key = key.split('.', 1)[1]
    return key


def describe_mismatch(state_dict: StateDict, model: nn.Module, ignore: Iterable[str] = ()) -> Optional[str]:
    """How a state dict doesn't fit a model, in one line; None where it fits.

    Args:
        state_dict: Tensors by our names.
        model: The model it is meant for.
        ignore: Names that may differ.
    """
    ignored = set(ignore)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in ignored}
    given = {key: tuple(value.shape) for key, value in state_dict.items() if key not in ignored}
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    reshaped = [key for key in expected if key in given and expected[key] != given[key]]
    if not (missing or unexpected or reshaped):
        return None
    examples: List[str] = [f'{key} expected {expected[key]}, got {given[key]}' for key in reshaped[:3]]
    examples += [f'no {key}' for key in missing[:2]] + [f'unknown {key}' for key in unexpected[:2]]
    return (
        f'{len(missing)} of {len(expected)} tensors missing, {len(unexpected)} unexpected, '
        f'{len(reshaped)} of another shape ({"; ".join(examples[:5])})'
    )


def adapt(state_dict: StateDict, model: nn.Module, ignore: Iterable[str] = ()) -> StateDict:
    """A state dict of ours or of the original release by our names, after a check that it is the model's.

    Args:
        state_dict: As in the file, without wrappers' prefixes.
        model: Which must fit it exactly.
        ignore: Our names that may differ.

    Raises:
        ValueError: It is another model's.
    """
    if is_release(state_dict):
        state_dict = from_release(state_dict)
    mismatch = describe_mismatch(state_dict, model, ignore)
    if mismatch is not None:
        raise ValueError(f'the checkpoint does not fit the model: {mismatch}')
    return state_dict


def load_into(model: nn.Module, checkpoint: Any, use_ema: bool = True) -> str:
    """Loads a checkpoint's weights, ours or the original release's, into a model that must fit them exactly.

    Args:
        model: Where to.
        checkpoint: What :func:`read_file` returned.
        use_ema: Prefer the averaged weights.

    Returns:
        The key that the weights were under ('' for a bare state dict).

    Raises:
        ValueError: There are no weights, or they are another model's; the model is left as it was.
    """
    state_dict, key = select_state_dict(checkpoint, use_ema)
    model.load_state_dict(adapt(state_dict, model))
    return key
