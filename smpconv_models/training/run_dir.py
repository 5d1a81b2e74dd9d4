"""Folder of a run, which one run at a time may hold."""
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import yaml
from filelock import FileLock, Timeout

from smpconv_models import checkpoint

from ..utils import atomic_io
from .checkpointing import check_content, save_checkpoint

_logger = logging.getLogger(__name__)

# Seconds to wait for a killed run: its DataLoader workers hold the lock until they notice, after five.
_LOCK_TIMEOUT_S = 6.


class RunDir:
    """Files of a run.

    Args:
        path: Path of the folder, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arguments = path / 'args.yaml'
        self.last = path / 'last.pth.tar'
        self.previous = path / 'previous.pth.tar'
        self.best = path / 'model_best.pth.tar'
        self.summary_csv = path / 'summary.csv'
        self.summary_json = path / 'summary.json'
        self.curves = path / 'curves.png'
        self.summary_png = path / 'summary.png'
        self._owner_file = path / '.run.json'
        self._lock = FileLock(path / '.run.lock')
        self._owner = {
            'host': socket.gethostname(), 'pid': os.getpid(), 'since': time.strftime('%Y-%m-%d %H:%M:%S')}

    @staticmethod
    def best_checkpoint(path: str) -> str:
        """Return the path of a file, or of the best checkpoint if the path is a run's folder."""
        return str(RunDir(Path(path)).best if Path(path).is_dir() else path)

    def acquire(self) -> None:
        """Create the folder if there is none, and lock it until :meth:`release` or the end of the process.

        Raises:
            ValueError: If it cannot be written to, or another run holds it.
        """
        try:
            self._acquire_lock()
            atomic_io.save_json(self._owner_file, self._owner)
        except Timeout as error:
            raise ValueError(
                f'another run is in {self.path}: {self._describe_owner()}; wait for its end, or choose another '
                '--experiment') from error
        except OSError as error:
            raise ValueError(f'--output {self.path} cannot be written to: {error}') from error
        atomic_io.remove_temporaries([
            self.arguments, self.last, self.previous, self.best, self.summary_csv, self.summary_json, self.curves,
            self.summary_png, self._owner_file])
        for temporary in self.path.glob('.checkpoint-*.pth.tar.*'):  # of snapshots of any epoch
            temporary.unlink(missing_ok=True)

    def _acquire_lock(self) -> None:
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                if os.path.lexists(self.path) and not os.path.isdir(self.path):  # a file, or a broken link
                    raise
                continue  # another run has removed the folder in between, see release()
            try:
                self._lock.acquire(timeout=_LOCK_TIMEOUT_S)
                return
            except FileNotFoundError:
                continue

    def release(self) -> None:
        """Unlock the folder, if this run holds it; remove it if nothing was written."""
        if not self._lock.is_locked:
            return
        try:
            if json.loads(self._owner_file.read_text()) != self._owner:
                return  # the folder was renamed, and another run is in a new one of its name
            self._owner_file.unlink()
            lock = Path(self._lock.lock_file)
            if [path.name for path in self.path.iterdir()] == [lock.name]:
                lock.unlink()  # while it is held: a waiting process notices, and opens the next one
                self.path.rmdir()
        except (OSError, ValueError, RecursionError) as error:  # renamed, removed, read-only, or the next run's
            _logger.debug('%s is left as it is: %s', self.path, error)
        finally:
            self._lock.release()

    def _describe_owner(self) -> str:
        try:
            owner = json.loads(self._owner_file.read_text())
            return checkpoint.printable(f'process {owner["pid"]} on {owner["host"]} since {owner["since"]}')
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not written yet, or not by this package
            return 'an unknown process'

    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint, valid or not."""
        return self.last.exists() or self.previous.exists()

    def load_latest(self) -> Optional[Tuple[str, Any]]:
        """Return path and content of the newest valid checkpoint; None if there is no checkpoint.

        Raises:
            ValueError: If there are checkpoints, but no valid one.
        """
        problems: List[str] = []
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                loaded = checkpoint.load_file(path)
                check_content(loaded, path)
            except ValueError as error:
                problems.append(str(error))
                _logger.warning('%s; looking for an older one', error)
                continue
            if problems:  # otherwise the next save would keep the refused file as the previous checkpoint
                os.replace(self.last, self.last.with_name('refused.pth.tar'))
            return str(path), loaded
        if problems:
            raise ValueError('; '.join(problems) + '; remove them to start from the beginning')
        return None

    def snapshot(self, epoch: int) -> Path:
        """Return the path of the weights of an epoch, by timm's name."""
        return self.path / f'checkpoint-{epoch}.pth.tar'

    def save(self, state: Dict[str, Any]) -> None:
        """Save the last checkpoint, and keep the one before it."""
        save_checkpoint(self.last, state, self.previous)

    def save_arguments(self, arguments: Dict[str, Any]) -> None:
        """Write options as YAML, as ``--config`` reads them."""
        with atomic_io.atomic_write(self.arguments) as temporary:
            temporary.write_text(yaml.safe_dump(arguments, sort_keys=True))
