"""Evaluation: the metrics of a model on a loader, and of a checkpoint on a data set."""
from argparse import Namespace
from contextlib import AbstractContextManager
from typing import Any, Dict, Optional, Tuple

import timm
import torch
import torch.nn.functional as F
from timm.utils import AverageMeter, accuracy, reparameterize_model
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from smpconv_models import checkpoint

from . import data


def select_device(name: Optional[str]) -> torch.device:
    """The device named, or the GPU if there is one, else the CPU.

    Raises:
        ValueError: It isn't there.
    """
    if name is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f'--device {name} cannot be used: {checkpoint.first_line(error)}') from error
    return device


def autocast(args: Namespace, device: torch.device) -> AbstractContextManager:
    """Automatic mixed precision as the arguments ask for it."""
    return torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype), enabled=args.amp)


def memory_format(args: Namespace) -> torch.memory_format:
    """The images' layout as the arguments ask for it."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader: DataLoader,
        device: torch.device,
        args: Namespace,
        description: str = 'validating',
) -> Dict[str, float]:
    """Cross-entropy and accuracies of a model, each image counted once.

    Args:
        model: In evaluation mode, on ``device``.
        loader: Of (images, class indices).
        device: Where to run.
        args: For mixed precision and layout.
        description: Of the progress bar, which shows on a terminal only.

    Returns:
        ``loss``, ``top1`` and ``top5`` (in per cent; top5 of as many as there are classes) and ``count``.
    """
    loss, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
    for images, target in tqdm(loader, desc=description, leave=False, disable=None):
        images = images.to(device, memory_format=memory_format(args), non_blocking=True)
        target = target.to(device, non_blocking=True)
        with autocast(args, device):
            logits = model(images)
        logits = logits.float()
        first, fifth = accuracy(logits, target, topk=(1, 5))
        for meter, value in ((loss, F.cross_entropy(logits, target)), (top1, first), (top5, fifth)):
            meter.update(value.item(), images.shape[0])
    return {'loss': loss.avg, 'top1': top1.avg, 'top5': top5.avg, 'count': loss.count}


def validate(args: Namespace) -> Dict[str, Any]:
    """Evaluates a checkpoint, or a model with its pretrained weights, on one split of a data set.

    Returns:
        The metrics of :func:`evaluate` with what they were measured on.

    Raises:
        ValueError: The arguments, the checkpoint or the data set don't fit.
    """
    device = select_device(args.device)
    loaded = checkpoint.read_file(args.checkpoint) if args.checkpoint else {}
    if not isinstance(loaded, dict):
        raise ValueError(f'{args.checkpoint} is not a checkpoint: expected a dict, got {type(loaded).__name__}')
    inherit(args, loaded)
    model = create_model(
        args.model, pretrained=not args.checkpoint, **model_arguments(args, loaded.get('model_kwargs', {})))
    weights = 'pretrained'
    if args.checkpoint:
        weights = checkpoint.load_into(model, loaded, use_ema=args.use_ema) or 'state dict'
    if args.reparam:
        model = reparameterize_model(model)
    model.to(device).to(memory_format=memory_format(args)).eval()
    config = data.data_config(args, model)
    dataset = data.open_dataset(args, args.split, model.in_chans, is_training=False)
    names = data.class_names(dataset)
    data.check_classes(loaded.get('classes'), names)
    data.check_num_classes(names, model.num_classes)
    metrics = evaluate(model, data.eval_loader(args, dataset, config, device), device, args)
    return {
        'model': args.model,
        'top1': round(metrics['top1'], 4),
        'top1_err': round(100 - metrics['top1'], 4),
        'top5': round(metrics['top5'], 4),
        'top5_err': round(100 - metrics['top5'], 4),
        'loss': round(metrics['loss'], 6),
        'images': metrics['count'],
        'weights': weights,
        'checkpoint': args.checkpoint or '',
        'dataset': args.dataset or args.data_dir,
        'split': args.split,
        'param_count': round(sum(param.numel() for param in model.parameters()) / 1e6, 2),
        'img_size': config['input_size'][-1],
        'crop_pct': config['crop_pct'],
        'interpolation': config['interpolation'],
    }


# What a checkpoint of ours says of how its model was trained, and an evaluation should repeat unless told otherwise.
_INHERITED = ('model', 'img_size', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct')
_INHERITED_TOGETHER = ('dataset', 'data_dir')  # either one given means other images


def inherit(args: Namespace, loaded: Dict[str, Any]) -> None:
    """Fills the arguments that were left open from the training arguments in a checkpoint, in place."""
    trained = loaded.get('args')
    if isinstance(trained, Namespace):  # timm's
        trained = vars(trained)
    if not isinstance(trained, dict):
        trained = {}
    keys: Tuple[str, ...] = _INHERITED
    if all(getattr(args, key) is None for key in _INHERITED_TOGETHER):
        keys += _INHERITED_TOGETHER
    for key in keys:
        if getattr(args, key) is None:
            setattr(args, key, trained.get(key))
    args.dataset = args.dataset or ''


def model_arguments(args: Namespace, defaults: Dict[str, Any]) -> Dict[str, Any]:
    """What the arguments say of the model's constructor, over ``defaults`` where they leave it open.

    Raises:
        ValueError: They contradict each other.
    """
    in_chans = args.in_chans
    if args.input_size is not None:
        if in_chans not in (None, args.input_size[0]):
            raise ValueError(f'--in-chans {in_chans} contradicts --input-size {args.input_size}')
        in_chans = args.input_size[0]
    given = {'num_classes': args.num_classes, 'in_chans': in_chans, **args.model_kwargs}
    return {**defaults, **{key: value for key, value in given.items() if value is not None}}


def create_model(name: Optional[str], **kwargs: Any) -> Any:
    """``timm.create_model``, with users' mistakes as one line.

    Raises:
        ValueError: No such model, or it doesn't take the arguments, or has no pretrained weights.
    """
    if name is None:
        raise ValueError('--model is needed, e.g. smpconv_t')
    if not timm.is_model(name):
        raise ValueError(f'no model is named {name!r}; this package has {timm.list_models("smpconv*")}')
    try:
        return timm.create_model(name, **kwargs)
    except (AssertionError, OSError, RuntimeError, TypeError) as error:
        raise ValueError(f'{name} cannot be created: {checkpoint.first_line(error)}') from error
