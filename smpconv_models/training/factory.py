"""Optimizer, schedule, EMA, Mixup, loss and wrappers of a training run, from timm and PyTorch."""
import logging
from typing import Any, Dict, List, Optional

import torch
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from smpconv_models.layers import smp_layers

from .config import AugmentationOptions, EMAOptions, OptimizerOptions, ScheduleOptions
from .distributed import DistributedContext

_logger = logging.getLogger(__name__)


def param_groups(
        model: Any,
        weight_decay: float,
        layer_decay: Optional[float] = None,
        radius_lr_scale: float = 0.1,
) -> List[Dict[str, Any]]:
    """Return timm's parameter groups, with the radii of the points in groups of their own at a lower learning rate.

    No weight decay is applied to 1-D parameters, biases, coordinates, radii, and the parameters that the model's
    ``no_weight_decay()`` lists. Learning rates are relative, under ``lr_scale``, by which timm's schedulers multiply.

    Args:
        model: Any model; without SMP layers the groups are timm's.
        weight_decay: Weight decay of the other parameters.
        layer_decay: Factor of the learning rate from each layer to the one before it; None for one learning rate.
        radius_lr_scale: Learning rate of the radii relative to their layer's other parameters (0.1 in the paper, A.1).
    """
    layers = smp_layers(model).values()
    radii = {id(layer.radius) for layer in layers}
    undecayed = radii | {id(layer.coords) for layer in layers}
    # found by module, as a wrapper (features_only) has no no_weight_decay()
    no_decay = {name for name, param in model.named_parameters() if id(param) in undecayed}
    if hasattr(model, 'no_weight_decay'):
        no_decay |= set(model.no_weight_decay())
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=no_decay)
    else:
        groups = param_groups_layer_decay(
            model, weight_decay, layer_decay=layer_decay, no_weight_decay_list=no_decay)
    split = []
    for group in groups:
        for is_radius in (False, True):
            params = [param for param in group['params'] if (id(param) in radii) == is_radius]
            if params:
                scale = group.get('lr_scale', 1.) * (radius_lr_scale if is_radius else 1.)
                split.append({**group, 'params': params, 'lr_scale': scale})
    return split


def create_optimizer(options: OptimizerOptions, model: nn.Module) -> torch.optim.Optimizer:
    """Create timm's optimizer over the paper's parameter groups.

    Raises:
        ValueError: If timm has no optimizer of this name, or the optimizer does not accept the options.
    """
    groups = param_groups(model, options.weight_decay, options.layer_decay)
    given: Dict[str, Any] = {
        key: value for key, value in (('eps', options.opt_eps), ('betas', options.opt_betas)) if value is not None}
    try:
        trial = create_optimizer_v2([nn.Parameter(torch.zeros(1, 1))], opt=options.opt, lr=options.lr)
        if getattr(trial, 'is_second_order', False):
            raise ValueError('it takes second derivatives, which a step does not compute here')
        for key, value in given.items():
            if key not in trial.defaults:  # timm drops it without a word
                _logger.warning('--opt %s has no %s: --opt-%s %s is ignored', options.opt, key, key, value)
        betas = trial.defaults.get('betas')
        if options.opt_betas is not None and betas is not None and len(options.opt_betas) != len(betas):
            raise ValueError(f'expected {len(betas)} --opt-betas, got {len(options.opt_betas)}')
        return create_optimizer_v2(
            groups, opt=options.opt, lr=options.lr, weight_decay=options.weight_decay, momentum=options.momentum,
            **given)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'--opt {options.opt} with {given or "its defaults"} cannot be created: {error}') from error


def create_scheduler(options: ScheduleOptions, optimizer: torch.optim.Optimizer, epochs: int, steps: int) -> Any:
    """Create timm's scheduler, stepped once per optimizer update.

    Args:
        options: Options of the schedule.
        optimizer: Optimizer to schedule.
        epochs: Number of epochs.
        steps: Number of steps of an epoch.
    """
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=options.sched, num_epochs=epochs, warmup_epochs=options.warmup_epochs,
        warmup_lr=options.warmup_lr, min_lr=options.min_lr, decay_epochs=options.decay_epochs,
        decay_rate=options.decay_rate, step_on_epochs=False, updates_per_epoch=steps)
    return scheduler


def create_ema(options: EMAOptions, model: nn.Module) -> Optional[ModelEmaV3]:
    """Create the EMA of the weights, if the options ask for it."""
    if not options.model_ema:
        return None
    return ModelEmaV3(model, decay=options.model_ema_decay, use_warmup=options.model_ema_warmup)


def create_mixup(options: AugmentationOptions, num_classes: Any) -> Optional[Mixup]:
    """Create Mixup and CutMix, if the options ask for either."""
    if options.mixup <= 0 and options.cutmix <= 0:
        return None
    return Mixup(
        mixup_alpha=options.mixup, cutmix_alpha=options.cutmix, prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob, mode=options.mixup_mode, label_smoothing=options.smoothing,
        num_classes=num_classes)


def create_loss(mixup: Optional[Mixup], smoothing: float) -> nn.Module:
    """Create the cross-entropy for class indices, or for the soft targets of Mixup."""
    if mixup is not None:
        return SoftTargetCrossEntropy()  # Mixup smooths the labels itself
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


def convert_sync_bn(model: nn.Module, world: DistributedContext, device: torch.device) -> nn.Module:
    """Synchronize a model's batch norms over all ranks; unchanged, with a warning, on a CPU."""
    if world.size == 1:
        return model
    if device.type == 'cpu':
        if world.is_primary:
            _logger.warning(
                '--sync-bn is ignored: PyTorch synchronizes batch norms on GPUs only; each rank normalizes over its '
                'own images')
        return model
    return convert_sync_batchnorm(model)


def wrap_model(model: nn.Module, torchcompile: Optional[str], world: DistributedContext, device: torch.device) -> Any:
    """Wrap a model for distributed training and compilation."""
    wrapped: Any = model
    if world.size > 1:
        wrapped = DistributedDataParallel(model, device_ids=None if device.type == 'cpu' else [device])
    return torch.compile(wrapped, backend=torchcompile) if torchcompile else wrapped
