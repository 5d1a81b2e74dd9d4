"""The loop over steps and epochs, and what it leaves behind."""
import logging
import math
import platform
import signal
import time
from typing import Any, Dict, Optional

import timm
import torch
from timm.utils import distribute_bn
from torch import nn

from smpconv_models import __version__, checkpoint

from ..utils import atomic_io
from ..utils.atomic_io import atomic_write
from . import saving
from .logger import ProgressLogger
from .metrics import evaluate
from .signals import GracefulStop, TrainingInterrupted
from .train_step import Outcome
from .trainer import Run

_logger = logging.getLogger(__name__)


def train(run: Run) -> Dict[str, Any]:
    """Trains to the last epoch, from wherever the run is, and evaluates after each.

    The first process writes the files of the run's folder: ``last.pth.tar`` to go on from, each epoch and every
    ``--recovery-interval`` steps, the one before it as ``previous.pth.tar``, the best weights as
    ``model_best.pth.tar``, those of every ``--snapshot-interval`` epochs as ``checkpoint-EPOCH.pth.tar``,
    ``summary.csv`` with a row for each epoch, ``summary.json``, ``curves.png`` and, at the end, ``summary.png`` with
    the learned kernels.

    Returns:
        ``top1`` of the last epoch and ``best_top1`` of ``best_epoch``, both of the averaged weights where there
        are any, ``checkpoint`` and ``picture`` as paths, and the ``seconds`` it took: 0 where all was done before.

    Raises:
        FloatingPointError: Too many steps in a row came to NaN or infinity, or all steps of the run.
        OSError: A file could not be written.
        Stopped: By a signal; the run is saved.
        ValueError: Images cannot be read, or the file of the best checkpoint is damaged.
    """
    start = time.perf_counter()
    progress = run.progress
    if progress.epoch >= run.args.epochs:
        run.world.run_on_primary(lambda: _write_results(run))  # it may have ended before it wrote them
        run.world.run_on_primary(lambda: _draw(run))
        _check_success(run)
        return {**_results(run), 'seconds': 0.}
    teller = run.world.run_on_primary(lambda: ProgressLogger(run.args, run.folder.path, progress, run.images.steps))
    with GracefulStop() as stop:
        try:
            while progress.epoch < run.args.epochs:
                begin = time.perf_counter()
                if progress.step < run.images.steps:
                    _train_epoch(run, teller, stop)
                    _save(run)  # an evaluation may be stopped at any time
                progress.next_epoch(_measure(run, stop))
                _save_epoch(run)
                if teller is not None:
                    teller.row(progress.rows[-1], time.perf_counter() - begin)
        finally:
            if teller is not None:
                teller.close()
    run.world.run_on_primary(lambda: _draw(run))
    _check_success(run)
    return {**_results(run), 'seconds': time.perf_counter() - start}


def _check_success(run: Run) -> None:
    """Raise FloatingPointError if the run has learned nothing, ValueError if its best checkpoint is damaged."""
    rows = run.progress.rows
    advice = f'a lower --lr than {run.args.lr:g} or --clip-grad may help'
    if all(math.isnan(row['train_loss']) for row in rows):
        raise FloatingPointError(
            f'no step of epochs 0 to {len(rows) - 1} was applied, from step 0 on: each came to NaN or infinity; '
            f'{advice}')
    if _results(run)['best_top1'] < 0:
        raise FloatingPointError(f'the validation loss was finite in none of the {len(rows)} epochs; {advice}')
    if run.folder.best.exists():
        run.world.run_on_primary(lambda: _check_best(run))


def _check_best(run: Run) -> None:
    try:
        checkpoint.check_file(run.folder.best)
    except ValueError as error:
        raise ValueError(
            f'the run is finished, but its best checkpoint is damaged: {error}; the weights of the last epoch are in '
            f'{run.folder.last}') from error


def _train_epoch(run: Run, teller: Optional[ProgressLogger], stop: GracefulStop) -> None:
    """The steps of an epoch that are not done yet."""
    progress, args = run.progress, run.args
    mixup = run.stepper.mixup
    if mixup is not None:
        mixup.mixup_enabled = not args.mixup_off_epoch or progress.epoch < args.mixup_off_epoch
    run.model.train()
    batches = run.images.start(progress.epoch, progress.step)
    if teller is not None:
        teller.start_epoch(progress)
    try:
        while progress.step < run.images.steps:
            try:
                outcome = run.stepper.step(batches, run.number, stop.number is not None)
            except FloatingPointError as error:
                raise FloatingPointError(
                    f'{error} {_after(run)}; a lower --lr than {run.args.lr:g} or --clip-grad may help') from error
            _note(run, outcome)
            if teller is not None:
                teller.step(progress, outcome.loss, outcome.rate)
            if outcome.stop:
                _save(run)
                raise TrainingInterrupted(stop.number or signal.SIGTERM)  # where only another process was asked
            if run.number % args.recovery_interval == 0 and progress.step < run.images.steps:
                _save(run)
    finally:
        if teller is not None:
            teller.end_epoch()


def _note(run: Run, outcome: Outcome) -> None:
    """Counts a step; tells of one that was refused, and stops the run where they are too many."""
    progress = run.progress
    if outcome.applied:
        progress.loss_sum += outcome.loss
        progress.loss_count += 1
        progress.refused = 0
    elif not outcome.is_overflow:
        progress.refused += 1
        if outcome.is_mine:
            _logger.warning('%s', _refusal(run, outcome))
        if progress.refused >= run.args.patience_nonfinite:
            raise FloatingPointError(
                f'{progress.refused} steps in a row came to NaN or infinity; the last: {_refusal(run, outcome)}; '
                f'a lower --lr than {run.args.lr:g} or --clip-grad may help')
    progress.step += 1


def _after(run: Run) -> str:
    """Name the last step that changed the weights."""
    if run.stepper.last_applied is None:
        return 'before the first step of this command'
    number, rate = run.stepper.last_applied
    epoch, step = divmod(number, run.images.steps)
    return f'after epoch {epoch}, step {step}, at learning rate {rate:.2e}'


def _refusal(run: Run, outcome: Outcome) -> str:
    progress = run.progress
    names = run.images.names(progress.step)
    files = ', '.join(names[:4]) + (f' and {len(names) - 4} more' if len(names) > 4 else '')
    return (
        f'epoch {progress.epoch}, step {progress.step}: {outcome.problem}, at learning rate {outcome.rate:.2e}, so the '
        'step is not applied'
        + (f'; images {files}' if names else ''))


def _measure(run: Run, stop: GracefulStop) -> Dict[str, Any]:
    """An epoch as a row of the table; the same numbers however often the run was stopped, so none of time."""
    progress = run.progress
    if run.world.size > 1:
        for model in dict.fromkeys((run.model, run.evaluated)):  # in the same order everywhere
            distribute_bn(model, run.world.size)  # the first process's: each has its own without SyncBN
    run.model.eval()
    metrics = _evaluate(run, run.model, 'validating', stop)
    row = {
        'epoch': progress.epoch,
        'train_loss': progress.loss_sum / progress.loss_count if progress.loss_count else math.nan,
        'eval_loss': metrics['loss'],
        'eval_top1': metrics['top1'],
        'eval_top5': metrics['top5'],
    }
    if run.stepper.ema is not None:
        averaged = _evaluate(run, run.evaluated, 'validating the average', stop)
        row.update(ema_loss=averaged['loss'], ema_top1=averaged['top1'], ema_top5=averaged['top5'])
    row.update(lr=max(group['lr'] for group in run.stepper.optimizer.param_groups))
    return run.world.broadcast_object(row)  # of a stream, each process has measured all: on its own, perhaps to other digits


def _evaluate(run: Run, model: nn.Module, description: str, stop: GracefulStop) -> Dict[str, Any]:
    """Stops in all processes where one was asked to; the run was saved before."""
    metrics = evaluate(model, run.held_out, run.device, run.args, description, stop=stop)
    stops, = run.world.sum(torch.tensor(stop.number is not None, device=run.device))
    if stops:
        raise TrainingInterrupted(stop.number or signal.SIGTERM)
    return metrics


def _save(run: Run) -> None:
    """Saves where the run is."""
    run.progress.unreadable += int(run.world.all_reduce_(torch.tensor(run.left_out.count, device=run.device)))
    run.left_out.count = 0
    run.world.run_on_primary(lambda: run.folder.save(run.state()))


def _save_epoch(run: Run) -> None:
    """What is kept first: should the run end in between, it goes on before the evaluation and does this again."""
    progress = run.progress
    row, best = progress.rows[-1], progress.best_epoch
    content = {**run.weights(), 'epoch': row['epoch'], 'metric': _score(row)}
    if run.args.snapshot_interval and row['epoch'] % run.args.snapshot_interval == 0:
        run.world.run_on_primary(lambda: saving.save_checkpoint(run.folder.snapshot(row['epoch']), content))
    if best is None or _score(row) > _score(progress.rows[best]):
        progress.best_epoch = row['epoch']
        run.world.run_on_primary(lambda: saving.save_checkpoint(run.folder.best, content))
    _save(run)
    run.world.run_on_primary(lambda: _write_results(run))


def _write_results(run: Run) -> None:
    """The table, the summary and the curves, from what the run knows; always the same from the same checkpoint."""
    from smpconv_models import figures  # here, as evaluation does without matplotlib
    folder, rows = run.folder, run.progress.rows
    atomic_io.save_rows(folder.table, rows)
    atomic_io.save_json(folder.summary, {
        'model': run.args.model,
        **_results(run),
        'parameters': sum(parameter.numel() for parameter in run.model.parameters()),
        'epochs': run.args.epochs,
        'epochs_done': run.progress.epoch,
        'images': run.num_images,
        'images_unreadable': run.progress.unreadable,
        'classes': run.classes,
        'processes': run.world.size,
        'global_batch_size': run.args.global_batch_size,
        'device': str(run.device),
        'versions': {
            'smpconv_models': __version__, 'torch': torch.__version__, 'timm': timm.__version__,
            'python': platform.python_version()},
    })
    with atomic_write(folder.curves) as temporary:
        figures.save_curves(temporary, rows)


def _draw(run: Run) -> None:
    """The picture of the whole run."""
    from smpconv_models import figures  # here, as evaluation does without matplotlib
    with atomic_write(run.folder.picture) as temporary:
        figures.save_run(temporary, run.progress.rows, run.evaluated)


def _results(run: Run) -> Dict[str, Any]:
    rows, best = run.progress.rows, run.progress.best_epoch
    assert best is not None
    return {
        'top1': _score(rows[-1]),
        'best_top1': _score(rows[best]),
        'best_epoch': best,
        'checkpoint': str(run.folder.best),
        'picture': str(run.folder.picture),
    }


def _score(row: Dict[str, Any]) -> float:
    """Top-1 of the weights that count; logits that are no numbers have none."""
    loss = row.get('ema_loss', row['eval_loss'])
    return row.get('ema_top1', row['eval_top1']) if math.isfinite(loss) else -1.
