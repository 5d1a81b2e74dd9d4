"""Training run: set-up, the loop over steps and epochs, resuming, and the files of the run's folder."""
import functools
import itertools
import logging
import math
import platform
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import timm
import torch
from timm.utils import distribute_bn, random_seed
from torch import Tensor, nn

from smpconv_models import __version__, checkpoint
from smpconv_models.checkpoint import description
from smpconv_models.utils.errors import first_line

from ..utils import atomic_io
from ..utils.atomic_io import atomic_write
from . import factory
from .batch_norm import accuracy_by_statistics, recalibrate_bn_, trained_norms
from .checkpointing import RunDir, TrainState, check_content, diff_args, is_resumable, load_optimizer, save_checkpoint
from .config import TrainOptions
from .dataset_factory import fit_img_size
from .datasets import SkippedSamples
from .distributed import DistributedContext, GracefulStop, TrainingInterrupted
from .factory import (
    check_no_conflict,
    create_model,
    load_first_weights,
    model_arguments,
    parse_model_name,
    resolve_source,
    select_device,
)
from .loader import EvalLoader, TrainLoader, create_eval_loader, create_train_loader
from .logger import ProgressLogger, check_logging_dependencies
from .tasks import check_class_count, check_classes, create_task
from .train_step import StepResult, TrainStep
from .validate import evaluate

_logger = logging.getLogger(__name__)

_DEFAULT_INPUT_SIZE = (3, 224, 224)  # of models that timm does not know

# Runs with fewer steps recalibrate batch norms by default, from this number of images, if top-1 on a training batch is
# lower by this number of percentage points than with the batch's own statistics.
# Digits recipe at 3 epochs of 22 steps: top-1 48.3 % before and 93.1 % after it, EMA weights 9.7 % and 96.7 %.
_SHORT_RUN_STEPS, _RECALIBRATION_IMAGES, _RECALIBRATION_GAP = 2000, 256, 3.

# Percentage points of top-1, on a training batch and on the validation split, above which statistics and EMA weights
# are reported as lagging.
_MAX_STATISTICS_GAP, _MAX_EMA_GAP = 20., 5.


@dataclass(repr=False, eq=False)
class Trainer:
    """Training run that is ready to begin or to resume; see :func:`build_trainer`.

    Attributes:
        options: Options of the run, completed.
        world: Ranks of the run.
        device: Device of this rank.
        run_dir: Folder of the run.
        state: Progress of the run.
        skipped: Training images that this rank could not read.
        model: Unwrapped model.
        model_kwargs: Arguments of the model's constructor.
        train_step: Optimizer steps.
        train_loader: Training images.
        val_loader: Validation images.
        classes: Names of the classes by index, None if they are not known.
        origin: Origin of the first weights, for the log.
        input_size: Shape of an input without the batch.
        logger: Logger on rank 0 while the run trains, otherwise None.
    """
    options: TrainOptions
    world: DistributedContext
    device: torch.device
    run_dir: RunDir
    state: TrainState
    skipped: SkippedSamples
    model: nn.Module
    model_kwargs: Dict[str, Any]
    train_step: TrainStep
    train_loader: TrainLoader
    val_loader: EvalLoader
    classes: Optional[List[str]]
    origin: str
    input_size: Tuple[int, ...]
    logger: Optional[ProgressLogger] = None
    _has_reported_statistics: bool = field(default=False, init=False)

    @property
    def models(self) -> Dict[str, nn.Module]:
        """Models that are evaluated (the model and its EMA, if any), by the key of their weights in a checkpoint."""
        ema = self.train_step.ema
        return {'state_dict': self.model, **({} if ema is None else {'state_dict_ema': ema.module})}

    def _is_finished(self, state: TrainState) -> bool:
        return state.is_finished(self.options.run.epochs, self.options.run.patience)

    @property
    def global_step(self) -> int:
        """Number of finished steps, over all epochs."""
        return self.state.epoch * self.train_loader.steps + self.state.step

    @property
    def recalibration_batches(self) -> int:
        """Number of batches of this rank from which the batch norms are recalibrated before an evaluation."""
        run, steps = self.options.run, self.train_loader.steps
        count = run.recalibrate_bn
        if count is None:
            is_short = steps * run.epochs < _SHORT_RUN_STEPS
            count = math.ceil(_RECALIBRATION_IMAGES / (self.options.data.batch_size * self.world.size)) * is_short
        return min(count, steps * self.train_loader.accumulation) if trained_norms(self.model) else 0

    def train(self) -> Dict[str, Any]:
        """Train to the last epoch, from the current progress, and evaluate after each epoch.

        Rank 0 writes the files of the run's folder: ``last.pth.tar`` to resume from, each epoch and every
        ``--recovery-interval`` steps, the one before it as ``previous.pth.tar``, the best weights as
        ``model_best.pth.tar``, those of every ``--save-interval`` epochs as ``checkpoint-EPOCH.pth.tar`` and of the
        ``--save-top-k`` best epochs as ``best-EPOCH.pth.tar``, ``summary.csv`` with a row for each epoch,
        ``summary.json``, ``curves.png`` and, at the end, ``summary.png`` with the learned kernels.

        Returns:
            ``top1`` of the last epoch and ``best_top1`` of ``best_epoch``, each of the better of the model's weights
            and its EMA; ``weights`` and ``best_weights``, which of the two as the key in a checkpoint; ``checkpoint``
            and ``picture`` as paths, and the ``seconds`` it took: 0 if the run was finished before.

        Raises:
            FloatingPointError: If too many consecutive steps, or all steps of the run, had NaN or infinity.
            OSError: If a file cannot be written.
            TrainingInterrupted: If a signal stopped the run, after a checkpoint was saved.
            ValueError: If images cannot be read, or the file of the best checkpoint is damaged.
        """
        start = time.perf_counter()
        state = self.state
        is_finished = self._is_finished(state)
        if is_finished:
            self.world.run_on_primary(self._write_results)  # the run may have ended before it wrote them
        else:
            if self.world.is_primary:
                self._log_setup()
            self.logger = self.world.run_on_primary(
                lambda: ProgressLogger(self.options, self.run_dir.path, state, self.train_loader.steps))
        with GracefulStop() as stop:
            try:
                while not self._is_finished(state):
                    begin = time.perf_counter()
                    if state.step < self.train_loader.steps:
                        self._train_epoch(stop)
                        self._save()  # an evaluation may be stopped at any time
                    state.finish_epoch(self._evaluate_epoch(stop))
                    self._save_epoch()
                    if self.logger is not None:
                        self.logger.log_epoch(state.rows[-1], time.perf_counter() - begin)
            finally:
                if self.logger is not None:
                    self.logger.close()
        self.world.run_on_primary(self._draw)
        self._check_success()
        if not is_finished:
            self._report_lag()
        return {**self._results(), 'seconds': 0. if is_finished else time.perf_counter() - start}

    def _log_setup(self) -> None:
        """Log what will be trained, on what, from which weights, and where the results will be."""
        options, world, loader = self.options, self.world, self.train_loader
        counts = [
            sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad == is_trained)
            for is_trained in (True, False)]
        frozen = f', {counts[1]:,} of them frozen' if counts[1] else ''
        classes = '' if self.classes is None else f' of {len(self.classes)} classes'
        threads = f', {torch.get_num_threads()} threads' if self.device.type == 'cpu' else ''
        factors = [str(options.data.batch_size), f'{world.size} ranks' if world.size > 1 else '', (
            f'{loader.accumulation} accumulated' if loader.accumulation > 1 else '')]
        product = ' x '.join(filter(None, factors))
        for line in (
            f'device: {self.device}{threads}',
            f'data: {options.data.dataset or options.data.data_dir}, {loader.dataset.num_samples} training and '
            f'{self.val_loader.num_samples} validation samples{classes}, as {"x".join(map(str, self.input_size))}',
            f'model: {options.model.model}, {sum(counts):,} parameters{frozen}, {self.origin}',
            f'steps: {loader.steps} per epoch, global batch size {options.run.global_batch_size}'
            + (f' ({product})' if ' x ' in product else '') + f'; folder: {self.run_dir.path}',
        ):
            _logger.info('%s', line)

    def close(self) -> None:
        """End the DataLoader workers, and release the run's folder."""
        try:
            self.world.close_loaders()
        finally:
            if self.world.is_primary:
                self.run_dir.release()

    # --- an epoch ---

    def _train_epoch(self, stop: GracefulStop) -> None:
        """Do the remaining steps of an epoch."""
        state = self.state
        mixup, mixup_off_epoch = self.train_step.mixup, self.options.augmentation.mixup_off_epoch
        if mixup is not None:
            mixup.mixup_enabled = not mixup_off_epoch or state.epoch < mixup_off_epoch
        factory.set_train_mode(self.model)
        self.train_step.keeps_batch = self.recalibration_batches == 0
        batches = self.train_loader.start(state.epoch, state.step)
        if self.logger is not None:
            self.logger.start_epoch(state)
        try:
            while state.step < self.train_loader.steps:
                try:
                    result = self.train_step.step(batches, self.global_step, stop.number is not None)
                except FloatingPointError as error:
                    raise FloatingPointError(f'{error} {self._last_applied()}; {self._advice()}') from error
                self._count_step(result)
                if self.logger is not None:
                    self.logger.step(state, result.loss, result.lr)
                if result.stop_requested:
                    self._save()
                    raise TrainingInterrupted(stop.number or signal.SIGTERM)  # if only another rank was asked
                if (self.global_step % self.options.checkpointing.recovery_interval == 0
                        and state.step < self.train_loader.steps):
                    self._save()
        finally:
            if self.logger is not None:
                self.logger.end_epoch()

    def _count_step(self, result: StepResult) -> None:
        """Count a step; report a skipped one, and stop the run after too many of them."""
        state = self.state
        if result.applied:
            state.loss_sum += result.loss
            state.loss_count += 1
            state.refused = 0
        elif not result.scale_overflow:
            state.refused += 1
            names = self.train_loader.names(state.step)
            files = ', '.join(names[:4]) + (f' and {len(names) - 4} more' if len(names) > 4 else '')
            line = (
                f'epoch {state.epoch}, step {state.step}: {result.problem}, at learning rate {result.lr:.2e}, so the '
                'step is not applied' + (f'; images {files}' if names else ''))
            if result.report_here:
                _logger.warning('%s', line)
            if state.refused >= self.options.checkpointing.max_nonfinite_steps:
                raise FloatingPointError(
                    f'{state.refused} consecutive steps had NaN or infinity; the last: {line}; {self._advice()}')
        state.step += 1

    def _last_applied(self) -> str:
        """Name the last step that changed the weights."""
        if self.train_step.last_applied is None:
            return 'before the first step of this command'
        number, lr = self.train_step.last_applied
        epoch, step = divmod(number, self.train_loader.steps)
        return f'after epoch {epoch}, step {step}, at learning rate {lr:.2e}'

    def _advice(self) -> str:
        return f'a lower --lr than {self.options.optimizer.lr:g} or --clip-grad may help'

    def _evaluate_epoch(self, stop: GracefulStop) -> Dict[str, Any]:
        """Return the row of an epoch, without times: the same numbers however often the run was resumed."""
        state, ema = self.state, self.train_step.ema
        with self.options.device.autocast(self.device):
            self._update_running_statistics()
        self.model.eval()
        metrics = self._evaluate(self.model, 'validating', stop)
        row = {
            'epoch': state.epoch,
            'train_loss': state.loss_sum / state.loss_count if state.loss_count else math.nan,
            'eval_loss': metrics['loss'],
            'eval_top1': metrics['top1'],
            'eval_top5': metrics['top5'],
        }
        if ema is not None:
            metrics = self._evaluate(ema.module, 'validating the EMA weights', stop)
            row.update(ema_loss=metrics['loss'], ema_top1=metrics['top1'], ema_top5=metrics['top5'])
        row.update(lr=max(group['lr'] for group in self.train_step.optimizer.param_groups))
        return self.world.broadcast_object(row)  # of a stream, each rank has measured all, perhaps to other digits

    def _update_running_statistics(self) -> None:
        """Recalibrate batch norms if --recalibrate-bn asks for it, or if they lag in a short run, on all ranks alike.

        Without SyncBN each rank has its own statistics: rank 0's count, or their mean after a recalibration.
        """
        count, models = self.recalibration_batches, list(self.models.values())
        lagging = models if count else []
        if count:
            batches: Iterable[Tuple[Tensor, Tensor]] = self._first_batches(count)
            if self.options.run.recalibrate_bn is None:
                batches = list(batches)
                accuracies = [accuracy_by_statistics(model, *batches[0]) for model in models]
                gaps = torch.tensor([own - running for running, own in accuracies], device=self.device)
                sums = self.world.sum(*gaps)
                lagging = [model for model, gap in zip(models, sums) if gap > _RECALIBRATION_GAP * self.world.size]
            recalibrate_bn_(lagging, (images for images, _ in batches))
            self.skipped.count = 0  # these were counted in the epoch
        elif self.train_step.last_batch is not None and trained_norms(self.model):
            self._report_statistics(*self.train_step.last_batch)
        if self.world.size > 1:
            for model in models:
                distribute_bn(model, self.world.size, reduce=any(model is other for other in lagging))

    def _first_batches(self, count: int) -> Iterator[Tuple[Tensor, Tensor]]:
        """Yield the first batches of the current epoch."""
        for images, target in itertools.islice(self.train_loader.start(self.state.epoch, 0), count):
            yield images.to(self.device, memory_format=self.options.device.memory_format), target.to(self.device)

    def _report_statistics(self, images: Tensor, target: Tensor) -> None:
        """Warn once if evaluation sees another network than training, as the running statistics of batch norms lag."""
        running, own = accuracy_by_statistics(self.model, images, target)  # on all ranks, as SyncBN needs all of them
        if own - running > _MAX_STATISTICS_GAP and self.world.is_primary and not self._has_reported_statistics:
            self._has_reported_statistics = True
            _logger.warning(
                'the running statistics of the batch norms lag behind the weights: on %d training images, top-1 is '
                '%.0f %% with them and %.0f %% with the statistics of the batch; --recalibrate-bn 10 computes them '
                'before each evaluation', len(target), running, own)

    def _report_lag(self) -> None:
        """Warn if the EMA weights of the last epoch are far worse than the weights that they average."""
        row = self.state.rows[-1]
        if self.world.is_primary and row.get('ema_top1', 100.) < row['eval_top1'] - _MAX_EMA_GAP:
            ema = self.options.ema
            advice = 'a lower --model-ema-decay follows faster'
            if not ema.model_ema_warmup:
                advice = '--model-ema-warmup or a lower --model-ema-decay follows faster'
            _logger.warning(
                "the EMA weights lag behind the model's to the end: top-1 %.2f %% against %.2f %%, decay %g; %s",
                row['ema_top1'], row['eval_top1'], ema.model_ema_decay, advice)

    def _evaluate(self, model: nn.Module, description: str, stop: GracefulStop) -> Dict[str, Any]:
        """Evaluate a model; stop on all ranks if one was asked to, as the run was saved before."""
        metrics = evaluate(model, self.val_loader, self.device, self.options.device, description, stop=stop)
        stops, = self.world.sum(torch.tensor(stop.number is not None, device=self.device))
        if stops:
            raise TrainingInterrupted(stop.number or signal.SIGTERM)
        return metrics

    # --- files ---

    def _weights(self) -> Dict[str, Any]:
        """Return a checkpoint for evaluation, under the keys that timm's scripts read."""
        content = {
            'arch': self.options.model.model,
            'model_kwargs': self.model_kwargs,
            'classes': self.classes,
            'args': {**self.options.as_dict(), 'world_size': self.world.size},
            **{key: model.state_dict() for key, model in self.models.items()},
        }
        if self.options.data.val_split_fraction is not None:
            content['split'] = self._split_digests
        if self.state.rows:
            content['best_weights'] = _score_and_key(self.state.rows[-1])[1]
        return content

    @functools.cached_property
    def _split_digests(self) -> Dict[str, str]:
        """Hash of the names of each part's images."""
        return {
            part: loader.dataset.source.digest()
            for part, loader in (('training', self.train_loader), ('validation', self.val_loader))}

    def _save(self) -> None:
        """Save a checkpoint to resume from."""
        skipped = torch.tensor(self.skipped.count, device=self.device)
        self.state.unreadable += int(self.world.all_reduce_(skipped))
        self.skipped.count = 0
        self.world.run_on_primary(lambda: self.run_dir.save({
            **self._weights(),
            'optimizer': self.train_step.optimizer.state_dict(),
            'amp_scaler': self.train_step.scaler.state_dict(),
            'images': self.train_loader.num_images,
            'epoch': self.state.epoch - 1,  # the last finished one, as timm counts
            'progress': self.state.state_dict(),
        }))

    def _save_epoch(self) -> None:
        """Save what is kept of an epoch, then the progress: a run that ends in between repeats the evaluation."""
        state = self.state
        row, best = state.rows[-1], state.best_epoch
        score, weights = _score_and_key(row)
        content = {**self._weights(), 'epoch': row['epoch'], 'metric': score}
        interval = self.options.checkpointing.save_interval
        if interval and row['epoch'] % interval == 0:
            self.world.run_on_primary(lambda: save_checkpoint(self.run_dir.snapshot(row['epoch']), content))
        if weights == 'state_dict':
            content.pop('state_dict_ema', None)  # which timm and others prefer wherever it is
        if best is None or score > _score_and_key(state.rows[best])[0]:
            state.best_epoch = row['epoch']
            self.world.run_on_primary(lambda: save_checkpoint(self.run_dir.best, content))
        top_k = self.options.checkpointing.save_top_k
        if top_k is not None:
            ranking = sorted(state.rows, key=lambda other: -_score_and_key(other)[0])[:top_k]
            epochs = [other['epoch'] for other in ranking]
            self.world.run_on_primary(lambda: self.run_dir.keep_top(epochs, row['epoch'], content))
        self._save()
        self.world.run_on_primary(self._write_results)

    def _write_results(self) -> None:
        """Write table, summary and curves: always the same from the same checkpoint."""
        from smpconv_models import figures  # imported here, as evaluation does not need matplotlib
        rows = self.state.rows
        atomic_io.save_rows(self.run_dir.summary_csv, rows)
        atomic_io.save_json(self.run_dir.summary_json, {
            'model': self.options.model.model,
            **self._results(),
            'parameters': sum(parameter.numel() for parameter in self.model.parameters()),
            'epochs': self.options.run.epochs,
            'epochs_done': self.state.epoch,
            'images': self.train_loader.num_images,
            'images_unreadable': self.state.unreadable,
            'classes': self.classes,
            'processes': self.world.size,
            'global_batch_size': self.options.run.global_batch_size,
            'device': str(self.device),
            'versions': {
                'smpconv_models': __version__, 'torch': torch.__version__, 'timm': timm.__version__,
                'python': platform.python_version()},
        })
        with atomic_write(self.run_dir.curves) as temporary:
            figures.save_curves(temporary, rows)

    def _draw(self) -> None:
        """Draw the picture of the run."""
        from smpconv_models import figures  # imported here, as evaluation does not need matplotlib
        with atomic_write(self.run_dir.summary_png) as temporary:
            figures.save_run(temporary, self.state.rows, self.models[_score_and_key(self.state.rows[-1])[1]])

    def _results(self) -> Dict[str, Any]:
        rows, best = self.state.rows, self.state.best_epoch
        assert best is not None
        (top1, weights), (best_top1, best_weights) = _score_and_key(rows[-1]), _score_and_key(rows[best])
        return {
            'top1': top1,
            'weights': weights,
            'best_top1': best_top1,
            'best_weights': best_weights,
            'best_epoch': best,
            'checkpoint': str(self.run_dir.best),
            'picture': str(self.run_dir.summary_png),
        }

    def _check_success(self) -> None:
        """Raise FloatingPointError if the run has learned nothing, ValueError if its best checkpoint is damaged."""
        rows = self.state.rows
        if all(math.isnan(row['train_loss']) for row in rows):
            raise FloatingPointError(
                f'no step of epochs 0 to {len(rows) - 1} was applied, from step 0 on: each had NaN or infinity; '
                f'{self._advice()}')
        if self._results()['best_top1'] < 0:
            raise FloatingPointError(
                f'the validation loss was finite in none of the {len(rows)} epochs; {self._advice()}')
        self.world.run_on_primary(self._check_best)

    def _check_best(self) -> None:
        if not self.run_dir.best.exists():  # the user has removed it
            return
        try:
            checkpoint.check_file(self.run_dir.best)
        except ValueError as error:
            raise ValueError(
                f'the run is finished, but its best checkpoint is damaged: {error}; the weights of the last epoch are '
                f'in {self.run_dir.last}') from error

    # --- resuming ---

    def _acquire_run_dir(self, given: Dict[str, Any], resumes: bool) -> None:
        """Lock the folder and read the checkpoint on rank 0, and resume from it on every rank.

        Args:
            given: Options as they were given, for the file of arguments.
            resumes: Whether there was a checkpoint when the model was built, which then has no first weights.
        """
        try:
            found = self.world.broadcast_object(self.world.run_on_primary(self._find_resume_checkpoint))
            if found is not None:
                self._load_checkpoint(*found)
            elif resumes:
                raise ValueError(
                    f'the checkpoint in {self.run_dir.path} was removed while the run started; start it again')
            if not self._is_finished(self.state):
                self.world.run_on_primary(lambda: self.run_dir.save_arguments(given))
                if self.options.data.val_split_fraction is not None:
                    self.world.run_on_primary(self._save_split)
        except (OSError, RuntimeError, ValueError):
            self.close()
            raise

    def _find_resume_checkpoint(self) -> Optional[Tuple[str, Any]]:
        """Lock the folder; return path and content of the checkpoint to resume from, if any."""
        given = None
        resume = self.options.checkpointing.resume
        if resume and not self.run_dir.has_checkpoint():  # otherwise that is of this command, which was stopped
            given = resume, checkpoint.load_file(resume)
            check_content(given[1], resume)
        self.run_dir.acquire()
        found = self.run_dir.load_latest() or given
        if found is None and self.run_dir.summary_csv.exists():
            raise ValueError(
                f'{self.run_dir.path} has the results of a run but no last.pth.tar to resume from; choose another '
                '--experiment')
        if found is not None and is_resumable(found[1]) and not self.run_dir.best.exists():
            progress = found[1]['progress']
            if not self._is_finished(TrainState.from_state_dict(progress)):
                progress['best_epoch'] = None  # resumed in another folder, or the best weights were removed
        return found

    def _save_split(self) -> None:
        """Write which images are for training and which for validation."""
        rows = [
            {'image': dataset.name(index), 'class': dataset.classes[target], 'split': split}
            for split, dataset in (('train', self.train_loader.dataset), ('validation', self.val_loader.dataset))
            for index, target in enumerate(dataset.targets)]
        atomic_io.save_rows(self.run_dir.split_csv, rows)

    def _load_checkpoint(self, path: str, loaded: Any) -> None:
        """Resume from the content of a checkpoint, after :func:`check_content`.

        Raises:
            ValueError: If it is another run's, or has no progress to resume from.
        """
        if not is_resumable(loaded):
            raise ValueError(f'{path} has no run to resume; --initial-checkpoint takes its weights')
        state = TrainState.from_state_dict(loaded['progress'])
        is_finished = self._is_finished(state)
        arguments = checkpoint.get_train_args(loaded)
        changed, refused = diff_args(arguments, {**self.options.as_dict(), 'world_size': self.world.size})
        try:
            check_classes(loaded['classes'], self.classes, 'the checkpoint', 'the data set')
        except ValueError as error:
            refused.append(str(error))
        if loaded['images'] != self.train_loader.num_images:
            refused.append(f'training images {loaded["images"]} -> {self.train_loader.num_images}')
        if 'split' in loaded and self.options.data.val_split_fraction is not None:
            found = self._split_digests
            others = [part for part, digest in loaded['split'].items() if found[part] != digest]
            if others:
                refused.append(f'images were added, removed or renamed, in the {" and ".join(others)} part')
        was_finished = state.is_finished(arguments['epochs'], arguments.get('patience'))
        if is_finished and (changed or refused):
            done = 'is finished' if was_finished else f'has done {state.epoch} of its {arguments["epochs"]} epochs'
            raise ValueError(
                f'the run in {path} {done}, and this is another one: {"; ".join(refused + changed)}; choose another '
                '--experiment')
        # the global batch size may have changed, and under --force-resume the number of images
        assert self.options.run.global_batch_size is not None
        step = state.step * arguments['global_batch_size'] // self.options.run.global_batch_size
        if step > self.train_loader.steps and not refused:
            raise ValueError(f'{path}: progress.step must be at most {self.train_loader.steps}, got {state.step}')
        if refused and not self.options.checkpointing.force_resume:
            size, rest = divmod(arguments['global_batch_size'], self.world.size)
            hint = '' if rest or arguments['global_batch_size'] == self.options.run.global_batch_size else (
                f'; --batch-size {size} keeps the {arguments["global_batch_size"]} images of a step')
            raise ValueError(
                f'{path} is of another run: {"; ".join(refused)}{hint}; choose another --experiment, or resume anyway, '
                'if the weights fit, with --force-resume')
        if self.world.is_primary:
            for text in changed + refused:
                _logger.warning('changed since %s: %s', path, text)
            if is_finished:
                _logger.info('%s: the run is finished already', path)
            else:
                _logger.info('resuming from %s: epoch %d, step %d', path, state.epoch, state.step)
        self._load_weights(path, loaded, arguments)
        self.origin = f'weights of {Path(path).name}'
        state.step = min(step, self.train_loader.steps)
        self.state = state
        self.train_step.scheduler.step_update(self.global_step)

    def _load_weights(self, path: str, loaded: Dict[str, Any], arguments: Dict[str, Any]) -> None:
        ema, scaler = self.train_step.ema, self.train_step.scaler
        try:
            self.model.load_state_dict(checkpoint.convert_and_check(loaded['state_dict'], self.model))
            if ema is not None:
                # an EMA that is asked for only now starts from the weights
                weights = loaded.get('state_dict_ema', loaded['state_dict'])
                ema.module.load_state_dict(checkpoint.convert_and_check(weights, ema.module))
            # --force-resume may have changed the optimizer, which then starts with a fresh state
            optimizer, then = self.options.optimizer, [arguments.get(key) for key in ('opt', 'layer_decay', 'freeze')]
            if then == [optimizer.opt, optimizer.layer_decay, self.options.run.freeze]:
                load_optimizer(self.train_step.optimizer, loaded['optimizer'])
        except (KeyError, ValueError) as error:
            raise ValueError(f'{path} does not fit this run: {error}') from error
        if scaler.is_enabled() and loaded['amp_scaler']:
            expected, given = sorted(scaler.state_dict()), sorted(loaded['amp_scaler'])
            if given != expected:
                raise ValueError(f'{path}: amp_scaler must have {expected}, got {given[:8]}')
            scaler.load_state_dict(loaded['amp_scaler'])


def _score_and_key(row: Dict[str, Any]) -> Tuple[float, str]:
    """Return top-1 of an epoch's better weights, and their key in a checkpoint; -1 if no loss is finite."""
    kinds = {'ema': 'state_dict_ema', 'eval': 'state_dict'}
    found = [
        (row[f'{kind}_top1'], key) for kind, key in kinds.items() if math.isfinite(row.get(f'{kind}_loss', math.nan))]
    return max(found, key=lambda item: item[0], default=(-1., 'state_dict'))  # the EMA if both are equal


def build_trainer(options: TrainOptions, world: Optional[DistributedContext] = None) -> Trainer:
    """Build all parts of a run, lock its folder, and load the checkpoint that it resumes from.

    Args:
        options: Options of the run.
        world: Ranks of the run, whose process group is initialized here; by default those of the environment.

    Raises:
        ValueError: If options contradict each other, or do not fit the data set, the device, or the run in the folder.
    """
    given = options.as_dict()
    if options.data.data_dir and '://' not in options.data.data_dir:
        # absolute, for a later evaluation from another folder
        options = options.with_values('data', data_dir=str(Path(options.data.data_dir).resolve()))
    options = options.with_values('data', dataset=options.data.dataset or '')
    task = create_task(options.data)
    task.check_options(given)
    _check_options(options)
    check_logging_dependencies(options.logging)
    world = world or DistributedContext.from_environment()
    options = _shorten_warmup(options, world)
    device = select_device(options.device.device, world.local_rank if world.size > 1 else None)
    run_dir = RunDir(Path(options.run.output) / (
        options.run.experiment or Path(parse_model_name(str(options.model.model))[1]).name))
    in_chans = _model_arguments(options, {'in_chans': 3})['in_chans']
    # of a stream each rank reads all validation images, but only its part of the training images: they are divided
    # among the ranks of the process group
    val_set = task.create_dataset(options.run.val_split, in_chans, is_training=False)
    world.init(device, options.device.dist_timeout)
    train_set = task.create_dataset(options.run.train_split, in_chans, is_training=True)
    options = _resolve_grad_accum(options, world, run_dir, train_set.classes)
    _check_same_data(world, device, train_set, val_set)
    classes = train_set.classes
    check_classes(classes, val_set.classes)
    options = _fit_img_size(options, train_set)
    task = create_task(options.data)
    resumes = world.broadcast_object(world.run_on_primary(
        lambda: run_dir.has_checkpoint() or bool(options.checkpointing.resume)))
    model, architecture, model_kwargs, origin = _build_model(options, classes, resumes)
    task.check_model(str(options.model.model), model, train_set, in_chans)
    if options.run.sync_bn:
        model = factory.convert_sync_bn(model, world, device)
    model.to(device).to(memory_format=options.device.memory_format)
    data_config = task.resolve_data_config(model)
    _check_size(model, str(options.model.model), data_config['input_size'], device)
    options = _without_source(options, architecture, data_config)
    skipped = SkippedSamples(limit=options.run.max_unreadable)
    assert options.run.grad_accum_steps is not None
    train_loader = create_train_loader(
        task, train_set, data_config, options.augmentation, device, world, skipped,
        grad_accum_steps=options.run.grad_accum_steps, dist_timeout=options.device.dist_timeout,
        train_split=options.run.train_split, balance_classes=options.run.balance_classes)
    options = _resolve_ema_warmup(options, options.run.epochs * train_loader.steps)
    trainer = Trainer(
        options=options,
        world=world,
        device=device,
        run_dir=run_dir,
        state=TrainState(),
        skipped=skipped,
        model=model,
        model_kwargs=model_kwargs,
        train_step=_create_train_step(options, model, train_loader.steps, device, world),
        train_loader=train_loader,
        val_loader=create_eval_loader(
            task, val_set, data_config, device, world, dist_timeout=options.device.dist_timeout),
        classes=classes,
        origin=origin,
        input_size=data_config['input_size'],
    )
    trainer._acquire_run_dir(given, resumes)
    return trainer


def _check_options(options: TrainOptions) -> None:
    """Raise ValueError for options that contradict each other."""
    run, augmentation, lr = options.run, options.augmentation, options.optimizer.lr
    if run.experiment is not None and (Path(run.experiment).name != run.experiment or run.experiment in ('', '..')):
        raise ValueError(f'--experiment must be the name of a folder, got {run.experiment}')
    for name, (low, high) in (('scale', augmentation.scale), ('ratio', augmentation.ratio)):
        if low > high:
            raise ValueError(f'--{name} takes the smaller value first, got {[low, high]}')
    for name in ('min_lr', 'warmup_lr'):
        value = getattr(options.schedule, name)
        if value > lr:
            raise ValueError(f'--{name.replace("_", "-")} must not exceed --lr {lr}, got {value}')
    if options.data.batch_size % 2 and (augmentation.mixup > 0 or augmentation.cutmix > 0):
        raise ValueError(f'--batch-size must be even with Mixup or CutMix, got {options.data.batch_size}')
    if run.torchcompile is not None and run.torchcompile not in torch.compiler.list_backends(exclude_tags=()):
        raise ValueError(f'--torchcompile must be one of {torch.compiler.list_backends()}, got {run.torchcompile}')
    if run.pretrained and run.initial_checkpoint:
        raise ValueError('--pretrained and --initial-checkpoint contradict each other: both name the first weights')


def _shorten_warmup(options: TrainOptions, world: DistributedContext) -> TrainOptions:
    """Return the options with a warm-up within the run, which the defaults and recipes need not fit."""
    warmup, epochs = options.schedule.warmup_epochs, options.run.epochs
    if warmup <= epochs:
        return options
    if world.is_primary:
        _logger.warning('the warm-up of %d epochs is shortened to %d of the %d epochs', warmup, epochs // 2, epochs)
    return options.with_values('schedule', warmup_epochs=epochs // 2)


def _resolve_ema_warmup(options: TrainOptions, steps: int) -> TrainOptions:
    """Return the options with --model-ema-warmup, without which the initial weights stay in a short run's EMA."""
    ema = options.ema
    if ema.model_ema_warmup is not None:
        return options
    is_short = ema.model_ema and steps * (1 - ema.model_ema_decay) < 10
    return options.with_values('ema', model_ema_warmup=is_short)


def _fit_img_size(options: TrainOptions, dataset: Any) -> TrainOptions:
    """Return the options with the image side that --fit-img-size asks for."""
    data = options.data
    if not options.run.fit_img_size:
        return options
    if data.img_size is not None or data.input_size is not None:
        raise ValueError('--fit-img-size and --img-size or --input-size contradict each other')
    cfg = factory.find_pretrained_cfg(options.model.model) if options.model.model else None
    largest = min((cfg.input_size if cfg else _DEFAULT_INPUT_SIZE)[1:])
    return options.with_values('data', img_size=fit_img_size(dataset, largest))


def _stored_global_batch_size(
        options: TrainOptions, run_dir: RunDir, classes: Optional[List[str]]) -> Optional[int]:
    """Return the images of a step of the run that is about to be resumed; None if there is none."""
    paths: List[Any] = [path for path in (run_dir.last, run_dir.previous) if path.exists()]
    for path in paths or filter(None, [options.checkpointing.resume]):
        try:
            loaded = checkpoint.load_file(path, lazy=True)
            arguments = checkpoint.get_train_args(loaded)
            if arguments.get('dataset') != options.data.dataset or loaded.get('classes') != classes:
                return None     # of another run, which is reported when the checkpoint is loaded
            stored = arguments.get('global_batch_size')
            return description.check_number('global_batch_size', stored, 1, 10 ** 9, whole=True)
        except ValueError as error:  # reported when the checkpoint is loaded
            _logger.debug('%s is not a run to resume: %s', path, error)
    return None


def _resolve_grad_accum(
        options: TrainOptions, world: DistributedContext, run_dir: RunDir,
        classes: Optional[List[str]]) -> TrainOptions:
    """Return the options with both --grad-accum-steps and --global-batch-size.

    If neither is given, a run that is resumed keeps the size of its step, with another number of ranks as well.
    """
    batch_size, global_batch_size = options.data.batch_size, options.run.global_batch_size
    grad_accum_steps = options.run.grad_accum_steps
    if global_batch_size is None and grad_accum_steps is None:
        stored = world.broadcast_object(world.run_on_primary(
            lambda: _stored_global_batch_size(options, run_dir, classes)))
        if stored is not None and stored % (batch_size * world.size) == 0:
            global_batch_size = stored
    if global_batch_size is None:
        grad_accum_steps = grad_accum_steps or 1
        global_batch_size = batch_size * world.size * grad_accum_steps
    else:
        quotient, rest = divmod(global_batch_size, batch_size * world.size)
        if rest or quotient == 0:
            raise ValueError(
                f'--global-batch-size must be a multiple of --batch-size {batch_size} x {world.size} ranks, '
                f'got {global_batch_size}')
        if grad_accum_steps not in (None, quotient):
            raise ValueError(
                f'--grad-accum-steps {grad_accum_steps} contradicts --global-batch-size {global_batch_size}, '
                f'which takes {quotient}')
        grad_accum_steps = quotient
    return options.with_values('run', global_batch_size=global_batch_size, grad_accum_steps=grad_accum_steps)


def _check_same_data(world: DistributedContext, device: torch.device, *datasets: Any) -> None:
    """Raise ValueError on every rank unless all ranks have found the classes, and as many images, of rank 0."""
    own = [(dataset.classes, dataset.num_images) for dataset in datasets]
    first = world.broadcast_object(own)
    differs = world.all_reduce_(torch.tensor(int(own != first), device=device))
    if own != first:
        for (classes, count), (expected, expected_count) in zip(own, first):
            check_classes(expected, classes, 'rank 0', f'rank {world.rank}')
            if count != expected_count:
                raise ValueError(f'rank {world.rank} has found {count} images, rank 0 {expected_count}')
    if differs:
        raise ValueError('another rank has found other classes or images than rank 0')


def _model_arguments(options: TrainOptions, defaults: Dict[str, Any]) -> Dict[str, Any]:
    return model_arguments(options.model, options.data.img_size, options.data.input_size, defaults)


def _build_model(
        options: TrainOptions, classes: Optional[List[str]], resumes: bool) -> Tuple[Any, str, Dict[str, Any], str]:
    """Return the model, the architecture and the arguments that create it again, and the origin of its weights.

    A run that resumes does not read its first weights again, which may be gone or out of reach by then.
    """
    name, run = options.model.model, options.run
    pretrained = run.pretrained and not resumes
    model_kwargs = _model_arguments(options, {} if classes is None else {'num_classes': len(classes)})
    rates = {key: value for key, value in (
        ('drop_rate', options.augmentation.drop), ('drop_path_rate', options.augmentation.drop_path))
        if value is not None}
    check_no_conflict(model_kwargs, rates)
    model_kwargs.update(rates)
    random_seed(options.data.seed, 0)
    model = create_model(name, pretrained=pretrained, **model_kwargs)
    if run.bn_momentum is not None:
        for norm in trained_norms(model):
            norm.momentum = run.bn_momentum
    architecture, arguments = resolve_source(str(name))
    model_kwargs = {**arguments, **model_kwargs}
    if pretrained:
        again = create_model(architecture, **model_kwargs, device='meta')
        shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (model, again)]
        if shapes[0] != shapes[1]:  # no later command could load this run's weights
            raise ValueError(
                f'{name} with {model_kwargs} is another model without --pretrained; for kernels of other sizes than '
                'the weights were trained with, take kernel_scale')
    check_class_count(classes, model.num_classes)
    origin = 'random weights'
    if pretrained:
        is_own = model.num_classes == model.pretrained_cfg['num_classes']
        origin = 'pretrained weights' + ('' if is_own else ', with a new classifier')
    if run.initial_checkpoint and not resumes:
        left_out = load_first_weights(model, run.initial_checkpoint, classes)
        origin = f'weights of {run.initial_checkpoint}' + (f' {left_out}' if left_out else '')
    if run.freeze:
        factory.freeze_(model, run.freeze)
    if run.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise ValueError(f'{name} has no --grad-checkpointing') from error
    return model, architecture, {**model_kwargs, 'num_classes': model.num_classes}, origin


def _without_source(options: TrainOptions, architecture: str, data_config: Dict[str, Any]) -> TrainOptions:
    """Return the options with the architecture and its data configuration in place of a repository or folder.

    These are what checkpoints store: a place that is moved, or not reachable, does not matter to them.
    """
    name = options.model.model
    if architecture == name:
        return options
    default = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    if default is not None and data_config['crop_mode'] != default.crop_mode:
        _logger.warning(
            'crop_mode %s of %s is not stored in checkpoints: evaluation by validate.py crops by %s',
            data_config['crop_mode'], name, default.crop_mode)
    data = {key: data_config[key] for key in ('mean', 'std', 'interpolation', 'crop_pct', 'input_size')}
    data = {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}
    if options.data.img_size is not None:
        del data['input_size']
    return options.with_values('model', model=architecture).with_values('data', **data)


@torch.no_grad()
def _check_size(model: Any, name: str, input_size: Tuple[int, ...], device: torch.device) -> None:
    """Raise ValueError if the model is made for images of another size, or they are too small for its strides."""
    try:
        model.eval()(torch.zeros(1, *input_size, device=device))
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f'{name} cannot take images of {input_size}: {first_line(error)}; see --img-size') from error


def _create_train_step(
        options: TrainOptions, model: Any, steps: int, device: torch.device, world: DistributedContext) -> TrainStep:
    mixup = factory.create_mixup(options.augmentation, model.num_classes)
    optimizer = factory.create_optimizer(options.optimizer, model)
    assert options.run.grad_accum_steps is not None
    return TrainStep(
        model=model,
        wrapped=factory.wrap_model(model, options.run.torchcompile, world, device),
        ema=factory.create_ema(options.ema, model),
        optimizer=optimizer,
        scheduler=factory.create_scheduler(options.schedule, optimizer, options.run.epochs, steps),
        scaler=torch.amp.GradScaler(device.type, enabled=options.device.amp and options.device.amp_dtype == 'float16'),
        loss_fn=factory.create_loss(mixup, options.augmentation.smoothing),
        mixup=mixup,
        device=device,
        world=world,
        device_options=options.device,
        seed=options.data.seed,
        grad_accum_steps=options.run.grad_accum_steps,
        clip_grad=options.optimizer.clip_grad,
        recomputes=options.run.grad_checkpointing,
    )
