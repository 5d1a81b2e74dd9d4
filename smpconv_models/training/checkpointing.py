"""What must not change when a run goes on, and how it does."""
import logging
import math
from argparse import Namespace
from typing import TYPE_CHECKING, Any, Dict, List, Tuple

import torch
from torch import Tensor

from smpconv_models import checkpoint
from smpconv_models.checkpoint import description

from . import data_config
from .train_state import Progress

if TYPE_CHECKING:
    from .trainer import Run

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

# Keys of a checkpoint that a run resumes from.
_CONTENT = {'progress', 'args', 'classes', 'images', 'amp_scaler', 'state_dict', 'optimizer'}

# Numbers in the optimizer's groups that the arguments decide, as they decide flags; other numbers are state.
_OPTIONS = ('lr', 'initial_lr', 'lr_scale', 'weight_decay', 'momentum', 'betas', 'eps')


def differences(then: Dict[str, Any], now: Dict[str, Any]) -> Tuple[List[str], List[str]]:
    """What of a run's arguments has changed, in words: what may, and what may not.

    Args:
        then: Of the checkpoint.
        now: Of this command.
    """
    changed = {
        key: f'{checkpoint.printable(key)} {checkpoint.shown(then.get(key))} -> {checkpoint.shown(now.get(key))}'
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


def check_content(loaded: Any) -> None:
    """Check the types of everything that a run resumes from, before any of it is used.

    Args:
        loaded: Content of a checkpoint; one that is not of a training run passes.

    Raises:
        ValueError: If a value has another type than its field; the line names the field.
    """
    if not isinstance(loaded, dict) or not loaded.keys() >= _CONTENT:
        return
    if loaded['classes'] is not None:
        description.texts('classes', loaded['classes'])
    Progress.read(loaded['progress'])
    arguments = checkpoint.get_train_args(loaded)
    description.number('args.global_batch_size', arguments.get('global_batch_size'), 1, 10 ** 9, whole=True)
    if loaded['images'] is not None:
        description.number('images', loaded['images'], 0, 1 << 62, whole=True)
    for key in ('state_dict', 'state_dict_ema'):
        _check_state_dict(key, loaded.get(key, {}))
        checkpoint.check_finite(loaded.get(key, {}))
    _check_optimizer(loaded['optimizer'])
    scaler = loaded['amp_scaler']
    if not isinstance(scaler, dict):
        raise ValueError(f'amp_scaler must be a dictionary, got {description.shown(scaler)}')
    for key, value in scaler.items():
        description.number(f'amp_scaler.{key}'[:100], value, 0, 1e38)


def _check_state_dict(name: str, state_dict: Any) -> None:
    if not isinstance(state_dict, dict):
        raise ValueError(f'{name} must be a dictionary of tensors, got {description.shown(state_dict)}')
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f'{name} must be a dictionary of tensors, got {description.shown(value)} as {key!r:.80}')


def _check_optimizer(optimizer: Any) -> None:
    """Check what every optimizer of PyTorch and timm saves: parameter groups, and a state for each parameter."""
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get('state'), dict) or not isinstance(
            optimizer.get('param_groups'), list):
        raise ValueError('optimizer must be a dictionary of state and param_groups')
    for group in optimizer['param_groups']:
        if not isinstance(group, dict) or not isinstance(group.get('params'), list):
            raise ValueError('optimizer.param_groups must be dictionaries with a list of params')
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
                description.plain(f'{name}.{key}', item)


def restore(run: 'Run', path: str, loaded: Any) -> None:
    """Puts a run where a checkpoint's was.

    Args:
        run: To change.
        path: For messages.
        loaded: Content of the file, after :func:`check_content`.

    Raises:
        ValueError: It is another run's, or none to go on from.
    """
    if not isinstance(loaded, dict) or not loaded.keys() >= _CONTENT:
        raise ValueError(f'{path} has no run to go on with; --initial-checkpoint takes its weights')
    progress = Progress.read(loaded['progress'])
    is_finished = progress.epoch >= run.args.epochs
    arguments = checkpoint.get_train_args(loaded)
    changed, refused = differences(arguments, plain(run.args))
    refused += _other_data(run, loaded)
    if is_finished and (changed or refused):
        raise ValueError(
            f'the run in {path} is finished, and this is another one: {"; ".join(refused + changed)}; name it with '
            '--experiment')
    # the global batch size may have changed, and under --force-resume the number of images
    step = progress.step * arguments['global_batch_size'] // run.args.global_batch_size
    if step > run.images.steps and not refused:
        raise ValueError(f'{path}: progress.step must be at most {run.images.steps}, got {progress.step}')
    if refused and not run.args.force_resume:
        raise ValueError(
            f'{path} is of another run: {"; ".join(refused)}; name this one with --experiment, or go on anyway with '
            '--force-resume')
    if run.world.is_primary:
        for text in changed + refused:
            _logger.warning('changed since %s: %s', path, text)
        if is_finished:
            _logger.info('%s: the run was finished already', path)
        else:
            _logger.info('going on from %s: epoch %d, step %d', path, progress.epoch, progress.step)
    _load(run, path, loaded, arguments)
    progress.step = min(step, run.images.steps)
    run.progress = progress
    run.stepper.scheduler.step_update(run.number)


def _other_data(run: 'Run', loaded: Dict[str, Any]) -> List[str]:
    found = []
    try:
        data_config.check_classes(loaded['classes'], run.classes, 'the checkpoint', 'the data set')
    except ValueError as error:
        found.append(str(error))
    if loaded['images'] != run.num_images:
        found.append(f'training images {loaded["images"]} -> {run.num_images}')
    return found


def _load(run: 'Run', path: str, loaded: Dict[str, Any], arguments: Dict[str, Any]) -> None:
    optimizer, ema, scaler = run.stepper.optimizer, run.stepper.ema, run.stepper.scaler
    try:
        run.model.load_state_dict(checkpoint.adapt(loaded['state_dict'], run.model))
        if ema is not None:
            # an average that is asked for now starts from the weights
            ema.module.load_state_dict(checkpoint.adapt(loaded.get('state_dict_ema', loaded['state_dict']), ema.module))
        # --force-resume may have changed the optimizer, which then starts with a fresh state
        if all(arguments.get(key) == getattr(run.args, key) for key in ('opt', 'layer_decay')):
            _load_optimizer(optimizer, loaded['optimizer'])
    except (KeyError, ValueError) as error:
        raise ValueError(f'{path} does not fit this run: {error}') from error
    if scaler.is_enabled() and loaded['amp_scaler']:
        expected = set(scaler.state_dict())
        if set(loaded['amp_scaler']) != expected:
            raise ValueError(f'{path}: amp_scaler must have {sorted(expected)}, got {sorted(loaded["amp_scaler"])[:8]}')
        scaler.load_state_dict(loaded['amp_scaler'])


# State of an optimizer that is a tensor: as large as its parameter, or reduced over dimensions.
_MOMENTS = ('exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'momentum_buffer', 'square_avg', 'grad_avg')


def _load_optimizer(optimizer: Any, state: Dict[str, Any]) -> None:
    """Load an optimizer's state after a comparison with its parameters.

    Args:
        optimizer: Optimizer to load into; options that the checkpoint lacks keep their values.
        state: State dict of an optimizer of the same class.

    Raises:
        ValueError: If parameter groups, types of options or shapes differ.
    """
    own = optimizer.state_dict()['param_groups']
    given = state['param_groups']
    if [group['params'] for group in own] != [group['params'] for group in given]:
        expected, got = (description.shown([len(group['params']) for group in groups]) for groups in (own, given))
        raise ValueError(f'the parameter groups of the optimizer must have {expected} parameters, got {got}')
    for ours, theirs in zip(own, given):
        for key, value in theirs.items():
            if not (_is_count(value) if key == 'step' else _alike(ours.get(key), value)):
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
    groups = [{**ours, **theirs, **_of_command(ours)} for ours, theirs in zip(own, given)]
    optimizer.load_state_dict({**state, 'param_groups': groups})


def _of_command(group: Dict[str, Any]) -> Dict[str, Any]:
    """Return the options of a parameter group that the arguments of this command decide: the learning rate, flags."""
    return {key: value for key, value in group.items() if key in _OPTIONS or isinstance(value, (bool, str, type(None)))}


def _alike(ours: Any, theirs: Any) -> bool:
    """Whether two values of an option have the same type; whole numbers are numbers, and None leaves options open."""
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
