"""Standard output and error for programs that continue when their output cannot be written."""
import io
import os
import select
import sys
from typing import Any, Optional


class _File(io.FileIO):
    """File whose writes never fail; after a failed write, its output is discarded.

    A write to a full non-blocking pipe or terminal waits until there is room, as a write to a blocking one does.
    """

    error: Optional[OSError] = None

    def write(self, content: Any) -> Any:
        while self.error is None:
            try:
                written = super().write(content)
                if written is not None:
                    return written
                _wait_for_room(self)
            except OSError as error:  # a full disk, a pipe without a reader, a closed terminal
                self.error = error
        return memoryview(content).nbytes


def _wait_for_room(file: Any) -> None:
    """Wait until a non-blocking file takes output; programs such as ssh leave terminals and pipes non-blocking."""
    select.select([], [file], [])


def keep_writable() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` by streams that never raise.

    What cannot be written is discarded, and the program keeps its own exit code. Characters that the encoding lacks,
    and the bytes of file names that are not UTF-8, are written as escapes. For the start of a script: a program that
    imports this package keeps its own streams.
    """
    for name, number in (('stdout', 1), ('stderr', 2)):
        setattr(sys, name, _writable(getattr(sys, name), number))


def output_error() -> Optional[OSError]:
    """Return why output was discarded since :func:`keep_writable`; None if it was not, or if its reader has left."""
    sys.stdout.flush()
    error = getattr(getattr(getattr(sys.stdout, 'buffer', None), 'raw', None), 'error', None)
    return None if isinstance(error, BrokenPipeError) else error


def _writable(stream: Any, number: int) -> Any:
    if stream is None:  # the file descriptor was closed when Python started
        try:
            os.fstat(number)
        except OSError:  # still closed: no other file may be opened under its number
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        return open(os.devnull, 'w', errors='backslashreplace')
    if os.name == 'nt' and stream.isatty():
        stream.reconfigure(errors='backslashreplace')  # a console takes UTF-16, which Python's own stream writes
        return stream
    try:
        _flush(stream)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)  # Python flushes the old stream again at its end
    file: Any = io.BufferedWriter(_File(number, 'w', closefd=False))
    return io.TextIOWrapper(
        file, encoding=stream.encoding, errors='backslashreplace',
        line_buffering=stream.line_buffering or stream.write_through)  # the latter by PYTHONUNBUFFERED


def _flush(stream: Any) -> None:
    while True:
        try:
            return stream.flush()
        except BlockingIOError:
            _wait_for_room(stream)
