"""Tar files, unpacked as a whole or not at all."""
import os
import shutil
import tarfile
import zlib
from pathlib import Path

from tqdm import tqdm

from smpconv_models.checkpoint import first_line


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a tar file into a folder, which is there when all of it is.

    Members that would lie elsewhere, links out of the folder, devices are refused (tarfile's filter of data).

    Args:
        archive: The tar file, compressed or not.
        folder: Where to; until it is whole, under this name with ``.partial`` after it.

    Raises:
        ValueError: It is no tar file, damaged, tries to leave the folder, or the disk doesn't do; or Python is one
            without tarfile's filters.
    """
    if not hasattr(tarfile, 'data_filter'):
        raise ValueError(f'{archive} cannot be unpacked safely: expected Python 3.10.12, 3.11.4 or newer')
    partial = folder.with_name(f'{folder.name}.partial')
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        with tarfile.open(archive) as tar:
            for member in tqdm(tar, desc=f'unpacking {archive.name}', unit=' files', disable=None):
                tar.extract(member, partial, filter='data')
        os.rename(partial, folder)
    except (EOFError, OSError, tarfile.TarError, zlib.error) as error:
        raise ValueError(
            f'{archive} cannot be unpacked to {folder}: {type(error).__name__} {first_line(error)}') from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
