"""Files that are complete at every instant: written under a temporary name, then renamed."""
import csv
import io
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path for the block; its file is then flushed to the disk and renamed to ``path``.

    Args:
        path: Path of the file to replace; a link is replaced, not its target.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp creates files that only their owner reads
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(path: str, option: str, extensions: Sequence[str] = ()) -> Path:
    """Return the resolved path of a file to write; leave nothing behind.

    Raises:
        ValueError: If the file cannot be written, is no file, or has none of the extensions, if any are given.
    """
    file = Path(path).resolve()
    if extensions and file.suffix.lower() not in extensions:
        raise ValueError(f'{option} takes the name of a {" or ".join(extensions)} file, got {path}')
    if file.exists() and not file.is_file():  # a folder; a device, which must not be replaced
        raise ValueError(f'{option} {path} is not a file')
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            return file
    except OSError as error:
        raise ValueError(f'{option} {path} cannot be written: {error.strerror}') from error


def _sync_folder(folder: Path) -> None:
    if os.name == 'nt':  # which cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_rows(path: Path, rows: Sequence[Dict[str, Any]]) -> None:
    """Write a CSV file with one header; a column that a row lacks is empty there.

    Bytes of names that are not UTF-8 are written as ``\\udcXX``, as Python and ``save_json`` escape them.
    """
    text = io.StringIO()
    names: List[str] = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as temporary:
        temporary.write_bytes(text.getvalue().encode(errors='backslashreplace'))  # names that are not UTF-8


def save_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + '\n')
