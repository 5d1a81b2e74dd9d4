"""Progress of a run: a bar on a terminal, log lines elsewhere; TensorBoard and Weights & Biases on request."""
import importlib.util
import logging
import re
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import torch
from torch import distributed as dist
from tqdm import tqdm

from smpconv_models.utils.errors import first_line

from . import rng
from .checkpointing import TrainState
from .config import LoggingOptions, TrainOptions
from .distributed import DistributedContext

_logger = logging.getLogger(__name__)


def check_logging_dependencies(options: LoggingOptions) -> None:
    """Raise ValueError if the options need a package that is not installed."""
    needed = {'tensorboard': options.log_tensorboard, 'wandb': options.log_wandb, 'matplotlib': True}
    for name, is_needed in needed.items():
        if is_needed and importlib.util.find_spec(name) is None:
            purpose = 'the picture of the run' if name == 'matplotlib' else f'--log-{name}'
            raise ValueError(f'{purpose} needs {name}: pip install {name}')


class ProgressLogger:
    """Logger of steps and epochs, from the progress at which the run begins or resumes."""

    def __init__(self, options: TrainOptions, folder: Path, state: TrainState, steps: int) -> None:
        self.options = options
        self.steps = steps
        self.bar: Optional[tqdm] = None
        self.writers: List[_Writer] = []
        if options.logging.log_tensorboard:
            self.writers.append(_tensorboard(folder, state.epoch * steps + state.step + 1))
        if options.logging.log_wandb:
            self.writers.append(_wandb(options, folder))
        _logger.info('epoch  train loss  val loss   top-1  EMA top-1  learning rate  seconds')

    def start_epoch(self, state: TrainState) -> None:
        """Show the bar of an epoch that begins or resumes."""
        self.begin = time.perf_counter()
        self.done = 0
        self.bar = tqdm(
            total=self.steps, initial=state.step, desc=f'epoch {state.epoch}', unit='step', leave=False,
            disable=None, bar_format='{desc}: {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]')

    def step(self, state: TrainState, loss: float, lr: float) -> None:
        """Log a finished step with its loss and the largest learning rate."""
        assert self.bar is not None
        self.done += 1
        seconds = (time.perf_counter() - self.begin) / self.done
        left = (self.options.run.epochs - state.epoch) * self.steps - state.step
        assert self.options.run.global_batch_size is not None
        speed = self.options.run.global_batch_size / seconds
        line = f'loss {loss:.3f}, lr {lr:.2e}, {speed:.0f} images/s'
        self.bar.set_postfix_str(f'{line}, run {_clock(left * seconds)}', refresh=False)
        self.bar.update()
        if self.done % self.options.logging.log_interval == 0:
            if self.bar.disable:
                _logger.info(
                    'epoch %d  step %d/%d  %s, %s left', state.epoch, state.step, self.steps, line,
                    _clock(left * seconds))
            values = {'train/loss': loss, 'train/lr': lr, 'train/images_per_second': speed}
            self._write(values, state.epoch * self.steps + state.step)

    def end_epoch(self) -> None:
        """Close the bar of an epoch, finished or not."""
        if self.bar is not None:
            self.bar.close()

    def log_epoch(self, row: Dict[str, Any], seconds: float) -> None:
        """Log the measurements of a finished epoch."""
        ema = f'{row["ema_top1"]:9.2f}' if 'ema_top1' in row else ' ' * 9
        _logger.info(
            f'{row["epoch"]:5d}  {row["train_loss"]:10.4f}  {row["eval_loss"]:8.4f}  {row["eval_top1"]:6.2f}  '
            f'{ema}  {row["lr"]:13.2e}  {seconds:7.1f}')
        values = {f'epoch/{name}': value for name, value in row.items() if name != 'epoch'}
        self._write(values, (row['epoch'] + 1) * self.steps)

    def close(self) -> None:
        """Close all writers at the end of the run, however it ends."""
        self._each(lambda writer: writer.close())

    def _write(self, values: Dict[str, float], step: int) -> None:
        self._each(lambda writer: writer.write(values, step))

    def _each(self, act: Callable[['_Writer'], None]) -> None:
        """Call a function for each writer; a writer that fails is dropped, and the run continues."""
        for writer in list(self.writers):
            try:
                act(writer)
            except (OSError, RuntimeError, ValueError) as error:
                _logger.warning('logging to %s ends: %s', writer.name, error)
                self.writers.remove(writer)


class _Writer(NamedTuple):
    name: str
    write: Callable[[Dict[str, float], int], None]
    close: Callable[[], None]


def _tensorboard(folder: Path, step: int) -> _Writer:
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(str(folder / 'tensorboard'), purge_step=step)  # repeated steps replace the first

    def write(values: Dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    return _Writer('TensorBoard', write, writer.close)


def _wandb(options: TrainOptions, folder: Path) -> _Writer:
    import wandb
    try:
        run = wandb.init(
            project=options.logging.wandb_project, name=folder.name, dir=str(folder), config=options.as_dict(),
            resume='allow', id=f'{rng.derive_seed(str(folder.resolve())):x}')  # one id a folder, to resume it
    except wandb.Error as error:
        raise ValueError(f'--log-wandb: {error}; WANDB_MODE=offline needs no network') from error
    return _Writer('Weights & Biases', lambda values, step: run.log(values, step=step), run.finish)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}'


_NO_MEMORY = ('out of memory', 'not enough memory', "can't allocate memory", 'bad allocation', 'std::bad_alloc')
_NO_WORKER = ('dataloader worker (pid', 'dataloader timed out', 'shared memory', 'file </torch', 'bus error')
_NO_PEER = ('gloo', 'nccl', 'connection closed', 'connection reset', 'timed out', 'broken pipe')


def describe_error(
        error: Exception, world: DistributedContext, batch_size: int, workers: int,
        is_training: bool = False) -> Optional[str]:
    """Return a line for an error of the environment or the data; None for a fault of the program.

    Args:
        error: Error that ended the run.
        world: Ranks of the run, which may be the cause.
        batch_size: Batch size of each rank, for the advice.
        workers: Number of DataLoader workers, for the advice.
        is_training: Whether the run trains, for the advice.
    """
    _logger.debug('the run has failed', exc_info=error)
    text, line = str(error).lower(), first_line(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in text for sign in _NO_MEMORY):
        advice = 'a smaller --batch-size or --amp'
        if is_training:
            advice = 'a smaller --batch-size with --global-batch-size kept, --amp or --grad-checkpointing'
        return f'out of memory with --batch-size {batch_size}: {line}; {advice} needs less'
    if isinstance(error, RuntimeError) and any(sign in text for sign in _NO_WORKER):
        return (
            f'a DataLoader worker died: {line}; memory or shared memory (/dev/shm) may be full: '
            f'try fewer --workers than {workers}')
    if world.size > 1 and isinstance(error, (dist.DistError, RuntimeError)) and any(sign in text for sign in _NO_PEER):
        cause = re.sub(r'^\[\S+\] ', '', line).split('. ')[0]  # without the library's file and its advice
        return f'rank {world.rank} timed out waiting for other ranks ({world.unresponsive_ranks()}): {cause}'
    return line if isinstance(error, (FloatingPointError, OSError, ValueError)) else None
