"""Checkpoints of a run: progress, saving, validation of the content, and options that may change on resuming."""
import errno
import io
import json
import logging
import math
import os
import re
import shutil
import socket
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor

from smpconv_models import checkpoint
from smpconv_models.checkpoint import description

from ..utils import atomic_io
from ..utils.atomic_io import atomic_write
from .cli import RENAMED_OPTIONS
from .config import TrainOptions

_logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Progress of a run, in plain data."""
    epoch: int = 0  # number of finished epochs, their evaluation included
    step: int = 0  # number of finished steps of the current epoch
    loss_sum: float = 0.  # sum of the losses of the steps that were applied in the current epoch
    loss_count: int = 0  # number of those steps
    refused: int = 0  # number of consecutive steps, up to now, that were skipped because a number was not finite
    unreadable: int = 0  # number of unreadable images that were skipped, over all ranks
    best_epoch: Optional[int] = None  # epoch of the best accuracy
    rows: List[Dict[str, Any]] = field(default_factory=list)  # measurements of each epoch

    @classmethod
    def from_state_dict(cls, state: Any) -> 'TrainState':
        """Return :meth:`state_dict` as progress; raise ValueError if a field is missing or has another type."""
        if not isinstance(state, dict) or set(state) != {item.name for item in fields(cls)}:
            raise ValueError('the checkpoint has no progress of a run; --initial-checkpoint loads weights alone')
        for name in ('epoch', 'step', 'loss_count', 'refused', 'unreadable'):
            description.check_number(f'progress.{name}', state[name], 0, 1 << 62, whole=True)
        description.check_number('progress.loss_sum', state['loss_sum'], -math.inf, math.inf)
        rows = state['rows']
        if not isinstance(rows, list) or len(rows) != state['epoch'] or not all(map(_is_row, rows)):
            raise ValueError(f'progress.rows must be a row of numbers for each of {state["epoch"]} epochs')
        if state['best_epoch'] is not None:
            description.check_number('progress.best_epoch', state['best_epoch'], 0, len(rows) - 1, whole=True)
        return cls(**state)

    def state_dict(self) -> Dict[str, Any]:
        """Return the progress for a checkpoint."""
        return asdict(self)

    def is_finished(self, epochs: int, patience: Optional[int] = None) -> bool:
        """Return whether there is no epoch left, or the last ``patience`` epochs were not better than the best."""
        is_stalled = patience is not None and self.best_epoch is not None and (
            self.epoch - 1 - self.best_epoch >= patience)
        return self.epoch >= epochs or is_stalled

    def finish_epoch(self, row: Dict[str, Any]) -> None:
        """Add the measurements of the current epoch, and begin the next one."""
        self.rows.append(row)
        self.epoch += 1
        self.step, self.loss_sum, self.loss_count = 0, 0., 0


# Columns of every row, as Trainer measures them.
_COLUMNS = {'epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'}


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and row.keys() >= _COLUMNS and ('ema_loss' in row) == ('ema_top1' in row) and all(
        isinstance(key, str) and isinstance(value, (int, float)) for key, value in row.items())


# --- saving ---

# Errors of a full disk, a quota, a limit of a file's size.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save_checkpoint(path: Path, state: Dict[str, Any], previous: Optional[Path] = None) -> None:
    """Write a checkpoint, and validate the file before it takes its name; the replaced file is renamed to ``previous``.

    ``state`` has tensors and plain data, which load with ``weights_only=True``.

    Raises:
        FloatingPointError: If a weight is not finite.
        OSError: If there is no space, or the folder cannot be written to.
        ValueError: If the written file is damaged.
    """
    for key in ('state_dict', 'state_dict_ema'):
        for name, value in state.get(key, {}).items():
            if value.is_floating_point() and not value.isfinite().all():
                raise FloatingPointError(
                    f'{name} of the {key} is not finite, so it is not saved; a lower --lr may help')
    content = io.BytesIO()  # torch's writer to a file hides the system's error in one of its own
    torch.save(state, content)
    try:
        with atomic_write(path) as temporary:
            temporary.write_bytes(content.getbuffer())
            checkpoint.check_file(temporary)
            if previous is not None and path.exists():
                _link_or_copy(path, previous)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise OSError(f'{path} cannot be written: {error}') from error
        needed, free = (f'{size / 2 ** 20:.1f} MiB' for size in (content.tell(), shutil.disk_usage(path.parent).free))
        less = '' if error.errno == errno.ENOSPC else ', a quota or limit (ulimit -f) has less'
        raise OSError(
            f'no space: a checkpoint needs {needed}, the disk has {free}{less}, at {path} ({error.strerror})'
        ) from error


def _link_or_copy(path: Path, previous: Path) -> None:
    """Give a file a second name if the file system has hard links, otherwise copy it."""
    with atomic_write(previous) as temporary:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copy(path, temporary)
    temporary.unlink(missing_ok=True)  # renaming has no effect if both names are of one file already


# --- content ---

# Keys of a checkpoint from which a run can be resumed.
_KEYS = {'progress', 'args', 'classes', 'images', 'amp_scaler', 'state_dict', 'optimizer'}


def is_resumable(loaded: Any) -> bool:
    """Return whether a checkpoint has all that a run resumes from."""
    return isinstance(loaded, dict) and loaded.keys() >= _KEYS


def check_content(loaded: Any, path: Any) -> None:
    """Check the types of everything that a run resumes from; a file that is not of a training run passes.

    Raises:
        ValueError: If a value has another type than its field; the line names the file and the field.
    """
    if not is_resumable(loaded):
        return
    try:
        if loaded['classes'] is not None:
            description.check_texts('classes', loaded['classes'])
        TrainState.from_state_dict(loaded['progress'])
        arguments = checkpoint.get_train_args(loaded)
        for key in ('global_batch_size', 'epochs', 'patience'):
            if key != 'patience' or arguments.get(key) is not None:
                description.check_number(f'args.{key}', arguments.get(key), 1, 10 ** 9, whole=True)
        if loaded['images'] is not None:
            description.check_number('images', loaded['images'], 0, 1 << 62, whole=True)
        if 'split' in loaded:
            description.check_split(loaded['split'])
        for key in ('state_dict', 'state_dict_ema'):
            _check_state_dict(key, loaded.get(key, {}))
        _check_optimizer(loaded['optimizer'])
        scaler = loaded['amp_scaler']
        if not isinstance(scaler, dict):
            raise ValueError(f'amp_scaler must be a dictionary, got {description.shown(scaler)}')
        for key, value in scaler.items():
            description.check_number(f'amp_scaler.{key}'[:100], value, 0, 1e38)
    except ValueError as error:
        raise ValueError(f'{path} cannot be resumed from: {error}') from error


def _check_state_dict(name: str, state_dict: Any) -> None:
    if not isinstance(state_dict, dict):
        raise ValueError(f'{name} must be a dictionary of tensors, got {description.shown(state_dict)}')
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f'{name} must be a dictionary of tensors, got {description.shown(value)} as {key!r:.80}')
    checkpoint.check_finite(state_dict)


def _check_optimizer(optimizer: Any) -> None:
    """Check what every optimizer of PyTorch and timm saves: parameter groups, and a state for each parameter."""
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get('state'), dict) or not isinstance(
            optimizer.get('param_groups'), list):
        raise ValueError('optimizer must be a dictionary of state and param_groups')
    for group in optimizer['param_groups']:
        params = group.get('params') if isinstance(group, dict) else None
        if not isinstance(params, list) or not all(type(index) is int for index in params):
            raise ValueError('optimizer.param_groups must be dictionaries with a list of params, which are numbers')
        _check_values('optimizer.param_groups', group)
    for index, state in optimizer['state'].items():
        if not isinstance(index, int) or not isinstance(state, dict):
            raise ValueError(f'optimizer.state must be a dictionary for each parameter, got {description.shown(state)}')
        _check_values(f'optimizer.state.{index}', state)


def _check_values(name: str, values: Dict[Any, Any]) -> None:
    """Check that values are plain data, tensors, data types, or lists of them."""
    for key, value in values.items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(item, (Tensor, torch.dtype)):
                description.check_plain(f'{name}.{key}', item)


# --- resuming ---

# Options that decide how far a run is, what its images are or what its weights mean.
_IMMUTABLE_ARGS = (
    'model', 'model_kwargs', 'num_classes', 'in_chans', 'dataset', 'train_split', 'opt', 'layer_decay', 'seed',
    'global_batch_size', 'model_ema', 'freeze', 'val_split_fraction', 'balance_classes',
)

# Options that do not change a run's results, except for rounding.
_IGNORED_ARGS = (
    'config', 'output', 'experiment', 'workers', 'pin_mem', 'device', 'validation_batch_size',
    'recovery_interval', 'save_interval', 'save_top_k', 'log_interval', 'resume', 'force_resume', 'log_tensorboard',
    'log_wandb', 'wandb_project', 'dist_timeout', 'debug', 'dataset_download', 'grad_accum_steps', 'max_unreadable',
    'max_nonfinite_steps',
)


def diff_args(then: Dict[str, Any], now: Dict[str, Any]) -> Tuple[List[str], List[str]]:
    """Return lines for options that changed since a checkpoint and may, and lines for those that must not."""
    # a checkpoint of an older version lacks newer options, whose default is what it did
    then = {**TrainOptions().as_dict(), **{RENAMED_OPTIONS.get(key, key): value for key, value in then.items()}}
    changed = {
        key: f'{checkpoint.printable(key)} {checkpoint.shown(then.get(key))} -> {checkpoint.shown(now.get(key))}'
        for key in sorted(set(then) | set(now))
        if key not in _IGNORED_ARGS and _without_tuples(then.get(key)) != _without_tuples(now.get(key))
    }
    return (
        [text for key, text in changed.items() if key not in _IMMUTABLE_ARGS],
        [text for key, text in changed.items() if key in _IMMUTABLE_ARGS],
    )


def _without_tuples(value: Any) -> Any:
    """Return a value as YAML, which has no tuples, would give it back."""
    if isinstance(value, dict):
        return {key: _without_tuples(item) for key, item in value.items()}
    return [_without_tuples(item) for item in value] if isinstance(value, (list, tuple)) else value


# Hyperparameters of a parameter group that the command decides, as it decides flags; other numbers are state.
_GROUP_HPARAMS = ('lr', 'initial_lr', 'lr_scale', 'weight_decay', 'momentum', 'betas', 'eps')

# State of an optimizer that is a tensor: as large as its parameter, or reduced over dimensions.
_MOMENTS = ('exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'momentum_buffer', 'square_avg', 'grad_avg')


def load_optimizer(optimizer: Any, state: Dict[str, Any]) -> None:
    """Load an optimizer's state; hyperparameters that the checkpoint lacks keep their values.

    Raises:
        ValueError: If parameter groups, types of hyperparameters or shapes differ.
    """
    own = optimizer.state_dict()['param_groups']
    given = state['param_groups']
    if [group['params'] for group in own] != [group['params'] for group in given]:
        expected, got = (description.shown([len(group['params']) for group in groups]) for groups in (own, given))
        raise ValueError(f'the parameter groups of the optimizer must have {expected} parameters, got {got}')
    for ours, theirs in zip(own, given):
        for key, value in theirs.items():
            if not (_is_count(value) if key == 'step' else _have_same_type(ours.get(key), value)):
                raise ValueError(
                    f'option {key} of the optimizer must be a value like {description.shown(ours.get(key, 0))}, got '
                    f'{description.shown(value)}')
    shapes = {index: parameter.shape for group, ours in zip(optimizer.param_groups, own)
              for index, parameter in zip(ours['params'], group['params'])}
    for index, values in state['state'].items():
        if index not in shapes:
            raise ValueError(f'the optimizer has no parameter {index}')
        for key, value in values.items():
            if key in _MOMENTS and not _is_reduced(value, shapes[index]):
                raise ValueError(
                    f'{key} of parameter {index} of the optimizer must have shape {tuple(shapes[index])}, '
                    f'got {tuple(value.shape) if isinstance(value, Tensor) else description.shown(value)}')
            if key == 'step' and not _is_count(value):
                raise ValueError(
                    f'step of parameter {index} of the optimizer must be a count, got {description.shown(value)}')
    groups = [{**ours, **theirs, **{
        key: value for key, value in ours.items() if key in _GROUP_HPARAMS or isinstance(value, (bool, str, type(None)))
    }} for ours, theirs in zip(own, given)]
    optimizer.load_state_dict({**state, 'param_groups': groups})


def _have_same_type(ours: Any, theirs: Any) -> bool:
    """Return whether two hyperparameters have the same type; whole numbers are numbers, and None fits any type."""
    kinds = [(int, float) if isinstance(value, (int, float)) and not isinstance(value, bool) else
             (list, tuple) if isinstance(value, (list, tuple)) else type(value) for value in (ours, theirs)]
    return kinds[0] == kinds[1] or ours is None or theirs is None


def _is_count(value: Any) -> bool:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            return False
        value = value.item()
    return isinstance(value, (int, float)) and 0 <= value < math.inf


def _is_reduced(value: Any, shape: torch.Size) -> bool:
    """Return whether a value is a tensor of this shape, in which dimensions may be missing or have size 1."""
    sizes = iter(shape)
    return isinstance(value, Tensor) and all(size == 1 or size in sizes for size in value.shape)


# --- the folder of a run ---


# Seconds to wait for a killed run: its DataLoader workers hold the lock until they notice, after five.
_LOCK_TIMEOUT_S = 6.


class RunDir:
    """Files of a run in a folder, which need not exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arguments = path / 'args.yaml'
        self.last = path / 'last.pth.tar'
        self.previous = path / 'previous.pth.tar'
        self.best = path / 'model_best.pth.tar'
        self.summary_csv = path / 'summary.csv'
        self.split_csv = path / 'split.csv'
        self.summary_json = path / 'summary.json'
        self.curves = path / 'curves.png'
        self.summary_png = path / 'summary.png'
        self._owner_file = path / '.run.json'
        self._lock = FileLock(path / '.run.lock')
        self._owner = {'host': socket.gethostname(), 'pid': os.getpid(), 'since': time.strftime('%Y-%m-%d %H:%M:%S')}

    @staticmethod
    def best_checkpoint(path: str) -> str:
        """Return the path of a file, or of the best checkpoint if the path is a run's folder."""
        return str(RunDir(Path(path)).best if Path(path).is_dir() else path)

    def acquire(self) -> None:
        """Create the folder if there is none, and lock it until :meth:`release` or the end of the process.

        A folder that cannot be written to, or that another run holds, is a ValueError.
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
        for path in (
                self.arguments, self.last, self.previous, self.best, self.split_csv, self.summary_csv,
                self.summary_json, self.curves, self.summary_png, self._owner_file,
                Path('checkpoint-*.pth.tar'), Path('best-*.pth.tar')):  # of any epoch
            for temporary in self.path.glob(f'.{path.name}.*'):  # of atomic_write in a process that was killed
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
        """Return path and content of the newest valid checkpoint, if there is any; ValueError if none is valid."""
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

    def keep_top(self, epochs: Sequence[int], epoch: int, content: Dict[str, Any]) -> None:
        """Save the weights of ``epoch`` if it is one of the best ``epochs``, and remove those of other epochs."""
        paths = {other: self.path / f'best-{other}.pth.tar' for other in epochs}
        if epoch in paths:
            save_checkpoint(paths[epoch], content)
        for path in set(self.path.glob('best-*.pth.tar')) - set(paths.values()):
            if re.fullmatch(r'best-\d+\.pth\.tar', path.name):
                path.unlink()

    def save(self, state: Dict[str, Any]) -> None:
        """Save the last checkpoint, and keep the one before it."""
        save_checkpoint(self.last, state, self.previous)

    def save_arguments(self, arguments: Dict[str, Any]) -> None:
        """Write options as YAML, as ``--config`` reads them."""
        with atomic_io.atomic_write(self.arguments) as temporary:
            temporary.write_text(yaml.safe_dump(arguments, sort_keys=True))
