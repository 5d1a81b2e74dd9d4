"""What must not change when a run goes on, and how it does."""
import logging
from argparse import Namespace
from typing import TYPE_CHECKING, Any, Dict, List, Tuple

from smpconv_models import checkpoint

from . import data
from .progress import Progress

if TYPE_CHECKING:
    from .run import Run

_logger = logging.getLogger(__name__)

# What decides where a run is, what its images are or what its weights mean.
_FIXED = (
    'model', 'model_kwargs', 'num_classes', 'in_chans', 'dataset', 'train_split', 'opt', 'layer_decay', 'seed',
    'global_batch_size', 'model_ema',
)

# What a run's results don't depend on, or only by rounding.
_FREE = (
    'config', 'output', 'experiment', 'workers', 'pin_mem', 'device', 'validation_batch_size',
    'recovery_interval', 'snapshot_interval', 'log_interval', 'resume', 'force_resume', 'log_tensorboard', 'log_wandb',
    'wandb_project', 'dist_timeout', 'debug', 'dataset_download', 'grad_accum_steps', 'max_unreadable',
    'patience_nonfinite',
)

# Of the optimizer's groups, what the arguments decide; the rest is state.
_OPTIONS = ('lr', 'initial_lr', 'lr_scale', 'weight_decay', 'momentum', 'betas', 'eps')


def differences(then: Dict[str, Any], now: Dict[str, Any]) -> Tuple[List[str], List[str]]:
    """What of a run's arguments has changed, in words: what may, and what may not.

    Args:
        then: Of the checkpoint.
        now: Of this command.
    """
    changed = {
        key: f'{key} {then.get(key)!r} -> {now.get(key)!r}'
        for key in sorted(set(then) | set(now)) if key not in _FREE and _listed(then.get(key)) != _listed(now.get(key))
    }
    return (
        [text for key, text in changed.items() if key not in _FIXED],
        [text for key, text in changed.items() if key in _FIXED],
    )


def _listed(value: Any) -> Any:
    """As YAML has it, which knows no tuples."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def plain(args: Namespace) -> Dict[str, Any]:
    """The arguments as another run's ``--config`` takes them."""
    return {key: value for key, value in vars(args).items() if key not in ('config', 'resume', 'force_resume')}


def restore(run: 'Run', path: str, loaded: Any) -> None:
    """Puts a run where a checkpoint's was.

    Args:
        run: To change.
        path: For messages.
        loaded: What was in the file.

    Raises:
        ValueError: It is another run's, or none to go on from.
    """
    if not isinstance(loaded, dict) or not {'progress', 'args', 'classes', 'images', 'amp_scaler'} <= set(loaded):
        raise ValueError(f'{path} has no run to go on with; --initial-checkpoint takes its weights')
    try:
        progress = Progress.read(loaded['progress'])
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    is_finished = progress.epoch >= run.args.epochs
    changed, refused = differences(loaded['args'], plain(run.args))
    refused += _other_data(run, loaded)
    if is_finished and (changed or refused):
        raise ValueError(
            f'the run in {path} is finished, and this is another one: {"; ".join(refused + changed)}; name it with '
            '--experiment')
    if refused and not run.args.force_resume:
        raise ValueError(
            f'{path} is of another run: {"; ".join(refused)}; name this one with --experiment, or go on anyway with '
            '--force-resume')
    if run.world.is_first:
        for text in changed + refused:
            _logger.warning('changed since %s: %s', path, text)
        if is_finished:
            _logger.info('%s: the run was finished already', path)
        else:
            _logger.info('going on from %s: epoch %d, step %d', path, progress.epoch, progress.step)
    _load(run, path, loaded)
    # where a step is now made of another number of images
    progress.step = progress.step * loaded['args']['global_batch_size'] // run.args.global_batch_size
    run.progress = progress
    run.stepper.scheduler.step_update(run.number)


def _other_data(run: 'Run', loaded: Dict[str, Any]) -> List[str]:
    found = []
    try:
        data.check_classes(loaded['classes'], run.classes, 'the checkpoint', 'the data set')
    except ValueError as error:
        found.append(str(error))
    if loaded['images'] != run.num_images:
        found.append(f'training images {loaded["images"]} -> {run.num_images}')
    return found


def _load(run: 'Run', path: str, loaded: Dict[str, Any]) -> None:
    optimizer, ema, scaler = run.stepper.optimizer, run.stepper.ema, run.stepper.scaler
    options = [{key: group[key] for key in _OPTIONS if key in group} for group in optimizer.param_groups]
    try:
        run.model.load_state_dict(checkpoint.adapt(loaded['state_dict'], run.model))
        if ema is not None:
            # an average that is asked for now starts from the weights
            ema.module.load_state_dict(checkpoint.adapt(loaded.get('state_dict_ema', loaded['state_dict']), ema.module))
        if all(loaded['args'].get(key) == getattr(run.args, key) for key in ('opt', 'layer_decay')):  # else forced anew
            optimizer.load_state_dict(loaded['optimizer'])
    except (KeyError, ValueError) as error:
        raise ValueError(f'{path} does not fit this run: {error}') from error
    for group, values in zip(optimizer.param_groups, options):
        group.update(values)  # the rate, the decay and so on as they are asked for now
    if scaler.is_enabled() and loaded['amp_scaler']:
        scaler.load_state_dict(loaded['amp_scaler'])
