"""Sequences in place of images: what is opened, how it is augmented, and which options don't go with it."""
from argparse import Namespace
from typing import Any, Dict

import torch
from torchvision.transforms.v2 import Compose, RandomCrop, RandomHorizontalFlip

from smpconv_models import data
from smpconv_models.models import list_sequence_models
from smpconv_models.utils.errors import suggestion_suffix

from .augment import check_padding

_PREFIX = 'seq/'

# Of images only; an option's name and the value that leaves it out.
_OF_IMAGES: Dict[str, Any] = {
    'channels_last': False, 'cutmix': 0., 'img_size': None, 'input_size': None, 'crop_pct': None, 'mean': None,
    'std': None, 'interpolation': None, 'aa': None, 'reprob': 0., 'train_interpolation': None,
}


def are_meant(args: Namespace) -> bool:
    """Whether the data set is one of sequences, ``seq/NAME``."""
    return (args.dataset or '').lower().startswith(_PREFIX)


def validate_options(args: Namespace) -> None:
    """Looks at what goes together, before anything is opened.

    Raises:
        ValueError: A network for sequences and images, or the other way round, or sequences and an option for images.
    """
    is_for_sequences = args.model in list_sequence_models()
    if not are_meant(args):
        if is_for_sequences:
            raise ValueError(
                f'{args.model} is for sequences: expected --dataset {_PREFIX}NAME, NAME one of {data.NAMES}, got '
                f'{args.dataset or "a folder of images"}')
        return
    if args.model is not None and not is_for_sequences:
        raise ValueError(
            f'--dataset {args.dataset} needs a network for sequences: expected one of {list_sequence_models()}, got '
            f'{args.model}{suggestion_suffix(args.model, list_sequence_models())}')
    for name, nothing in _OF_IMAGES.items():
        if getattr(args, name, nothing) != nothing:
            raise ValueError(f'--{name.replace("_", "-")} is for images, and {args.dataset} has sequences')


def open_dataset(args: Namespace, split: str) -> data.SequenceDataset:
    """The data set that the arguments name.

    Raises:
        ValueError: As :func:`smpconv_models.data.create_sequence_dataset`.
    """
    try:
        return data.create_sequence_dataset(
            args.dataset[len(_PREFIX):].lower(), args.data_dir, split, args.dataset_download)
    except ValueError as error:
        text = str(error).replace('download=True', '--dataset-download').replace(
            'or will: got None', 'or will: --data-dir says which')
        raise ValueError(f'--dataset {args.dataset}: {text}') from error


def data_config(model: Any) -> Dict[str, Any]:
    """What :func:`.data.data_config` tells of images, of sequences: their shape and the classes."""
    return {'input_size': (model.in_chans, model.sequence_length), 'num_classes': model.num_classes}


def check_shape(args: Namespace, dataset: data.SequenceDataset, model: Any) -> None:
    """Raises ValueError unless the model is made for these sequences."""
    expected = model.in_chans, model.sequence_length
    if tuple(dataset.shape) != expected:
        raise ValueError(
            f'{args.model} is made for sequences of (channels, steps) {expected}, and those of {args.dataset} are '
            f'{tuple(dataset.shape)}: --model-kwargs in_chans={dataset.shape[0]} sequence_length={dataset.shape[1]} '
            'makes one for them')


def augment(args: Namespace, dataset: data.SequenceDataset) -> None:
    """Has images that are read as sequences cropped and flipped first, as the arguments ask for.

    Raises:
        ValueError: The sequences are no images.
    """
    if args.crop_padding is None or args.no_aug:
        return
    if dataset.image_size is None:
        raise ValueError(f'--crop-padding is for images, and the sequences of {args.dataset} are none')
    check_padding(args.crop_padding, dataset.image_size)
    dataset.augment = Compose([
        torch.nn.Unflatten(-1, dataset.image_size),
        RandomCrop(dataset.image_size, padding=args.crop_padding),
        RandomHorizontalFlip(args.hflip),
        torch.nn.Flatten(-2),
    ])
