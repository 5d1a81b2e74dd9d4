"""A training run made ready: its parts, its folder, and where it goes on."""
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from timm.utils import random_seed
from torch import nn
from torch.utils.data import IterableDataset

from smpconv_models import checkpoint
from smpconv_models.utils.errors import first_line

from . import checkpointing, data_config, dataset_factory, factory, loader, logger, saving, task_sequence
from .distributed import DistributedContext
from .metrics import EvalLoader
from .model_factory import (
    check_options_agree,
    create_model,
    load_weights,
    memory_format,
    model_arguments,
    parse_name,
    select_device,
)
from .run_dir import RunDir, check_named
from .skipped import SkippedInTraining
from .train_state import Progress
from .train_step import TrainStep


@dataclass
class Run:
    """What a training run works with."""
    args: Namespace
    world: DistributedContext
    device: torch.device
    folder: RunDir
    progress: Progress
    left_out: SkippedInTraining
    model: nn.Module
    model_kwargs: Dict[str, Any]
    stepper: TrainStep
    images: loader.Images
    held_out: EvalLoader
    classes: Optional[List[str]]

    @property
    def evaluated(self) -> nn.Module:
        """The model whose accuracy counts."""
        return self.model if self.stepper.ema is None else self.stepper.ema.module

    @property
    def number(self) -> int:
        """Steps that are done, over all epochs."""
        return self.progress.epoch * self.images.steps + self.progress.step

    @property
    def num_images(self) -> Optional[int]:
        """Training images; None for a stream."""
        return None if self.images.samples is None else len(self.images.samples)

    def weights(self) -> Dict[str, Any]:
        """A checkpoint to use, under the keys that timm's scripts read."""
        state = {
            'arch': self.args.model,
            'model_kwargs': self.model_kwargs,
            'state_dict': self.model.state_dict(),
            'classes': self.classes,
            'args': checkpointing.plain(self.args),
        }
        if self.stepper.ema is not None:
            state['state_dict_ema'] = self.stepper.ema.module.state_dict()
        return state

    def state(self) -> Dict[str, Any]:
        """A checkpoint to go on from."""
        return {
            **self.weights(),
            'optimizer': self.stepper.optimizer.state_dict(),
            'amp_scaler': self.stepper.scaler.state_dict(),
            'images': self.num_images,
            'epoch': self.progress.epoch - 1,  # as timm counts, the last that is done
            'progress': self.progress.plain(),
        }

    def close(self) -> None:
        """End the DataLoader workers, and leave the folder to another run."""
        try:
            self.world.close_loaders()
        finally:
            if self.world.is_primary:
                self.folder.release()


def build_trainer(args: Namespace, world: Optional[DistributedContext] = None) -> Run:
    """Builds everything that a run needs, takes its folder, and loads the checkpoint that it goes on from.

    Args:
        args: Of ``train.py``; completed in place.
        world: The processes of the run, which meet here; None for those of the environment.

    Raises:
        ValueError: Arguments that don't fit each other, the data set, the device, or the run that is in the folder.
    """
    _check(args)
    logger.check(args)
    given = checkpointing.plain(args)
    args.dataset = args.dataset or ''
    if args.data_dir and '://' not in args.data_dir:
        args.data_dir = str(Path(args.data_dir).resolve())  # for a later evaluation from elsewhere
    world = world or DistributedContext.from_environment()
    device = select_device(args.device, world.local_rank if world.size > 1 else None)
    _divide(args, world)
    train_set, val_set = _open(args, world, device)
    classes = data_config.class_names(train_set)
    data_config.check_classes(classes, data_config.class_names(val_set))
    model, model_kwargs = _build(args, classes)
    model = factory.synchronized(args, model, world, device)
    model.to(device).to(memory_format=memory_format(args))
    config = data_config.data_config(args, model)
    if task_sequence.are_meant(args):
        task_sequence.check_shape(args, train_set, model)
        task_sequence.augment(args, train_set)
    _check_size(args, model, config['input_size'], device)
    left_out = SkippedInTraining(args.max_unreadable)
    images = loader.train_loader(args, train_set, config, device, world, left_out)
    stepper = _create_stepper(args, model, images.steps, device, world)
    run = Run(
        args=args,
        world=world,
        device=device,
        folder=RunDir(Path(args.output) / (args.experiment or Path(parse_name(args.model)[1]).name)),
        progress=Progress(),
        left_out=left_out,
        model=model,
        model_kwargs=model_kwargs,
        stepper=stepper,
        images=images,
        held_out=loader.held_out(args, val_set, config, device, world),
        classes=classes,
    )
    _take_folder(run, given)
    return run


def _open(args: Namespace, world: DistributedContext, device: torch.device) -> Tuple[Any, Any]:
    """The training and the validation images; meets the other processes in between.

    Streams divide themselves among the processes that have met: of the validation images each process sees all.
    """
    in_chans = _channels(args)
    val_set = dataset_factory.open_dataset(args, args.val_split, in_chans, is_training=False)
    world.init(device, args.dist_timeout)
    train_set = dataset_factory.open_dataset(args, args.train_split, in_chans, is_training=True)
    _check_same_data(world, device, train_set, val_set)
    return train_set, val_set


def _check_same_data(world: DistributedContext, device: torch.device, *datasets: Any) -> None:
    """Raise ValueError on every rank unless all ranks have found the classes, and as many images, of rank 0."""
    own = [(data_config.class_names(dataset), _length(dataset)) for dataset in datasets]
    first = world.broadcast_object(own)
    differs = world.all_reduce_(torch.tensor(int(own != first), device=device))
    if own != first:
        for (classes, count), (expected, expected_count) in zip(own, first):
            data_config.check_classes(expected, classes, 'rank 0', f'rank {world.rank}')
            if count != expected_count:
                raise ValueError(f'rank {world.rank} has found {count} images, rank 0 {expected_count}')
    if differs:
        raise ValueError('another rank has found other classes or images than rank 0')


def _length(dataset: Any) -> Optional[int]:
    """Return the number of images, None for a stream, which counts by its own DataLoader workers."""
    return None if isinstance(dataset, IterableDataset) else len(dataset)


def _channels(args: Namespace) -> int:
    """Of the images, which are opened before the model is made."""
    return model_arguments(args, {'in_chans': 3})['in_chans']


def _build(args: Namespace, classes: Optional[List[str]]) -> Tuple[Any, Dict[str, Any]]:
    """The model, and the arguments that make it again."""
    model_kwargs = model_arguments(args, {} if classes is None else {'num_classes': len(classes)})
    rates = factory.given(args, drop_rate='drop', drop_path_rate='drop_path')
    check_options_agree(model_kwargs, rates)
    model_kwargs.update(rates)
    random_seed(args.seed, 0)
    model = create_model(args.model, pretrained=args.pretrained, **model_kwargs)
    if args.pretrained:
        _check_repeats(args, model, model_kwargs)
    data_config.check_num_classes(classes, model.num_classes)
    is_of_images = not task_sequence.are_meant(args)
    if is_of_images and model.in_chans != _channels(args):  # by the configuration of its repository or folder
        raise ValueError(f'{args.model} takes images of {model.in_chans} channels: --in-chans {model.in_chans}')
    if args.initial_checkpoint:
        load_weights(model, checkpoint.read_file(args.initial_checkpoint), args.initial_checkpoint)
        try:
            checkpoint.check_finite(model.state_dict())
        except ValueError as error:
            raise ValueError(f'{args.initial_checkpoint}: {error}') from error
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise ValueError(f'{args.model} has no --grad-checkpointing') from error
    return model, {**model_kwargs, 'num_classes': model.num_classes}


def _check_repeats(args: Namespace, model: Any, model_kwargs: Dict[str, Any]) -> None:
    """Raises ValueError where the arguments make another model without pretrained weights: who would load its own?"""
    again = create_model(args.model, **model_kwargs, device='meta')
    shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (model, again)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f'{args.model} with {model_kwargs} is another model without --pretrained; for kernels of other sizes than '
            'the weights were trained with, take kernel_scale')


@torch.no_grad()
def _check_size(args: Namespace, model: Any, input_size: Tuple[int, int, int], device: torch.device) -> None:
    """Raises ValueError where the model can't take such images: of a fixed size, or too small for its strides."""
    try:
        model.eval()(torch.zeros(1, *input_size, device=device))
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as error:
        reason = first_line(error)
        raise ValueError(f'{args.model} cannot take images of {input_size}: {reason}; see --img-size') from error


def _create_stepper(
        args: Namespace, model: Any, steps: int, device: torch.device, world: DistributedContext) -> TrainStep:
    mixup = factory.create_mixup(args, model.num_classes)
    optimizer = factory.create_optimizer(args, model)
    return TrainStep(
        args=args,
        model=model,
        wrapped=factory.wrapped(args, model, world, device),
        ema=factory.create_ema(args, model),
        optimizer=optimizer,
        scheduler=factory.create_scheduler(args, optimizer, steps),
        scaler=torch.amp.GradScaler(device.type, enabled=args.amp and args.amp_dtype == 'float16'),
        loss_fn=factory.create_loss(args, mixup),
        mixup=mixup,
        device=device,
        world=world,
    )


def _check(args: Namespace) -> None:
    task_sequence.validate_options(args)
    if args.experiment is not None and (
            Path(args.experiment).name != args.experiment or args.experiment in ('', '..')):
        raise ValueError(f'--experiment must be the name of a folder, got {args.experiment}')
    if args.scale[0] > args.scale[1] or args.ratio[0] > args.ratio[1]:
        raise ValueError(f'--scale and --ratio take the smaller value first, got {args.scale} and {args.ratio}')
    if args.warmup_epochs > args.epochs:
        raise ValueError(f'--warmup-epochs must not exceed the {args.epochs} epochs, got {args.warmup_epochs}')
    for name in ('min_lr', 'warmup_lr'):
        if getattr(args, name) > args.lr:
            raise ValueError(f'--{name.replace("_", "-")} must not exceed --lr {args.lr}, got {getattr(args, name)}')
    if args.batch_size % 2 and (args.mixup > 0 or args.cutmix > 0):
        raise ValueError(f'--batch-size must be even with Mixup or CutMix, got {args.batch_size}')
    if args.torchcompile is not None and args.torchcompile not in torch.compiler.list_backends(exclude_tags=()):
        raise ValueError(
            f'--torchcompile must be one of {torch.compiler.list_backends()}, got {args.torchcompile}')
    if args.pretrained and args.initial_checkpoint:
        raise ValueError('--pretrained and --initial-checkpoint both say which weights to start from')


def _divide(args: Namespace, world: DistributedContext) -> None:
    """How many batches a process adds up, for the images of a step; in place."""
    args.world_size = world.size
    at_once = args.batch_size * world.size
    if args.global_batch_size is None:
        args.grad_accum_steps = args.grad_accum_steps or 1
        args.global_batch_size = at_once * args.grad_accum_steps
        return
    accumulation, rest = divmod(args.global_batch_size, at_once)
    if rest or accumulation == 0:
        raise ValueError(
            f'--global-batch-size must be a multiple of --batch-size {args.batch_size} x {world.size} processes, '
            f'got {args.global_batch_size}')
    if args.grad_accum_steps not in (None, accumulation):
        raise ValueError(
            f'--grad-accum-steps {args.grad_accum_steps} contradicts --global-batch-size {args.global_batch_size}, '
            f'which takes {accumulation}')
    args.grad_accum_steps = accumulation


def _take_folder(run: Run, given: Dict[str, Any]) -> None:
    """The first process takes the folder and reads the checkpoint, for all."""
    try:
        found = run.world.broadcast_object(run.world.run_on_primary(lambda: _find(run)))
        if found is not None:
            checkpointing.restore(run, *found)
        if run.progress.epoch < run.args.epochs:
            run.world.run_on_primary(lambda: saving.save_arguments(run.folder.arguments, given))
    except (OSError, RuntimeError, ValueError):
        run.close()
        raise


def _find(run: Run) -> Optional[Tuple[str, Any]]:
    """Takes the folder; the checkpoint that the run goes on from, and its path."""
    given = None
    if run.args.resume and not run.folder.has_checkpoint():  # else it is of this command, which was stopped
        given = run.args.resume, checkpoint.read_file(run.args.resume)
        check_named(checkpointing.check_content, given[1], run.args.resume)
    run.folder.hold()
    found = run.folder.newest(checkpointing.check_content) or given
    if found is None and run.folder.table.exists():
        raise ValueError(
            f'{run.folder.path} has the results of a run but not its last.pth.tar to go on from; name this one with '
            '--experiment')
    if found is not None:
        _forget_lost_best(run, found[1])
    return found


def _forget_lost_best(run: Run, loaded: Any) -> None:
    """A run that goes on in another folder, or whose best weights were removed, has none yet."""
    progress = loaded.get('progress') if isinstance(loaded, dict) else None
    if isinstance(progress, dict) and progress.get('epoch', 0) < run.args.epochs and not run.folder.best.exists():
        progress['best_epoch'] = None
