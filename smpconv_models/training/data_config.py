"""What a model must know of its data: classes, and how images are made ready."""
from argparse import Namespace
from typing import Any, Dict, List, Optional

from timm.data import resolve_data_config
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from smpconv_models.checkpoint import MAX_INHERITED_SIDE
from smpconv_models.data.digits import SPLIT_SYNONYMS, Digits

from . import task_sequence
from .class_names import listed, quoted

__all__ = [
    'SPLIT_SYNONYMS', 'Digits', 'check_classes', 'check_num_classes', 'class_names', 'data_config',
]


def class_names(dataset: Any) -> Optional[List[str]]:
    """The classes by index, where the data set knows them."""
    if getattr(dataset, 'classes', None) is not None:
        # ImageNet's are lists of synonyms to torchvision
        return [name if isinstance(name, str) else ', '.join(name) for name in dataset.classes]
    reader = getattr(dataset, 'reader', None)
    is_tar = isinstance(reader, ReaderImageInTar)
    class_to_idx = getattr(reader, 'class_name_to_idx' if is_tar else 'class_to_idx', None)
    if not class_to_idx:
        return None
    return sorted(class_to_idx, key=class_to_idx.__getitem__)


def check_classes(
        trained: Optional[List[str]],
        evaluated: Optional[List[str]],
        first: str = 'training',
        second: str = 'evaluation',
) -> None:
    """Compares the classes that a model is trained on with those it is evaluated on, where both are known.

    Args:
        trained: By index.
        evaluated: By index.
        first: What the former are, in the error.
        second: What the latter are.

    Raises:
        ValueError: They differ, by name or by index.
    """
    if trained is None or evaluated is None or list(trained) == list(evaluated):
        return
    told = f'the classes of {first} and {second} must be the same: {len(trained)} and {len(evaluated)}'
    if set(trained) == set(evaluated) and len(trained) == len(evaluated):
        index = next(index for index, pair in enumerate(zip(trained, evaluated)) if pair[0] != pair[1])
        raise ValueError(
            f'{told} in another order: class {index} is {quoted(trained[index])} in {first} and '
            f'{quoted(evaluated[index])} in {second}')
    raise ValueError(
        f'{told}, only in {first} {listed(set(trained) - set(evaluated))}, '
        f'only in {second} {listed(set(evaluated) - set(trained))}')


def check_num_classes(names: Optional[List[str]], num_classes: int) -> None:
    """Raise ValueError unless a model has an output for each class of the data set, and two or more of them.

    Args:
        names: Classes of the data set, None if they are not known.
        num_classes: Outputs of the model.
    """
    if names is not None and len(names) != num_classes:
        raise ValueError(f'the data set has {len(names)} classes, the model {num_classes}')
    if num_classes == 1:
        only = '' if names is None else f' ({quoted(names[0])})'
        raise ValueError(
            f'expected 2 classes or more, got 1{only}; a split has a folder for each class')


def data_config(args: Namespace, model: Any) -> Dict[str, Any]:
    """timm's data configuration of model and arguments; the model's mean and std are averaged for other channels.

    Of sequences, :func:`.sequence_data.data_config`.

    Raises:
        ValueError: If the number of means or of deviations is neither 1 nor that of the channels, or if no image size
            is given for a model of images above 1024 pixels.
    """
    if task_sequence.are_meant(args):
        return task_sequence.data_config(model)
    overrides = {key: value for key, value in vars(args).items() if value is not None}
    overrides['in_chans'] = model.in_chans
    for key in ('mean', 'std'):
        if len(overrides.get(key, (0,))) not in (1, model.in_chans):
            expected = '1 value' if model.in_chans == 1 else f'1 or {model.in_chans} values'
            raise ValueError(f'--{key} takes {expected}, got {overrides[key]}')
    if args.input_size is None and args.img_size is None:
        overrides['input_size'] = (model.in_chans, *model.pretrained_cfg['input_size'][1:])
        largest = max(overrides['input_size'][1:])
        if largest > MAX_INHERITED_SIDE:
            raise ValueError(
                f'the model is described for images of {largest} pixels, more than {MAX_INHERITED_SIDE}: --img-size '
                f'{largest} takes them')
    config = resolve_data_config(overrides, model=model)
    config['num_classes'] = model.num_classes
    for key in ('mean', 'std'):
        if len(config[key]) != model.in_chans:
            config[key] = (sum(config[key]) / len(config[key]),) * model.in_chans
    return config
