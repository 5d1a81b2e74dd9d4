"""Evaluation: metrics of a model, of checkpoints, and of models with their pretrained weights."""
import logging
import math
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn
from tqdm import tqdm

from smpconv_models import checkpoint, data
from smpconv_models.checkpoint import Description
from smpconv_models.data.registry import EVAL_SYNONYMS
from smpconv_models.utils.errors import first_line

from ..utils import atomic_io
from ..utils.atomic_io import atomic_write
from .checkpointing import RunDir
from .class_folders import shown
from .config import DataOptions, DeviceOptions, ModelOptions, is_sequence_dataset
from .dataset_factory import find_splits
from .distributed import DistributedContext, GracefulStop
from .factory import check_model_name, create_model, model_arguments, open_checkpoint, select_device
from .loader import EvalLoader, create_eval_loader
from .tasks import check_class_count, check_classes, create_task

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalOptions:
    """All options of the evaluation of one model; see :func:`expand_model_list` for several."""
    data: DataOptions
    model: ModelOptions
    device: DeviceOptions
    checkpoint: Optional[str] = None
    use_ema: Optional[bool] = None
    reparam: bool = False
    split: Optional[str] = None

    @property
    def name(self) -> str:
        """Checkpoint or model, for messages."""
        return self.checkpoint or str(self.model.model)


class Evaluation(NamedTuple):
    """Result of an evaluation.

    Attributes:
        result: Metrics of :func:`evaluate` and the data they were measured on, in plain data.
        confusion: Confusion matrix of shape ``(classes, classes)``, rows are classes and columns predictions;
            ``(0, 0)`` unless asked for.
        classes: Names of the classes by index, None if the data set has none.
        options: Options, completed from the checkpoint.
    """
    result: Dict[str, Any]
    confusion: Tensor
    classes: Optional[List[str]]
    options: EvalOptions


def expand_model_list(options: EvalOptions, checkpoints: Sequence[str], models: Sequence[str]) -> List[EvalOptions]:
    """Return the options of each of several models, for :func:`evaluate_model`.

    Args:
        options: Options of all models.
        checkpoints: Paths of checkpoints, or of folders of runs, which stand for their best checkpoint.
        models: Names of models: one for all checkpoints or one for each; otherwise the checkpoints name their own.

    Raises:
        ValueError: If there is no such file or model, or the lists have different lengths.
    """
    paths: List[Any] = [RunDir.best_checkpoint(path) for path in checkpoints]
    names: List[Any] = list(models)
    if paths and len(names) not in (0, 1, len(paths)):
        raise ValueError(
            f'--model takes 1 name for all checkpoints or one for each: expected 1 or {len(paths)}, got {len(names)}')
    for name in names:
        check_model_name(name)
    for path in paths:
        checkpoint.check_file(path)
    count = len(paths) or len(names) or 1  # evaluate_model reports that there are none
    pairs = zip(paths or [None] * count, names if len(names) == count else (names or [None]) * count)
    return [replace(options, checkpoint=path, model=replace(options.model, model=name)) for path, name in pairs]


def evaluate_model(
        options: EvalOptions, before: Optional[EvalOptions] = None, with_confusion: bool = False) -> Evaluation:
    """Evaluate a checkpoint, or a model with its pretrained weights, on one split of a data set.

    Args:
        options: Model and data.
        before: Completed options of a model that was evaluated before, on the same images.
        with_confusion: Whether to count each pair of class and prediction as well.

    Raises:
        ValueError: If the options, the checkpoint or the data set do not fit, images are missing, or the weights or
            the logits are not finite.
    """
    device = select_device(options.device.device)
    opened = None
    described = Description()
    if options.checkpoint:
        opened = open_checkpoint(options.checkpoint, options.model.model, options.use_ema)
        described = opened.described
        options = fill_from_checkpoint(options, described)
        options = replace(options, model=replace(options.model, model=opened.name))
    split = options.split or 'validation'
    options = replace(options, split=split, data=replace(options.data, dataset=options.data.dataset or ''))
    if before is not None:
        _check_same_images(options, before)
    task = create_task(options.data)
    task.check_options({**asdict(options.data), **asdict(options.model), **asdict(options.device)})
    kwargs = model_arguments(
        options.model, options.data.img_size, options.data.input_size, {} if opened is None else opened.kwargs)
    weights = 'pretrained' if opened is None else opened.weights_key or 'state dict'
    model = _pretrained_model(options.model.model, kwargs) if opened is None else opened.create(kwargs)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.isnan().any():
            raise ValueError(f'{options.name} has weights that are NaN: {name} ({weights})')
    if options.reparam:
        model = reparameterize_model(model)
    model.to(device).to(memory_format=options.device.memory_format).eval()
    data_config = task.resolve_data_config(model)
    dataset = task.create_dataset(split, model.in_chans, is_training=False)
    task.check_model(str(options.model.model), model, dataset, model.in_chans)
    is_part = options.data.val_split_fraction is not None and split in EVAL_SYNONYMS
    if is_part and described.split is not None and described.split['validation'] != dataset.source.digest():
        _logger.warning(
            'these are other images than those of the validation part in training: images that %s was trained on may '
            'be among them', options.name)
    classes = dataset.classes
    check_classes(described.classes, classes)
    check_class_count(classes, model.num_classes)
    world = DistributedContext()
    loader = create_eval_loader(task, dataset, data_config, device, world, dist_timeout=options.device.dist_timeout)
    try:
        metrics = evaluate(
            model, loader, device, options.device, f'validating {options.model.model}', model.num_classes,
            with_confusion)
    except AssertionError as error:  # timm's models refuse a size by it
        raise ValueError(f'{options.model.model} cannot be evaluated: {first_line(error)}') from error
    finally:
        world.close_loaders()
    if not math.isfinite(metrics['loss']):
        is_half = options.device.amp and options.device.amp_dtype == 'float16'
        raise ValueError(
            f'the logits of {options.name} are not finite: the loss is {metrics["loss"]}'
            + ('; --amp-dtype bfloat16 has a larger range' if is_half else ''))
    top1, top5 = metrics['top1'], metrics['top5']
    result = {
        'model': options.model.model,
        'top1': round(top1, 4),
        'top1_err': round(100 - top1, 4),
        'top5': round(top5, 4),
        'top5_err': round(100 - top5, 4),
        'loss': round(metrics['loss'], 6),
        **{key: round(metrics[key], 4) for key in ('precision', 'recall', 'f1')},
        'images': metrics['count'],
        'unreadable': loader.num_skipped(metrics['count']),
        'weights': weights,
        'checkpoint': options.checkpoint or '',
        'dataset': options.data.dataset or options.data.data_dir,
        'split': split,
        'param_count': round(sum(param.numel() for param in model.parameters()) / 1e6, 2),
        'img_size': data_config['input_size'][-1],
        'crop_pct': data_config.get('crop_pct', ''),
        'interpolation': data_config.get('interpolation', ''),
    }
    return Evaluation(result, metrics['confusion'].cpu(), classes, options)


def _pretrained_model(name: Optional[str], kwargs: Dict[str, Any]) -> Any:
    model = create_model(name, pretrained=True, **kwargs)
    if model.num_classes != model.pretrained_cfg['num_classes']:  # timm would create a classifier at random
        raise ValueError(
            f'the pretrained weights of {name} are for {model.pretrained_cfg["num_classes"]} classes, not for '
            f'{model.num_classes}')
    return model


def _check_same_images(options: EvalOptions, before: EvalOptions) -> None:
    own, others = (
        (each.data.dataset or '', each.data.data_dir or '', *(
            () if each.data.val_split_fraction is None else (f'{each.data.val_split_fraction:g}', f'{each.data.seed}')))
        for each in (options, before))
    if own != others:
        raise ValueError(
            f'{options.name} is evaluated on other images than the models before it: expected '
            f'{" ".join(others).strip()}, got {" ".join(own).strip()}; --data-dir, --dataset, --val-split-fraction and '
            '--seed name the images of all')


# Data sets that come with the package: a checkpoint may name them, as that fetches and locates nothing.
_EMBEDDED = ('digits', *(f'seq/{name}' for name in data.EMBEDDED_NAMES))


def fill_from_checkpoint(options: EvalOptions, described: Description) -> EvalOptions:
    """Return the options, with open ones filled from a checkpoint's description.

    Images are prepared as in training. Of the training data, only an embedded data set or an image folder of this
    machine is taken over; everything else has to be named by the user.

    Raises:
        ValueError: If the user has to name the data set or the split.
    """
    given = options.data
    keys = ['mean', 'std', 'interpolation', 'crop_pct', 'exif_orientation']
    if given.img_size is None and given.input_size is None:
        keys += ['img_size', 'input_size']
    filled = described.preparation(
        [key for key in keys if getattr(given, key) is None], checkpoint.MAX_INHERITED_SIDE,
        '; an option of this name overrides it')
    dataset = described.text('dataset') if given.dataset is None else None
    if given.dataset is None and given.data_dir is None:
        data_dir = described.text('data_dir')
        if dataset in _EMBEDDED:
            filled['dataset'] = dataset
        elif not dataset and data_dir and _is_local_folder(data_dir):
            filled['data_dir'] = data_dir
        elif dataset or data_dir:
            trained = checkpoint.shown(' in '.join(filter(None, (dataset, data_dir))))
            raise ValueError(
                f'{options.checkpoint} was trained on {trained}, which is neither embedded nor an image folder '
                'of this machine: --data-dir and --dataset name the images to evaluate')
    elif dataset and is_sequence_dataset(dataset) and dataset.lower().removeprefix('seq/') in data.DATASET_NAMES:
        # the user has named the folder of its files
        filled['dataset'] = dataset
    folder = filled.get('data_dir', given.data_dir) or ''
    is_folder = not (given.dataset or filled.get('dataset')) and os.path.isdir(folder)
    fraction = described.val_split_fraction if given.val_split_fraction is None else given.val_split_fraction
    if fraction is not None and is_folder and not find_splits(Path(folder)):
        filled['val_split_fraction'] = fraction
        if described.seed is not None and given.seed == DataOptions().seed:  # the split of the training
            filled['seed'] = described.seed
        if options.split is None:
            _logger.info('%s has no splits: its validation part of %g %% is evaluated; --split all takes all images',
                         folder, 100 * fraction)
    split = described.text('val_split') if options.split is None else None
    if split and not re.fullmatch(r'[\w-]+', split):
        raise ValueError(
            f'{options.checkpoint} was evaluated on the split {checkpoint.shown(split)}, which is no plain name: '
            '--split names the one to evaluate')
    return replace(options, data=replace(given, **filled), split=split or options.split)


def _is_local_folder(path: str) -> bool:
    """Return whether a path in a file is a folder of this machine: no URL, no network share."""
    return not re.match(r'[\w+.-]+:|[/\\\\]{2}', path) and os.path.isdir(path)  # Path.is_dir raises on long names


def per_class_results(confusion: Tensor, names: Optional[Sequence[str]] = None) -> List[Dict[str, Any]]:
    """Return a row for each class: its images, how many are predicted right, and the class it is most mistaken for.

    ``top1`` of a class is its recall.

    Args:
        confusion: Confusion matrix of shape ``(classes, classes)``, rows are classes and columns predictions.
        names: Names of the classes by index.
    """
    predictions = confusion.sum(0).tolist()
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
            'precision': round(100 * correct / predictions[index], 4) if predictions[index] else '',
            'f1': round(200 * correct / (images + predictions[index]), 4) if images + predictions[index] else '',
            'mistaken_for': (other if names is None else names[other]) if times else '',
            'times': times,
        })
    return rows


def save_per_class_results(path: str, evaluation: Evaluation) -> None:
    """Write the rows of :func:`per_class_results` as a CSV file."""
    atomic_io.save_rows(Path(path).resolve(), per_class_results(evaluation.confusion, evaluation.classes))


def save_confusion_matrix(path: str, evaluation: Evaluation) -> None:
    """Draw the confusion matrix as a PNG file."""
    from smpconv_models import figures  # imported here, as evaluation does not need matplotlib
    classes = evaluation.classes and [shown(name) for name in evaluation.classes]
    with atomic_write(Path(path).resolve()) as temporary:
        figures.save_confusion_matrix(temporary, evaluation.confusion, classes)


def save_results(path: str, results: Union[Dict[str, Any], List[Dict[str, Any]]]) -> None:
    """Write the results of one model or several: CSV with a row for each if the file is named so, otherwise JSON."""
    if path.endswith('.csv'):
        atomic_io.save_rows(Path(path).resolve(), results if isinstance(results, list) else [results])
    else:
        atomic_io.save_json(Path(path).resolve(), results)


# --- metrics ---


class ClassificationMeter:
    """Sums over evaluated images, each counted once, in float64 and whole numbers.

    Args:
        device: Device of the logits.
        num_classes: Number of classes whose images and predictions are counted, 0 for none.
        with_confusion: Whether to count each pair of class and prediction as well.
    """

    def __init__(self, device: torch.device, num_classes: int = 0, with_confusion: bool = True) -> None:
        precision = torch.float32 if device.type == 'mps' else torch.float64  # MPS has no float64
        self.sums = torch.zeros(3, dtype=precision, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.classes = torch.zeros(3, num_classes, dtype=torch.int64, device=device)  # images, predictions, correct
        side = num_classes if with_confusion else 0
        self.confusion = torch.zeros(side, side, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Add one batch: logits ``(N, classes)``, class indices ``(N,)``."""
        logits = logits.float()
        losses = F.cross_entropy(logits, target, reduction='none')
        predictions = logits.topk(min(5, logits.shape[1])).indices
        right = predictions == target[:, None]
        self.sums += torch.stack([losses.to(self.sums).sum(), right[:, :1].sum(), right.sum()])
        self.count += len(target)
        top1 = predictions[:, 0]  # argmax may break a tie differently
        if self.classes.numel():
            for row, found in zip(self.classes, (target, top1, target[right[:, 0]])):
                row += torch.bincount(found, minlength=len(row))
        if self.confusion.numel():
            pairs = target * len(self.confusion) + top1
            self.confusion += torch.bincount(pairs, minlength=self.confusion.numel()).view_as(self.confusion)

    def result(self, world: DistributedContext, may_be_empty: bool = False) -> Dict[str, Any]:
        """Return the metrics over all ranks, which must call this together.

        Raises:
            ValueError: If there were no images, unless that is allowed.
        """
        for tensor in (self.sums, self.count, self.classes, self.confusion):
            world.all_reduce_(tensor)
        count = int(self.count)
        if count == 0 and not may_be_empty:
            raise ValueError('there were no images to evaluate')
        loss, top1, top5 = (self.sums / max(count, 1)).tolist()
        return {
            'loss': loss, 'top1': 100 * top1, 'top5': 100 * top5, 'count': count,
            **(macro_averages(*self.classes) if self.classes.numel() else {}), 'confusion': self.confusion}


def macro_averages(images: Tensor, predictions: Tensor, correct: Tensor) -> Dict[str, float]:
    """Return precision, recall and F1 in per cent, each the mean over the classes that have images.

    Args:
        images: Number of images of each class.
        predictions: Number of images that are predicted as each class.
        correct: Number of images of each class that are predicted right.
    """
    counts = torch.stack([images, predictions, correct])[:, images > 0].double().cpu()
    images, predictions, correct = counts
    values = {
        'precision': correct / predictions.clamp(min=1),  # 0 for a class that is never predicted
        'recall': correct / images,
        'f1': 2 * correct / (images + predictions),
    }
    return {name: 100 * value.mean().item() if len(value) else 0. for name, value in values.items()}


@torch.inference_mode()
def evaluate(
        model: nn.Module, loader: EvalLoader, device: torch.device, options: DeviceOptions = DeviceOptions(),
        description: str = 'validating', num_classes: int = 0, with_confusion: bool = True,
        stop: Optional[GracefulStop] = None) -> Dict[str, Any]:
    """Compute cross-entropy and accuracies of a model, each image counted once, over any number of ranks.

    Args:
        model: Model in evaluation mode, on ``device``.
        loader: Images to evaluate.
        device: Device to run on.
        options: Mixed precision and memory layout.
        description: Text of the progress bar, which is shown on a terminal only.
        num_classes: Number of classes for precision, recall, F1 and the confusion matrix, 0 for none of them.
        with_confusion: Whether to count the confusion matrix.
        stop: Checked after every batch; if set, evaluation stops and the partial metrics must be discarded.

    Returns:
        ``loss``, ``top1`` and ``top5`` (in per cent; top5 of as many as there are classes), ``count``, ``precision``,
        ``recall`` and ``f1`` of :func:`macro_averages`, and ``confusion`` of shape ``(num_classes, num_classes)``,
        whose rows are classes and columns predictions.

    Raises:
        ValueError: If there are no images.
    """
    meter = ClassificationMeter(device, num_classes, with_confusion)
    with tqdm(loader.loader, desc=description, leave=False, disable=None) as bar:  # closed before an error is reported
        for images, target in bar:
            if stop is not None and stop.number is not None:
                break
            images = images.to(device, memory_format=options.memory_format, non_blocking=True)
            target = target.to(device, non_blocking=True)
            with options.autocast(device):
                logits = model(images)
            meter.add(logits, target)
    return meter.result(loader.world, may_be_empty=stop is not None and stop.number is not None)
