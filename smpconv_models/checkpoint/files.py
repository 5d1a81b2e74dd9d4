"""Checkpoint files: which of them may be loaded.

The description in a file is checked before memory is allocated: a few kilobytes can describe terabytes. Files are
safetensors, or pickles of plain data, tensors and ``argparse.Namespace``, in a zip archive or in the legacy
format of PyTorch.
"""
import argparse
import json
import os
import pickle
import re
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, Dict, List, Tuple, Union

import torch

from ..utils.errors import first_line, unreadable_file
from . import pickles

# Pickles of a legacy file before its tensors: magic number, version, system, the object, the keys of the storages.
_LEGACY_PICKLES = 5


def load_file(path: Union[str, Path], lazy: bool = False) -> Any:
    """Load a checkpoint file: safetensors, or a pickle of plain data, tensors and ``argparse.Namespace`` only.

    Args:
        path: Path of the file.
        lazy: Whether to leave tensors in the file until they are used, if its format allows that. The file must not
            change then.

    Raises:
        ValueError: If there is no such file, or it is no complete checkpoint, would run code, or would take more memory
            than its size; one line that names the path and the cause.
    """
    check_file(path)
    if _is_safetensors(path):
        from safetensors import torch as safetensors
        try:
            return safetensors.load_file(path)
        except Exception as error:  # of a dtype that this version of PyTorch lacks, for example
            raise ValueError(f'{path} cannot be read: {type(error).__name__} {first_line(error)}') from error
    try:
        # timm's training script stores its arguments in a Namespace
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location='cpu', weights_only=True, mmap=lazy and zipfile.is_zipfile(path))
    except Exception as error:  # the content decides which errors are raised
        reason = 'it holds other objects' if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise ValueError(f'{path} is not a checkpoint of plain tensors and data: {reason}') from error


def check_file(path: Union[str, Path]) -> None:
    """Validate a checkpoint file without loading it.

    Raises:
        ValueError: If the file does not exist or cannot be read, is empty, truncated, damaged or no checkpoint (an HTML
            page, for example), would run code, or describes more than it holds.
    """
    try:
        if not os.path.isfile(path):
            inside = os.path.join(path, 'model_best.pth.tar')
            hint = f"; the run's best weights are in {inside}" if os.path.isfile(inside) else ''
            found = 'a folder' if os.path.isdir(path) else 'nothing'
            raise ValueError(f'expected a checkpoint file, found {found} at {path}{hint}')
        with open(path, 'rb') as file:
            start = file.read(512)
        found = _looks_like(start)
        if _is_safetensors(path) and (start[8:9] == b'{' or not found):  # the length of the header comes first
            _check_safetensors(path)
        elif start.startswith(b'PK\x03\x04'):
            _check_zip(path)
        elif start.startswith(b'\x80') and not _is_tar(start):  # the first opcode of every pickle of torch.save
            _check_legacy(path)
        else:
            raise ValueError(f'expected a checkpoint, but {path} {found or f"starts with {start[:8]!r}"}')
    except OSError as error:
        raise unreadable_file(path, error) from error


def _looks_like(start: bytes) -> str:
    """Return what a file is that is often found in place of a checkpoint; '' if it is none of these."""
    if not start:
        return 'is empty'
    if start.lstrip()[:1] == b'<':
        return 'is an HTML or XML page (a download that asked for a login or a confirmation?)'
    if start.startswith(b'version https://git-lfs'):
        return 'is a Git LFS pointer, not the file itself (run git lfs pull)'
    return ''


def _is_safetensors(path: Union[str, Path]) -> bool:
    return str(path).endswith('.safetensors')


def _is_tar(start: bytes) -> bool:
    """Return whether the file is a tar archive, whose first name may start like a pickle.

    PyTorch would read as much of it as its header claims.
    """
    try:
        tarfile.TarInfo.frombuf(start, 'utf-8', 'surrogateescape')
    except tarfile.HeaderError:
        return False
    return True


def _check_safetensors(path: Union[str, Path]) -> None:
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework='pt'):  # compares the header with the size of the file
            pass
        with open(path, 'rb') as file:
            json.loads(file.read(int.from_bytes(file.read(8), 'little')), object_pairs_hook=_unique)
    except (OverflowError, SafetensorError, ValueError) as error:
        raise ValueError(f'{path} is not a whole safetensors file: {first_line(error)}') from error


def _unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    """Return a dictionary; a repeated key raises ValueError, as readers differ in the value they take."""
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f'{twice[:80]!r} is there twice')
    return result


def _check_unsafe_globals(path: Union[str, Path], contents: pickles.Contents) -> None:
    if contents.unsafe_globals:
        raise ValueError(
            f'{path} is not a checkpoint of plain tensors and data: it references unsafe globals: '
            f'{", ".join(contents.unsafe_globals[:8])}')


def _check_legacy(path: Union[str, Path]) -> None:
    try:
        with open(path, 'rb') as file:
            size = os.fstat(file.fileno()).st_size
            contents = pickles.scan_pickles(file, size, _LEGACY_PICKLES)
            position = file.tell()
    except ValueError as error:
        raise ValueError(f'{path} is a truncated or damaged checkpoint: {first_line(error)}') from error
    _check_unsafe_globals(path, contents)
    keys = contents.last  # of the storages that follow; PyTorch would leave the memory of others uninitialized
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != {*contents.storages}:
        raise ValueError(f'{path} is a damaged checkpoint: its tensors are not those that it lists')
    claimed = sum(claim + 8 for claim in contents.storages.values())  # each starts with its length
    if claimed > size - position:
        raise ValueError(
            f'{path} is a truncated or damaged checkpoint: {claimed} bytes of tensors in {size - position}')


# A flipped bit of a header may ask for decompression, another version, or a position before the file's start.
# RuntimeError is missing: PyTorch raises one at any place if a DataLoader worker dies.
_BAD_ZIP = (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, OSError, ValueError, OverflowError)


def _check_zip(path: Union[str, Path]) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive.infolist(), os.path.getsize(path))
            if archive.start_dir != _directory_offset(path):
                raise ValueError('it has two directories')
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f'the checksum of {damaged!r} does not match')
            contents, sizes = _contents(archive)
    except _BAD_ZIP as error:
        raise ValueError(f'{path} is a truncated or damaged checkpoint: {first_line(error)}') from error
    _check_unsafe_globals(path, contents)
    for key, size in contents.storages.items():
        if size != sizes.get(key):
            raise ValueError(
                f'{path} is a damaged checkpoint: tensor {key[:80]!r} has {sizes.get(key)} bytes, not {size}')


def _contents(archive: zipfile.ZipFile) -> Tuple[pickles.Contents, Dict[str, int]]:
    """Return the contents of the pickle in an archive of torch.save, and the bytes of each storage beside it."""
    names = archive.namelist()
    described = [name for name in names if re.fullmatch(r'(.*/)?data\.pkl', name, re.DOTALL)]
    if len(described) != 1 or described[0].count('/') != 1:
        raise ValueError('it is another kind of archive')
    prefix = described[0].removesuffix('data.pkl')
    if not all(name.startswith(prefix) for name in names):
        raise ValueError('it is more than one archive')
    with archive.open(described[0]) as file:
        contents = pickles.scan_pickles(file, archive.getinfo(described[0]).file_size)
        if file.read(1):
            raise ValueError('there is something behind its pickle')
    data = f'{prefix}data/'
    return contents, {
        member.filename.removeprefix(data): member.file_size for member in archive.infolist()
        if member.filename.startswith(data)}


def _check_members(members: List[zipfile.ZipInfo], size: int) -> None:
    """Raise ValueError unless members are as torch.save writes them.

    Uncompressed members cannot be larger than the archive.
    """
    if any(member.filename.endswith('/constants.pkl') for member in members):
        raise ValueError('it is a TorchScript program; save its state_dict() instead')
    # PyTorch's reader of archives ignores case
    if len({member.filename.lower() for member in members}) < len(members):
        raise ValueError('a name is in its directory twice')
    for member in members:
        if member.flag_bits & 1:
            raise ValueError('the archive is encrypted')
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f'{member.filename!r} is compressed')
        if member.filename != member.orig_filename or member.file_size != member.compress_size:
            raise ValueError(f'{member.orig_filename!r} has two names or sizes')
    if sum(member.file_size for member in members) > size:
        raise ValueError('its parts are larger than the file')


def _directory_offset(path: Union[str, Path]) -> int:
    """Return the offset of an archive's directory as stored at its end; Python looks right before the end instead.

    PyTorch's writer always adds a 64-bit end; archives of other writers may lack it.
    """
    with open(path, 'rb') as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 98, 0))
        end = file.read()
    if end[-22:-18] != b'PK\x05\x06':
        raise ValueError('something is behind its end')
    if end[-42:-38] != b'PK\x06\x07':
        return int.from_bytes(end[-6:-2], 'little')
    if int.from_bytes(end[-34:-26], 'little') != size - 98:
        raise ValueError('it has two ends')
    return int.from_bytes(end[48:56], 'little')
