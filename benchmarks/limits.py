"""Limits of time: deadlines, and processes that end at their limit."""
import functools
import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional


class Deadline:
    """Instant after which no further part of a measurement starts."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._longest: Dict[str, float] = {}

    def left(self) -> float:
        """Return the seconds until the end, negative after it."""
        return self._end - time.monotonic()

    def allows(self, kind: str, first: float) -> bool:
        """Return whether a part of a measurement fits into the time left.

        Args:
            kind: Kind of the part; parts of one kind take about the same time.
            first: Seconds that the first part of its kind may take. Later ones may take half as much again as the
                longest that was timed.
        """
        return self.left() >= (1.5 * self._longest[kind] if kind in self._longest else first)

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Note the time of a part for :meth:`allows`, unless the part raises an error."""
        before = self.left()
        yield
        self._longest[kind] = max(self._longest.get(kind, 0.), before - self.left())


class Outcome(NamedTuple):
    """Value that a function returned, or the reason for which there is none."""
    value: Any
    fault: Optional[str] = None


def call(function: Callable[[], Any], seconds: float) -> Outcome:
    """Call a function in a forked process, and end the process and its children after ``seconds``.

    A GPU that reports an illegal access, and a compiler that hangs, end this process only. The caller must not have
    used CUDA, which does not survive a fork. An exception's traceback goes to the standard error.
    """
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=functools.partial(_send_result, function, sender))
    process.start()
    assert process.pid is not None
    _lead_group(process.pid)
    sender.close()
    try:
        if not receiver.poll(max(seconds, 0)):
            return Outcome(None, f'stopped after {seconds:.0f} seconds')
        return Outcome(receiver.recv())
    except EOFError:  # the process ended without a result
        process.join()
        return Outcome(None, f'ended with exit code {process.exitcode}')
    finally:
        _end_group(process.pid)
        process.join()


def _send_result(function: Callable[[], Any], sender: Connection) -> None:
    _lead_group(os.getpid())
    value = function()
    sys.stdout.flush()  # the caller may end this process once it has the value
    sender.send(value)


def _lead_group(pid: int) -> None:
    """Make a process the leader of a group, from both sides, because either may be the first to need it."""
    with suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)


def _end_group(pid: int) -> None:
    """End all processes of a group: those that were asked to and did not end are killed."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGTERM)
        time.sleep(0.2)
        os.killpg(pid, signal.SIGKILL)
