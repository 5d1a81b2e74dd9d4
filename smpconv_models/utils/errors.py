"""Error messages in one line."""
import difflib
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable, Iterator, Union

_MAX_LINE = 2000  # characters of another library's message, which may repeat the content of a file


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, bounded and escaped if it cannot be printed, or its type's name."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:_MAX_LINE]
    return line if line.isprintable() else line.encode('unicode_escape').decode('ascii')


def unreadable_file(path: Union[str, Path], error: OSError) -> ValueError:
    """Return a ValueError that names a file and the system's reason why the file cannot be read."""
    return ValueError(f'{path} cannot be read: {error.strerror or first_line(error)}')


@contextmanager
def error_prefix(name: str) -> Iterator[None]:
    """Start the message of a ValueError that is raised in the block with ``name``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f'{name}: {error}') from error


def suggestion_suffix(name: str, known: Iterable[str]) -> str:
    """Return a suffix for an error message with the known name closest to `name`; '' if no name is close."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f'; did you mean {near[0]}?' if near else ''
