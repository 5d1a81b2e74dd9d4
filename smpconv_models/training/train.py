"""The training run: set-up, the loop over epochs, and what it leaves behind."""
import importlib.util
import logging
import math
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, get_outdir, random_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from smpconv_models.layers import clip_radius_

from . import data, output
from .evaluate import autocast, create_model, evaluate, memory_format, model_arguments, select_device
from .optim import param_groups

_logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """What a training run works with."""
    args: Namespace
    device: torch.device
    model: nn.Module
    model_kwargs: Dict[str, Any]
    ema: Optional[ModelEmaV3]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    loss_fn: nn.Module
    mixup: Optional[Mixup]
    train_loader: DataLoader
    val_loader: DataLoader
    classes: Optional[List[str]]


def set_up(args: Namespace) -> Run:
    """Builds everything that a run needs, without writing anything.

    Raises:
        ValueError: Arguments that don't fit each other, the data set or the device.
    """
    _check(args)
    args.dataset = args.dataset or ''
    args.data_dir = args.data_dir and os.path.abspath(args.data_dir)  # for a later evaluation from elsewhere
    device = select_device(args.device)
    random_seed(args.seed, 0)
    in_chans = model_arguments(args, {'in_chans': 3})['in_chans']
    train_set, val_set = (
        data.open_dataset(args, split, in_chans, is_training)
        for split, is_training in ((args.train_split, True), (args.val_split, False))
    )
    classes = data.class_names(train_set)
    data.check_classes(classes, data.class_names(val_set))
    model_kwargs = model_arguments(args, {} if classes is None else {'num_classes': len(classes)})
    model_kwargs |= _given(args, drop_rate='drop', drop_path_rate='drop_path')
    model = create_model(args.model, pretrained=args.pretrained, **model_kwargs)
    data.check_num_classes(classes, model.num_classes)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    model.to(device).to(memory_format=memory_format(args))
    config = data.data_config(args, model)
    train_loader = data.train_loader(args, train_set, config, device)
    mixup = _create_mixup(args, model.num_classes)
    optimizer = _create_optimizer(args, model)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=args.sched, num_epochs=args.epochs, warmup_epochs=args.warmup_epochs,
        warmup_lr=args.warmup_lr, min_lr=args.min_lr, decay_epochs=args.decay_epochs, decay_rate=args.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=_updates_per_epoch(args, train_loader),
    )
    return Run(
        args=args,
        device=device,
        model=model,
        model_kwargs={**model_kwargs, 'num_classes': model.num_classes},
        ema=_create_ema(args, model),
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(device.type, enabled=args.amp and args.amp_dtype == 'float16'),
        loss_fn=_create_loss(args, mixup),
        mixup=mixup,
        train_loader=train_loader,
        val_loader=data.eval_loader(args, val_set, config, device),
        classes=classes,
    )


def create_folder(args: Namespace) -> Path:
    """A new folder in ``args.output``, numbered if there is one of its name, with ``args.yaml`` in it.

    Raises:
        ValueError: It can't be made.
    """
    experiment = args.experiment or f'{args.model}-{time.strftime("%Y%m%d-%H%M%S")}'
    try:
        folder = Path(get_outdir(args.output, experiment, inc=True))
        output.save_arguments(folder / 'args.yaml', _plain(args))
    except OSError as error:
        raise ValueError(f'--output {args.output} cannot be written to: {error}') from error
    return folder


def train(run: Run, folder: Path) -> Dict[str, Any]:
    """Trains, evaluates after each epoch, and keeps the last and the best checkpoint.

    Writes ``summary.csv`` with a row for each epoch, ``last.pth.tar``, ``model_best.pth.tar`` and, at the end however
    it comes, ``summary.png`` with the curves and the learned kernels.

    Args:
        run: From :func:`set_up`.
        folder: From :func:`create_folder`.

    Returns:
        ``top1`` of the last epoch and ``best_top1`` of ``best_epoch``, both of the averaged weights where there
        are any, ``checkpoint`` and ``picture`` as paths, ``seconds``.

    Raises:
        FloatingPointError: The loss is no longer finite.
    """
    from smpconv_models import figures  # here, as evaluation does without matplotlib

    _logger.info('epoch  train loss  val loss   top-1  EMA top-1  learning rate  seconds')
    start = time.perf_counter()
    rows: List[Dict[str, Any]] = []
    best: Dict[str, Any] = {}
    try:
        for epoch in range(run.args.epochs):
            row = _epoch(run, epoch)
            rows.append(row)
            output.append_row(folder / 'summary.csv', row)
            state = _state(run, epoch, _score(row))
            output.save_checkpoint(folder / 'last.pth.tar', state)
            if not best or _score(row) > _score(best):
                best = row
                output.save_checkpoint(folder / 'model_best.pth.tar', state)
            _logger.info(_format(row))  # what is told is saved
    finally:
        if rows:
            figures.save_run(folder / 'summary.png', rows, _evaluated(run))
    return {
        'top1': _score(rows[-1]),
        'best_top1': _score(best),
        'best_epoch': best['epoch'],
        'checkpoint': str(folder / 'model_best.pth.tar'),
        'picture': str(folder / 'summary.png'),
        'seconds': time.perf_counter() - start,
    }


def _epoch(run: Run, epoch: int) -> Dict[str, Any]:
    """One epoch of training and its evaluation, as a row of the summary."""
    start = time.perf_counter()
    if run.mixup is not None and run.args.mixup_off_epoch and epoch >= run.args.mixup_off_epoch:
        run.mixup.mixup_enabled = False
    train_loss = _train_epoch(run, epoch)
    run.model.eval()
    metrics = evaluate(run.model, run.val_loader, run.device, run.args)
    row = {
        'epoch': epoch,
        'train_loss': train_loss,
        'eval_loss': metrics['loss'],
        'eval_top1': metrics['top1'],
        'eval_top5': metrics['top5'],
    }
    if run.ema is not None:
        averaged = evaluate(run.ema.module, run.val_loader, run.device, run.args, 'validating the average')
        row.update(ema_loss=averaged['loss'], ema_top1=averaged['top1'], ema_top5=averaged['top5'])
    row.update(lr=max(group['lr'] for group in run.optimizer.param_groups), seconds=time.perf_counter() - start)
    return row


def _train_epoch(run: Run, epoch: int) -> float:
    """Every batch once; returns the mean loss."""
    args = run.args
    losses = AverageMeter()
    run.model.train()
    updates_per_epoch = _updates_per_epoch(args, run.train_loader)
    num_batches = updates_per_epoch * args.grad_accum_steps  # what doesn't fill an accumulation is left out
    bar = tqdm(run.train_loader, desc=f'epoch {epoch}', total=num_batches, leave=False, disable=None)
    for batch, (images, target) in enumerate(bar):
        if batch == num_batches:
            break
        images = images.to(run.device, memory_format=memory_format(args), non_blocking=True)
        target = target.to(run.device, non_blocking=True)
        if run.mixup is not None:
            images, target = run.mixup(images, target)
        with autocast(args, run.device):
            loss = run.loss_fn(run.model(images), target)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f'the loss is {value} in epoch {epoch}, batch {batch}; a lower --lr may help')
        losses.update(value, images.shape[0])
        run.scaler.scale(loss / args.grad_accum_steps).backward()
        if (batch + 1) % args.grad_accum_steps == 0:
            _update(run, epoch * updates_per_epoch + (batch + 1) // args.grad_accum_steps)
        bar.set_postfix(loss=f'{losses.avg:.3f}', lr=f'{run.optimizer.param_groups[-1]["lr"]:.1e}')
    return losses.avg


def _update(run: Run, num_updates: int) -> None:
    """One optimizer step and what follows it: radii clipped, then averaged, then the next learning rate."""
    if run.args.clip_grad is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), run.args.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    clip_radius_(run.model)
    if run.ema is not None:
        run.ema.update(run.model, step=num_updates)
    run.scheduler.step_update(num_updates)


def _evaluated(run: Run) -> nn.Module:
    """The model whose accuracy counts."""
    return run.model if run.ema is None else run.ema.module


def _score(row: Dict[str, Any]) -> float:
    return row.get('ema_top1', row['eval_top1'])


def _format(row: Dict[str, Any]) -> str:
    ema = f'{row["ema_top1"]:9.2f}' if 'ema_top1' in row else ' ' * 9
    return (
        f'{row["epoch"]:5d}  {row["train_loss"]:10.4f}  {row["eval_loss"]:8.4f}  {row["eval_top1"]:6.2f}  {ema}  '
        f'{row["lr"]:13.2e}  {row["seconds"]:7.1f}'
    )


def _state(run: Run, epoch: int, metric: float) -> Dict[str, Any]:
    """A checkpoint's content, under the keys that timm's scripts read."""
    state = {
        'arch': run.args.model,
        'model_kwargs': run.model_kwargs,
        'state_dict': run.model.state_dict(),
        'epoch': epoch,
        'metric': metric,
        'classes': run.classes,
        'args': _plain(run.args),
    }
    if run.ema is not None:
        state['state_dict_ema'] = run.ema.module.state_dict()
    return state


def _plain(args: Namespace) -> Dict[str, Any]:
    """The arguments as another run's ``--config`` takes them."""
    return {key: value for key, value in vars(args).items() if key != 'config'}


def _check(args: Namespace) -> None:
    if importlib.util.find_spec('matplotlib') is None:
        raise ValueError('the picture of the run needs matplotlib: pip install matplotlib')
    if args.experiment is not None and Path(args.experiment).name != args.experiment:
        raise ValueError(f'--experiment must be the name of a folder, got {args.experiment}')
    if args.scale[0] > args.scale[1] or args.ratio[0] > args.ratio[1]:
        raise ValueError(f'--scale and --ratio take the smaller value first, got {args.scale} and {args.ratio}')
    if args.warmup_epochs > args.epochs:
        raise ValueError(f'--warmup-epochs must not exceed the {args.epochs} epochs, got {args.warmup_epochs}')
    if args.batch_size % 2 and (args.mixup > 0 or args.cutmix > 0):
        raise ValueError(f'--batch-size must be even with Mixup or CutMix, got {args.batch_size}')


def _given(args: Namespace, **names: str) -> Dict[str, Any]:
    """Keyword arguments from those options that were given."""
    return {key: getattr(args, name) for key, name in names.items() if getattr(args, name) is not None}


def _updates_per_epoch(args: Namespace, loader: DataLoader) -> int:
    try:
        updates = len(loader) // args.grad_accum_steps
    except TypeError as error:
        raise ValueError(f'the data set must know its length, for the schedule: {error}') from error
    if updates == 0:
        raise ValueError(
            f'--grad-accum-steps {args.grad_accum_steps} is more than the {len(loader)} batches of an epoch')
    return updates


def _create_optimizer(args: Namespace, model: nn.Module) -> torch.optim.Optimizer:
    groups = param_groups(model, args.weight_decay, args.layer_decay)
    given = _given(args, eps='opt_eps', betas='opt_betas')
    try:
        return create_optimizer_v2(groups, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay, **given)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'--opt {args.opt} with {given or "its defaults"} cannot be created: {error}') from error


def _create_ema(args: Namespace, model: nn.Module) -> Optional[ModelEmaV3]:
    if not args.model_ema:
        return None
    return ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)


def _create_mixup(args: Namespace, num_classes: int) -> Optional[Mixup]:
    if args.mixup <= 0 and args.cutmix <= 0:
        return None
    return Mixup(
        mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, prob=args.mixup_prob, switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode, label_smoothing=args.smoothing, num_classes=num_classes,
    )


def _create_loss(args: Namespace, mixup: Optional[Mixup]) -> nn.Module:
    if mixup is not None:
        return SoftTargetCrossEntropy()  # Mixup smooths the labels itself
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
