"""Signals that ask a run to stop."""
import multiprocessing
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Dict, Optional, Type

# SIGUSR1 is what Slurm sends ahead of the time limit if it is asked to (sbatch --signal=USR1@120); SIGHUP is sent when
# a terminal is closed.
_SIGNALS = tuple(
    getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP', 'SIGQUIT') if hasattr(signal, name))


def _handle(handler: Any) -> Dict[int, Any]:
    """Set the handler of all signals that are not ignored, as nohup ignores SIGHUP; return the handlers before."""
    return {
        number: signal.signal(number, handler) for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN}


class TrainingInterrupted(Exception):
    """A run was asked to stop, and what it had done is saved.

    Args:
        number: The signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f'stopped by {signal.Signals(number).name}')
        self.exit_code = 128 + number


class GracefulStop:
    """Notes a signal to stop, within a ``with`` block. A second Ctrl-C doesn't wait for the next step's end."""

    def __init__(self) -> None:
        self.number: Optional[int] = None
        self._handlers: Dict[int, Any] = {}

    def __enter__(self) -> 'GracefulStop':
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._handlers = _handle(self._note)
        return self

    def __exit__(
            self,
            kind: Optional[Type[BaseException]],
            error: Optional[BaseException],
            traceback: Optional[TracebackType],
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Optional[FrameType]) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


class WorkerSignalGuard:
    """For processes that load images: a signal to all processes of a job must not end them before their parent."""

    def __init__(self) -> None:
        self._is_down = multiprocessing.RawValue('b', 0)  # shared

    def release(self) -> None:
        """The parent is about to end: from now on, they end by signals."""
        self._is_down.value = 1

    def __call__(self, worker: int) -> None:
        """At the start of such a process."""
        _handle(self._end_if_down)

    def _end_if_down(self, number: int, frame: Optional[FrameType]) -> None:
        if self._is_down.value:
            os._exit(128 + number)
