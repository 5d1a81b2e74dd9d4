"""The parts of a training run that timm and PyTorch have, as the arguments ask for them."""
import logging
from argparse import Namespace
from typing import Any, Dict, Optional

import torch
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .distributed import DistributedContext
from .optim import param_groups

_logger = logging.getLogger(__name__)


def synchronized(args: Namespace, model: nn.Module, world: DistributedContext, device: torch.device) -> nn.Module:
    """The model with batch norms over all processes, if that is asked for and can be."""
    if not args.sync_bn or world.size == 1:
        return model
    if device.type == 'cpu':
        if world.is_primary:
            _logger.warning(
                '--sync-bn: PyTorch has it on GPUs only; here each process normalizes over its own %d images',
                args.batch_size)
        return model
    return convert_sync_batchnorm(model)


def wrapped(args: Namespace, model: nn.Module, world: DistributedContext, device: torch.device) -> Any:
    """What is called in training: the model, distributed and compiled as it is asked for."""
    wrapped = model
    if world.size > 1:
        wrapped = DistributedDataParallel(model, device_ids=None if device.type == 'cpu' else [device])
    if args.torchcompile:
        return torch.compile(wrapped, backend=args.torchcompile)
    return wrapped


def given(args: Namespace, **names: str) -> Dict[str, Any]:
    """Keyword arguments from those options that were given."""
    return {key: getattr(args, name) for key, name in names.items() if getattr(args, name) is not None}


def create_optimizer(args: Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """timm's by name, over the paper's parameter groups.

    Raises:
        ValueError: There is none of this name, or it doesn't take the options.
    """
    groups = param_groups(model, args.weight_decay, args.layer_decay)
    options = given(args, eps='opt_eps', betas='opt_betas')
    try:
        trial = create_optimizer_v2([nn.Parameter(torch.zeros(1, 1))], opt=args.opt, lr=args.lr)
        _check_optimizer(args, trial)
        return create_optimizer_v2(
            groups, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay, momentum=args.momentum, **options)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'--opt {args.opt} with {options or "its defaults"} cannot be created: {error}') from error


def _check_optimizer(args: Namespace, optimizer: torch.optim.Optimizer) -> None:
    """Tells of options that the optimizer doesn't have, as those of a recipe for another one: timm leaves them out."""
    if getattr(optimizer, 'is_second_order', False):
        raise ValueError('it takes second derivatives, which a step does not compute here')
    for key, value in (('eps', args.opt_eps), ('betas', args.opt_betas)):
        if value is not None and key not in optimizer.defaults:
            _logger.warning('--opt %s has no %s: --opt-%s %s is left out', args.opt, key, key, value)
    betas = optimizer.defaults.get('betas')
    if args.opt_betas is not None and betas is not None and len(args.opt_betas) != len(betas):
        raise ValueError(f'expected {len(betas)} --opt-betas, got {len(args.opt_betas)}')


def create_scheduler(args: Namespace, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """timm's, counting steps, so many an epoch."""
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=args.sched, num_epochs=args.epochs, warmup_epochs=args.warmup_epochs,
        warmup_lr=args.warmup_lr, min_lr=args.min_lr, decay_epochs=args.decay_epochs, decay_rate=args.decay_rate,
        step_on_epochs=False, updates_per_epoch=steps,
    )
    return scheduler


def create_ema(args: Namespace, model: nn.Module) -> Optional[ModelEmaV3]:
    """The average of the weights, if it is asked for."""
    if not args.model_ema:
        return None
    return ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)


def create_mixup(args: Namespace, num_classes: Any) -> Optional[Mixup]:
    """Mixup and CutMix, if either is asked for."""
    if args.mixup <= 0 and args.cutmix <= 0:
        return None
    return Mixup(
        mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, prob=args.mixup_prob, switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode, label_smoothing=args.smoothing, num_classes=num_classes,
    )


def create_loss(args: Namespace, mixup: Optional[Mixup]) -> nn.Module:
    """Cross-entropy, of the targets that there will be."""
    if mixup is not None:
        return SoftTargetCrossEntropy()  # Mixup smooths the labels itself
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
