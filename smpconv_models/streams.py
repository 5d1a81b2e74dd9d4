"""Standard output and error that a program outlives: closed, full, without a reader, or of a narrow encoding."""
import io
import os
import sys
from typing import Any


class _File(io.FileIO):
    """File whose writes never fail; after a failed write, its output is discarded."""

    is_lost = False

    def write(self, content: Any) -> Any:
        if not self.is_lost:
            try:
                return super().write(content)
            except OSError:  # a full disk, a pipe without a reader, a closed terminal
                self.is_lost = True
        return memoryview(content).nbytes


def keep_writable() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` by streams that never raise.

    What cannot be written is discarded, and the program keeps its own exit code. Characters that the encoding lacks,
    and the bytes of file names that are not UTF-8, are written as escapes. For the start of a script: a program that
    imports this package keeps its own streams.
    """
    for name, number in (('stdout', 1), ('stderr', 2)):
        setattr(sys, name, _writable(getattr(sys, name), number))


def _writable(stream: Any, number: int) -> Any:
    if stream is None:  # the file descriptor was closed when Python started
        _occupy(number)
        return open(os.devnull, 'w', errors='backslashreplace')
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)  # Python flushes the old stream again at its end
    file: Any = io.BufferedWriter(_File(number, 'w', closefd=False))
    return io.TextIOWrapper(
        file, encoding=stream.encoding, errors='backslashreplace',
        line_buffering=stream.line_buffering or stream.write_through)  # the latter by PYTHONUNBUFFERED


def _occupy(number: int) -> None:
    """Open the null device under a file descriptor that is free, so that no other file is opened there."""
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:
            os.dup2(null, number)
            os.close(null)
