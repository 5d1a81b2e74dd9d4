"""Evaluation of checkpoints and of models with their pretrained weights."""
from argparse import Namespace
from typing import Any, Dict, Tuple

from timm.utils import reparameterize_model

from smpconv_models import checkpoint

from . import data, loaders
from .build import create_model, load_weights, memory_format, model_arguments, select_device
from .evaluate import evaluate
from .world import World


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
        weights = load_weights(model, loaded, args.checkpoint, args.use_ema) or 'state dict'
    if args.reparam:
        model = reparameterize_model(model)
    model.to(device).to(memory_format=memory_format(args)).eval()
    config = data.data_config(args, model)
    dataset = data.open_dataset(args, args.split, model.in_chans, is_training=False)
    names = data.class_names(dataset)
    data.check_classes(loaded.get('classes'), names)
    data.check_num_classes(names, model.num_classes)
    metrics = evaluate(model, loaders.held_out(args, dataset, config, device, World.alone()), device, args)
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
