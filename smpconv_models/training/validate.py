"""Evaluation of checkpoints and of models with their pretrained weights."""
import math
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from timm.data import IterableImageDataset
from timm.utils import reparameterize_model
from torch import Tensor

from smpconv_models import checkpoint, data
from smpconv_models.checkpoint import Description
from smpconv_models.utils.errors import first_line

from ..utils import atomic_io
from ..utils.atomic_io import atomic_write
from . import data_config, dataset_factory, loader, task_sequence
from .class_names import shown
from .distributed import DistributedContext
from .metrics import EvalLoader, evaluate
from .model_factory import (
    check_name,
    choose_model,
    create_for_checkpoint,
    create_model,
    memory_format,
    model_arguments,
    select_device,
    select_weights,
)
from .run_dir import RunDir


class Evaluation(NamedTuple):
    """What was measured, and on what.

    Attributes:
        result: The metrics of :func:`evaluate` with what they were measured on, in plain data.
        confusion: Of shape ``(classes, classes)``, row the class, column the prediction; ``(0, 0)`` unless asked for.
        classes: Their names by index, where the data set knows them.
        args: The arguments, with what the checkpoint added.
    """
    result: Dict[str, Any]
    confusion: Tensor
    classes: Optional[List[str]]
    args: Namespace


def validate(args: Namespace) -> Dict[str, Any]:
    """Evaluates a checkpoint, or a model with its pretrained weights, on one split of a data set.

    Returns:
        The metrics of :func:`evaluate` with what they were measured on.

    Raises:
        ValueError: The arguments, the checkpoint or the data set don't fit, or there is no accuracy to speak of.
    """
    return measure(args).result


def series(args: Namespace) -> List[Namespace]:
    """The arguments of each of several models, for :func:`measure`.

    Args:
        args: Whose ``checkpoint`` and ``model`` are lists or None. Checkpoints are of their own models unless one model
            is named for all or one for each; a folder is that of a run, and stands for its best checkpoint.

    Raises:
        ValueError: There is no such file or model, or the lists don't go together.
    """
    paths: List[Any] = [
        str(RunDir(Path(path)).best if Path(path).is_dir() else path) for path in args.checkpoint or []]
    names = args.model or []
    if paths and len(names) not in (0, 1, len(paths)):
        raise ValueError(
            f'--model takes 1 name for all checkpoints or one for each: expected 1 or {len(paths)}, got {len(names)}')
    for name in names:
        check_name(name)
    for path in paths:
        checkpoint.check_file(path)
    count = len(paths) or len(names) or 1  # measure tells what is missing where there are none
    each = zip(paths or [None] * count, names if len(names) == count else (names or [None]) * count)
    return [Namespace(**{**vars(args), 'checkpoint': path, 'model': name}) for path, name in each]


def measure(args: Namespace, before: Optional[Namespace] = None, with_confusion: bool = False) -> Evaluation:
    """Evaluates one model.

    Args:
        args: What to evaluate, ``checkpoint`` and ``model`` each one or None; left as they are.
        before: The arguments of a model that was measured before, on the same images.
        with_confusion: Count each pair of class and prediction too.

    Raises:
        ValueError: The arguments, the checkpoint or the data set don't fit; images are missing; the weights or the
            logits are not finite.
    """
    device = select_device(args.device)
    loaded = _read(args)
    described = checkpoint.describe(loaded, args.checkpoint or '')
    args = Namespace(**vars(args))
    kwargs: Dict[str, Any] = {}
    state_dict: Dict[str, Tensor] = {}
    weights = 'pretrained'
    if args.checkpoint:
        args = inherit(args, described)
        state_dict, key = select_weights(loaded, args.checkpoint, args.use_ema)
        weights = key or 'state dict'
        args.model, kwargs = choose_model(args.model, described, state_dict, args.checkpoint)
    args.dataset, args.split = args.dataset or '', args.split or 'validation'
    if before is not None:
        _check_same_images(args, before)
    task_sequence.validate_options(args)
    model = _load(args, described, state_dict, weights, kwargs)
    model.to(device).to(memory_format=memory_format(args)).eval()
    config = data_config.data_config(args, model)
    dataset, classes = _open(args, described, model)
    world = DistributedContext()
    images = loader.held_out(args, dataset, config, device, world)
    try:
        metrics = evaluate(
            model, images, device, args, f'validating {args.model}', model.num_classes if with_confusion else 0)
    except AssertionError as error:  # how timm's models refuse a size
        raise ValueError(f'{args.model} cannot be evaluated: {first_line(error)}') from error
    finally:
        world.close_loaders()
    _check_loss(args, metrics['loss'])
    result = {
        'model': args.model,
        **_rounded(metrics),
        'images': metrics['count'],
        'unreadable': _unreadable(dataset, images, metrics['count']),
        'weights': weights,
        'checkpoint': args.checkpoint or '',
        'dataset': args.dataset or args.data_dir,
        'split': args.split,
        'param_count': round(sum(param.numel() for param in model.parameters()) / 1e6, 2),
        'img_size': config['input_size'][-1],
        'crop_pct': config.get('crop_pct', ''),
        'interpolation': config.get('interpolation', ''),
    }
    return Evaluation(result, metrics['confusion'].cpu(), classes, args)


def _read(args: Namespace) -> Dict[str, Any]:
    loaded = checkpoint.read_file(args.checkpoint) if args.checkpoint else {}
    if not isinstance(loaded, dict):
        raise ValueError(f'{args.checkpoint} is not a checkpoint: expected a dict, got {type(loaded).__name__}')
    return loaded


def _load(
        args: Namespace, described: Description, state_dict: Dict[str, Tensor], weights: str, kwargs: Dict[str, Any],
) -> Any:
    """Return the model with the checkpoint's weights, or with pretrained ones if there is no checkpoint."""
    kwargs = model_arguments(args, kwargs)
    if args.checkpoint:
        model = create_for_checkpoint(args.model, kwargs, described, state_dict, args.checkpoint)
    else:
        model = create_model(args.model, pretrained=True, **kwargs)
        if model.num_classes != model.pretrained_cfg['num_classes']:  # timm would make another classifier, at random
            raise ValueError(
                f'the pretrained weights of {args.model} are for {model.pretrained_cfg["num_classes"]} classes, not '
                f'for {model.num_classes}')
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.isnan().any():
            raise ValueError(f'{args.checkpoint or args.model} has weights that are not numbers: {name} ({weights})')
    return reparameterize_model(model) if args.reparam else model


def _open(args: Namespace, described: Description, model: Any) -> Tuple[Any, Optional[List[str]]]:
    """The data set, whose classes must be the model's, and their names."""
    dataset = dataset_factory.open_dataset(args, args.split, model.in_chans, is_training=False)
    if task_sequence.are_meant(args):
        task_sequence.check_shape(args, dataset, model)
    classes = data_config.class_names(dataset)
    data_config.check_classes(described.classes, classes)
    data_config.check_num_classes(classes, model.num_classes)
    return dataset, classes


def _check_loss(args: Namespace, loss: float) -> None:
    """An accuracy of logits that are no numbers is none."""
    if not math.isfinite(loss):
        raise ValueError(
            f'the logits of {args.checkpoint or args.model} are not finite: the loss is {loss}'
            + ('; --amp-dtype bfloat16 has a larger range' if args.amp and args.amp_dtype == 'float16' else ''))


def _rounded(metrics: Dict[str, Any]) -> Dict[str, float]:
    top1, top5 = metrics['top1'], metrics['top5']
    return {
        'top1': round(top1, 4),
        'top1_err': round(100 - top1, 4),
        'top5': round(top5, 4),
        'top5_err': round(100 - top5, 4),
        'loss': round(metrics['loss'], 6),
    }


def _check_same_images(args: Namespace, before: Namespace) -> None:
    own, others = ([getattr(each, key) or '' for key in _IMAGES] for each in (args, before))
    if own != others:
        raise ValueError(
            f'{args.checkpoint or args.model} is of other images than the models before it: expected '
            f'{" ".join(others).strip()}, got {" ".join(own).strip()}; --data-dir and --dataset say which ones for all')


def _unreadable(dataset: Any, images: EvalLoader, count: int) -> int:
    """How many images were left out. A stream may lack some without a name; its length is rounded to the workers."""
    if isinstance(dataset, IterableImageDataset):
        return max(dataset.reader.num_samples - count, 0)
    return len(images.left_out.seen)


def class_rows(confusion: Tensor, names: Optional[Sequence[str]] = None) -> List[Dict[str, Any]]:
    """A row for each class: its images, how many are predicted right, and which class it is most often mistaken for.

    Args:
        confusion: Of shape ``(classes, classes)``, row the class, column the prediction.
        names: Of the classes by index.
    """
    others = confusion.clone().fill_diagonal_(0)
    most, mistaken = others.max(1)  # the first of several
    rows = []
    for index, (images, correct) in enumerate(zip(confusion.sum(1).tolist(), confusion.diag().tolist())):
        other, times = int(mistaken[index]), int(most[index])
        rows.append({
            'index': index,
            **({} if names is None else {'name': names[index]}),
            'images': images,
            'correct': correct,
            'top1': round(100 * correct / images, 4) if images else '',
            'mistaken_for': (other if names is None else names[other]) if times else '',
            'times': times,
        })
    return rows


def save_per_class_results(path: str, evaluation: Evaluation) -> None:
    """Writes the rows of :func:`class_rows` as a CSV file."""
    atomic_io.save_rows(Path(path).resolve(), class_rows(evaluation.confusion, evaluation.classes))


def save_confusion_matrix(path: str, evaluation: Evaluation) -> None:
    """Draws the confusion matrix as a PNG."""
    from smpconv_models import figures  # here, as evaluation does without matplotlib
    classes = evaluation.classes and [shown(name) for name in evaluation.classes]
    with atomic_write(Path(path).resolve()) as temporary:
        figures.save_confusion_matrix(temporary, evaluation.confusion, classes)


def save_results(path: str, results: Union[Dict[str, Any], List[Dict[str, Any]]]) -> None:
    """Writes results, of one model or of several: a CSV file if it is named so, with a row for each, else JSON."""
    if path.endswith('.csv'):
        atomic_io.save_rows(Path(path).resolve(), results if isinstance(results, list) else [results])
    else:
        atomic_io.save_json(Path(path).resolve(), results)


# Options that define the evaluated images: a user who gives one of them means other images than the checkpoint's.
_IMAGES = ('dataset', 'data_dir')
_SIZES = ('img_size', 'input_size')

# Data sets that come with the package: a checkpoint may name them, as nothing is fetched or located by that.
_EMBEDDED = ('digits', 'seq/digits', 'seq/permuted-digits')


def inherit(args: Namespace, described: Description) -> Namespace:
    """Return the arguments, with open ones filled from a checkpoint's description.

    Images are prepared as in training. Of the training data, only an embedded data set or an image folder of this
    machine is taken over; everything else has to be named by the user.

    Raises:
        ValueError: If the user has to name the data set or the split.
    """
    args = Namespace(**vars(args))
    keys = ['mean', 'std', 'interpolation', 'crop_pct', 'exif_orientation']
    if all(getattr(args, key) is None for key in _SIZES):
        keys += _SIZES
    vars(args).update(described.preparation(
        [key for key in keys if getattr(args, key) is None], checkpoint.MAX_INHERITED_SIDE,
        '; an option of this name overrides it'))
    dataset = described.dataset if args.dataset is None else None
    if args.dataset is None and args.data_dir is None:
        data_dir = described.data_dir
        if dataset in _EMBEDDED:
            args.dataset = dataset
        elif not dataset and data_dir and _is_local_folder(data_dir):
            args.data_dir = data_dir
        elif dataset or data_dir:
            trained = checkpoint.shown(' in '.join(filter(None, (dataset, data_dir))))
            raise ValueError(
                f'{args.checkpoint} was trained on {trained}, which is neither embedded nor an image folder '
                'of this machine: --data-dir and --dataset name the images to evaluate')
    elif dataset and dataset.lower().startswith('seq/') and dataset.lower().removeprefix('seq/') in data.NAMES:
        # the user has named the folder of its files
        args.dataset = dataset
    split = described.val_split if args.split is None else None
    if split:
        if not re.fullmatch(r'[\w-]+', split):
            raise ValueError(
                f'{args.checkpoint} was evaluated on the split {checkpoint.shown(split)}, which is no plain name: '
                '--split names the one to evaluate')
        args.split = split
    return args


def _is_local_folder(path: str) -> bool:
    """Whether a path that a file gives is a folder of this machine: no URL, no network share."""
    return not re.match(r'[\w+.-]+:|[/\\\\]{2}', path) and os.path.isdir(path)  # Path.is_dir raises on long names
