"""The folder of a run, which one run at a time may hold."""
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from filelock import FileLock, Timeout

from smpconv_models import checkpoint

from ..utils import atomic_io
from . import saving

_logger = logging.getLogger(__name__)

# Seconds for what a killed run leaves: the processes that load for it hold the lock until they notice, after five.
_PATIENCE = 6.


class RunDir:
    """What a run leaves behind.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arguments = path / 'args.yaml'
        self.last = path / 'last.pth.tar'
        self.previous = path / 'previous.pth.tar'
        self.best = path / 'model_best.pth.tar'
        self.table = path / 'summary.csv'
        self.summary = path / 'summary.json'
        self.curves = path / 'curves.png'
        self.picture = path / 'summary.png'
        self._holder = path / '.run.json'
        self._lock = FileLock(path / '.run.lock')
        self._own = {
            'host': socket.gethostname(), 'pid': os.getpid(), 'since': time.strftime('%Y-%m-%d %H:%M:%S')}

    def hold(self) -> None:
        """Makes the folder if there is none, and takes it for this process until it ends.

        Raises:
            ValueError: It can't be written to, or another run holds it.
        """
        try:
            self._acquire()
            atomic_io.save_json(self._holder, self._own)
        except Timeout as error:
            raise ValueError(
                f'another run is in {self.path}: {self._described()}; wait for it, or name this one with '
                '--experiment') from error
        except OSError as error:
            raise ValueError(f'--output {self.path} cannot be written to: {error}') from error
        atomic_io.remove_temporaries([
            self.arguments, self.last, self.previous, self.best, self.table, self.summary, self.curves, self.picture,
            self._holder])
        for temporary in self.path.glob('.checkpoint-*.pth.tar.*'):  # of snapshots, of whichever epochs
            temporary.unlink(missing_ok=True)

    def _acquire(self) -> None:
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                if os.path.lexists(self.path) and not os.path.isdir(self.path):  # a file, a link to nothing
                    raise
                continue  # a run that was refused has removed the folder in between, as below
            try:
                self._lock.acquire(timeout=_PATIENCE)
                return
            except FileNotFoundError:
                continue

    def release(self) -> None:
        """Leave the folder to the next run, if this run holds it."""
        if not self._lock.is_locked:
            return
        try:
            if json.loads(self._holder.read_text()) != self._own:
                return  # the folder was renamed, and another run is in a new one of its name
            self._holder.unlink()
            lock = Path(self._lock.lock_file)
            if [path.name for path in self.path.iterdir()] == [lock.name]:  # of a run that was refused
                lock.unlink()  # while it is held: whoever waits for it notices, and opens the next one
                self.path.rmdir()
        except (OSError, ValueError, RecursionError) as error:  # renamed, removed, read-only, or the next run's
            _logger.debug('%s is left as it is: %s', self.path, error)
        finally:
            self._lock.release()

    def _described(self) -> str:
        try:
            holder = json.loads(self._holder.read_text())
            return checkpoint.printable(f'process {holder["pid"]} on {holder["host"]} since {holder["since"]}')
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not written yet, or not by this package
            return 'it has not said who it is'

    def has_checkpoint(self) -> bool:
        """Whether there is any, whole or not."""
        return self.last.exists() or self.previous.exists()

    def newest(self, check: Callable[[Any], None] = lambda loaded: None) -> Optional[Tuple[str, Any]]:
        """The newest checkpoint that is whole; None where there is none at all.

        Args:
            check: Raises ValueError for content that no run resumes from.

        Raises:
            ValueError: There are some, none of them whole.
        """
        problems: List[str] = []
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                loaded = checkpoint.read_file(path)
                check_named(check, loaded, path)
            except ValueError as error:
                problems.append(str(error))
                _logger.warning('%s; looking for an older one', error)
                continue
            if problems:  # out of the way, or the next save would keep it in place of this one
                os.replace(self.last, self.last.with_name('refused.pth.tar'))
            return str(path), loaded
        if problems:
            raise ValueError('; '.join(problems) + '; remove them to start anew')
        return None

    def snapshot(self, epoch: int) -> Path:
        """Where the weights of an epoch are kept, by timm's name."""
        return self.path / f'checkpoint-{epoch}.pth.tar'

    def save(self, state: Dict[str, Any]) -> None:
        """Makes this the last checkpoint, and the one that was the last the previous one."""
        saving.save_checkpoint(self.last, state, self.previous)


def check_named(check: Callable[[Any], None], loaded: Any, path: Any) -> None:
    """Call `check` on a checkpoint's content; name the file in its ValueError."""
    try:
        check(loaded)
    except ValueError as error:
        raise ValueError(f'{path} cannot be resumed from: {error}') from error
