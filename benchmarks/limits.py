"""Limits of time: deadlines, and processes that end at their limit."""
import functools
import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Callable, NamedTuple, Optional


class Deadline:
    """Instant after which no further part of a measurement starts."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()


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
