"""What a run tells while it runs: a bar on a terminal, lines elsewhere; TensorBoard and Weights & Biases if asked."""
import importlib.util
import logging
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from tqdm import tqdm

from . import rng
from .train_state import Progress

_logger = logging.getLogger(__name__)


def check(args: Namespace) -> None:
    """Raises ValueError where the arguments ask for what isn't installed."""
    asked = {'tensorboard': args.log_tensorboard, 'wandb': args.log_wandb, 'matplotlib': True}
    for name, is_asked in asked.items():
        if is_asked and importlib.util.find_spec(name) is None:
            why = 'the picture of the run' if name == 'matplotlib' else f'--log-{name}'
            raise ValueError(f'{why} needs {name}: pip install {name}')


class ProgressLogger:
    """Tells of steps and epochs.

    Args:
        args: The intervals, and where to tell.
        folder: Of the run.
        progress: Where the run goes on.
        steps: Of an epoch.
    """

    def __init__(self, args: Namespace, folder: Path, progress: Progress, steps: int) -> None:
        self.args = args
        self.steps = steps
        self.bar: Optional[tqdm] = None
        self.writers: List[Any] = []
        if args.log_tensorboard:
            self.writers.append(_TensorBoard(folder, progress.epoch * steps + progress.step + 1))
        if args.log_wandb:
            self.writers.append(_WandB(args, folder))
        _logger.info('epoch  train loss  val loss   top-1  EMA top-1  learning rate  seconds')

    def start_epoch(self, progress: Progress) -> None:
        """An epoch begins, or goes on."""
        self.begin = time.perf_counter()
        self.done = 0
        self.bar = tqdm(
            total=self.steps, initial=progress.step, desc=f'epoch {progress.epoch}', unit='step', leave=False,
            disable=None, bar_format='{desc}: {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]')

    def step(self, progress: Progress, loss: float, rate: float) -> None:
        """A step is done; the loss is its own, the rate the largest."""
        assert self.bar is not None
        self.done += 1
        seconds = (time.perf_counter() - self.begin) / self.done
        left = (self.args.epochs - progress.epoch) * self.steps - progress.step
        speed = self.args.global_batch_size / seconds
        told = f'loss {loss:.3f}, rate {rate:.2e}, {speed:.0f} images/s'
        self.bar.set_postfix_str(f'{told}, run {_clock(left * seconds)}', refresh=False)
        self.bar.update()
        if self.done % self.args.log_interval == 0:
            if self.bar.disable:
                _logger.info(
                    'epoch %d  step %d/%d  %s, %s left', progress.epoch, progress.step, self.steps, told,
                    _clock(left * seconds))
            values = {'train/loss': loss, 'train/rate': rate, 'train/images_per_second': speed}
            self._write(values, progress.epoch * self.steps + progress.step)

    def end_epoch(self) -> None:
        """The bar goes, whether or not the epoch came to its end."""
        if self.bar is not None:
            self.bar.close()

    def row(self, row: Dict[str, Any], seconds: float) -> None:
        """An epoch is done, measured and saved."""
        average = f'{row["ema_top1"]:9.2f}' if 'ema_top1' in row else ' ' * 9
        _logger.info(
            f'{row["epoch"]:5d}  {row["train_loss"]:10.4f}  {row["eval_loss"]:8.4f}  {row["eval_top1"]:6.2f}  '
            f'{average}  {row["lr"]:13.2e}  {seconds:7.1f}')
        values = {f'epoch/{name}': value for name, value in row.items() if name != 'epoch'}
        self._write(values, (row['epoch'] + 1) * self.steps)

    def close(self) -> None:
        """The run ends, however."""
        self._each(lambda writer: writer.close())

    def _write(self, values: Dict[str, float], step: int) -> None:
        self._each(lambda writer: writer.write(values, step))

    def _each(self, do: Callable[[Any], None]) -> None:
        """A log that can't be written any more is no reason to end the run."""
        for writer in list(self.writers):
            try:
                do(writer)
            except (OSError, RuntimeError, ValueError) as error:
                _logger.warning('%s is not told any more: %s', writer.name, error)
                self.writers.remove(writer)


class _TensorBoard:
    name = 'TensorBoard'

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(folder / 'tensorboard'), purge_step=step)  # what comes again is not kept twice

    def write(self, values: Dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    name = 'Weights & Biases'

    def __init__(self, args: Namespace, folder: Path) -> None:
        import wandb
        try:
            self.run = wandb.init(
                project=args.wandb_project, name=folder.name, dir=str(folder), config=vars(args), resume='allow',
                id=f'{rng.derive_seed(str(folder.resolve())):x}')  # the folder's, so that it goes on
        except wandb.Error as error:
            raise ValueError(f'--log-wandb: {error}; WANDB_MODE=offline needs no network') from error

    def write(self, values: Dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}'
