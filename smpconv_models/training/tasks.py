"""The two tasks of training, on images and on sequences, behind one interface."""
from dataclasses import asdict
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Union

import timm.data
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import RandomCrop
from torchvision.transforms import v2 as transforms

from smpconv_models.checkpoint import MAX_INHERITED_SIDE
from smpconv_models.data import DATASET_NAMES, EMBEDDED_NAMES, create_sequence_dataset
from smpconv_models.models import list_sequence_models
from smpconv_models.utils.download import DownloadNeededError
from smpconv_models.utils.errors import suggestion_suffix

from . import dataset_factory
from .class_folders import listed, quoted
from .config import AugmentationOptions, DataOptions, is_sequence_dataset
from .datasets import SeededDataset

# Options for images only, and the values that leave them out.
_IMAGE_ONLY_OPTIONS: Dict[str, Any] = {
    'channels_last': False, 'cutmix': 0., 'img_size': None, 'input_size': None, 'crop_pct': None, 'mean': None,
    'std': None, 'interpolation': None, 'aa': None, 'reprob': 0., 'train_interpolation': None,
    'val_split_fraction': None, 'fit_img_size': False,
}


class _Task(NamedTuple):
    """Checks, data set and transforms for one kind of input."""
    data: DataOptions


class ImageTask(_Task):
    """Classification of images."""
    supports_prefetcher = True  # timm's, which normalizes the batches on a GPU

    def check_options(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError for a model of sequences."""
        name = values.get('model')
        if name in list_sequence_models():
            raise ValueError(
                f'{name} is for sequences: expected --dataset seq/NAME, NAME one of {DATASET_NAMES}, got '
                f'{self.data.dataset or "a folder of images"}')

    def create_dataset(self, split: str, in_chans: int, is_training: bool) -> Any:
        """Create the data set of a split, by :func:`.dataset_factory.create_dataset`."""
        return dataset_factory.create_dataset(self.data, split, in_chans, is_training)

    def resolve_data_config(self, model: Any) -> Dict[str, Any]:
        """Return timm's data configuration; for other channels, the model's mean and std are averaged.

        Raises:
            ValueError: If the number of means or standard deviations is neither 1 nor that of the channels, or if no
                image size is given for a model of images above 1024 pixels.
        """
        overrides = {key: value for key, value in asdict(self.data).items() if value is not None}
        overrides['in_chans'] = model.in_chans
        for key in ('mean', 'std'):
            if len(overrides.get(key, (0,))) not in (1, model.in_chans):
                expected = '1 value' if model.in_chans == 1 else f'1 or {model.in_chans} values'
                raise ValueError(f'--{key} takes {expected}, got {overrides[key]}')
        if self.data.input_size is None and self.data.img_size is None:
            overrides['input_size'] = (model.in_chans, *model.pretrained_cfg['input_size'][1:])
            largest = max(overrides['input_size'][1:])
            if largest > MAX_INHERITED_SIDE:
                raise ValueError(
                    f'the model is described for images of {largest} pixels, more than {MAX_INHERITED_SIDE}: '
                    f'--img-size {largest} takes them')
        config = timm.data.resolve_data_config(overrides, model=model)
        config['num_classes'] = model.num_classes
        for key in ('mean', 'std'):
            if len(config[key]) != model.in_chans:
                config[key] = (sum(config[key]) / len(config[key]),) * model.in_chans
        return config

    def check_model(self, name: str, model: Any, dataset: Any, in_chans: int) -> None:
        """Raise ValueError unless the model takes the channels with which images are read."""
        if model.in_chans != in_chans:  # by the configuration of its repository or folder
            raise ValueError(f'{name} takes images of {model.in_chans} channels: --in-chans {model.in_chans}')

    def prepare_training(
            self, dataset: Any, data_config: Dict[str, Any], augmentation: AugmentationOptions,
            use_prefetcher: bool) -> None:
        """Set timm's augmentation, with the crop of ``random_crop_pad`` if it is on."""
        try:
            transform = create_transform(
                data_config['input_size'], is_training=True, use_prefetcher=use_prefetcher, no_aug=augmentation.no_aug,
                scale=(augmentation.scale[0], augmentation.scale[1]),
                ratio=(augmentation.ratio[0], augmentation.ratio[1]), hflip=augmentation.hflip,
                vflip=augmentation.vflip, color_jitter=augmentation.color_jitter, auto_augment=augmentation.aa,
                interpolation=augmentation.train_interpolation or data_config['interpolation'],
                mean=data_config['mean'], std=data_config['std'], re_prob=augmentation.reprob,
                re_mode=augmentation.remode, re_count=augmentation.recount)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f'the augmentation is not supported: {type(error).__name__} {error}') from error
        dataset.transform = patch_posterize(transform)
        if augmentation.random_crop_pad is not None and not augmentation.no_aug:
            crop = PadAndRandomCrop(data_config['input_size'][1:], augmentation.random_crop_pad)
            transform.transforms = [
                crop if isinstance(part, RandomResizedCropAndInterpolation) else part for part in transform.transforms]
            if not dataset.is_stream:
                dataset[0, 0]  # an image of another size is reported before there is a run

    def prepare_evaluation(self, dataset: Any, data_config: Dict[str, Any], use_prefetcher: bool) -> None:
        """Set timm's resizing, crop and normalization."""
        dataset.transform = create_transform(
            data_config['input_size'], use_prefetcher=use_prefetcher, interpolation=data_config['interpolation'],
            mean=data_config['mean'], std=data_config['std'], crop_pct=data_config['crop_pct'],
            crop_mode=data_config['crop_mode'])


class SequenceTask(_Task):
    """Classification of sequences."""
    supports_prefetcher = False

    def check_options(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError for a model of images, and for an option for images."""
        name, known = values.get('model'), list_sequence_models()
        if name is not None and name not in known:
            raise ValueError(
                f'--dataset {self.data.dataset} needs a network for sequences: expected one of {known}, got '
                f'{name}{suggestion_suffix(name, known)}')
        for option, default in _IMAGE_ONLY_OPTIONS.items():
            if values.get(option, default) != default:
                raise ValueError(f'--{option.replace("_", "-")} is for images, and {self.data.dataset} has sequences')

    def create_dataset(self, split: str, in_chans: int, is_training: bool) -> SeededDataset:
        """Create the data set of a split, by :func:`smpconv_models.data.create_sequence_dataset`."""
        if not split:
            raise ValueError('the name of a split must not be empty')
        _, _, name = (self.data.dataset or '').lower().partition('/')
        if name in DATASET_NAMES and name not in EMBEDDED_NAMES and not self.data.data_dir:
            raise ValueError(f'--dataset {self.data.dataset} needs a folder for its files: --data-dir')
        try:
            source = create_sequence_dataset(name, self.data.data_dir, split, self.data.dataset_download)
        except DownloadNeededError as error:
            raise ValueError(f'--dataset {self.data.dataset}: {error.message("--dataset-download")}') from error
        except ValueError as error:
            raise ValueError(f'--dataset {self.data.dataset}: {error}') from error
        return SeededDataset(source, self.data.seed, is_training=is_training)

    def resolve_data_config(self, model: Any) -> Dict[str, Any]:
        """Return the shape of the sequences as ``input_size``, and the number of classes."""
        return {'input_size': (model.in_chans, model.sequence_length), 'num_classes': model.num_classes}

    def check_model(self, name: str, model: Any, dataset: Any, in_chans: int) -> None:
        """Raise ValueError unless the model takes sequences of the shape of the data set."""
        expected, (channels, steps) = (model.in_chans, model.sequence_length), dataset.source.shape
        if (channels, steps) != expected:
            raise ValueError(
                f'{name} is made for sequences of (channels, steps) {expected}, and those of {self.data.dataset} are '
                f'{(channels, steps)}: --model-kwargs in_chans={channels} sequence_length={steps} makes one for them')

    def prepare_training(
            self, dataset: Any, data_config: Dict[str, Any], augmentation: AugmentationOptions,
            use_prefetcher: bool) -> None:
        """Set the crop and flip of images that are read as sequences, if ``random_crop_pad`` is on."""
        padding, size = augmentation.random_crop_pad, dataset.source.image_size
        if padding is None or augmentation.no_aug:
            return
        if size is None:
            raise ValueError(f'--random-crop-pad is for images, and the sequences of {self.data.dataset} are none')
        dataset.source.augment = transforms.Compose([
            torch.nn.Unflatten(-1, size),
            transforms.RandomCrop(size, padding=check_padding(padding, size)),
            transforms.RandomHorizontalFlip(augmentation.hflip),
            torch.nn.Flatten(-2),
        ])

    def prepare_evaluation(self, dataset: Any, data_config: Dict[str, Any], use_prefetcher: bool) -> None:
        """Leave the sequences as they are."""


Task = Union[ImageTask, SequenceTask]


def create_task(data: DataOptions) -> Task:
    """Return the task of a data set: sequences if its name begins with ``seq/``, otherwise images."""
    return SequenceTask(data) if is_sequence_dataset(data.dataset) else ImageTask(data)


# --- classes ---


def check_classes(
        trained: Optional[List[str]], evaluated: Optional[List[str]], first: str = 'training',
        second: str = 'evaluation') -> None:
    """Raise ValueError if the classes of two data sets, named `first` and `second`, differ by name or by index."""
    if trained is None or evaluated is None or list(trained) == list(evaluated):
        return
    intro = f'the classes of {first} and {second} must be the same: {len(trained)} and {len(evaluated)}'
    if set(trained) == set(evaluated) and len(trained) == len(evaluated):
        index = next(index for index, pair in enumerate(zip(trained, evaluated)) if pair[0] != pair[1])
        raise ValueError(
            f'{intro} in another order: class {index} is {quoted(trained[index])} in {first} and '
            f'{quoted(evaluated[index])} in {second}')
    raise ValueError(
        f'{intro}, only in {first} {listed(set(trained) - set(evaluated))}, '
        f'only in {second} {listed(set(evaluated) - set(trained))}')


def check_class_count(names: Optional[List[str]], num_classes: int) -> None:
    """Raise ValueError unless a model has an output for each of the data set's classes, if known, and at least two."""
    if names is not None and len(names) != num_classes:
        raise ValueError(f'the data set has {len(names)} classes, the model {num_classes}')
    if num_classes == 1:
        only = '' if names is None else f' ({quoted(names[0])})'
        raise ValueError(f'expected 2 classes or more, got 1{only}; a split has a folder for each class')


# --- augmentation ---


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest bits of each channel; 0 bits are black, as in Pillow before 13, which raises for 0."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def patch_posterize(transform: Any) -> Any:
    """Replace timm's posterize in a transform of timm by :func:`posterize`, in place, and return the transform.

    timm's policies ask for 0 bits: RandAugment with increasing severity (``inc1``, the paper's) does for about one
    image in 650.
    """
    for part in getattr(transform, 'transforms', [transform]):
        if isinstance(part, (AugMixAugment, RandAugment)):
            policies = [part.ops]
        elif isinstance(part, AutoAugment):
            policies = part.policy
        else:
            continue
        for op in (op for policy in policies for op in policy):
            if op.name.startswith('Posterize'):
                op.aug_fn = posterize
    return transform


def check_padding(padding: int, size: Tuple[int, int]) -> int:
    """Return the padding if no crop of an image can be all padding, otherwise raise ValueError."""
    if padding >= min(size):
        raise ValueError(f'--random-crop-pad must be below the side of the images, {min(size)}, got {padding}')
    return padding


class PadAndRandomCrop:
    """Random crop of ``padding`` black pixels around an image, to the image's own size (height, width)."""

    def __init__(self, size: Tuple[int, int], padding: int) -> None:
        self.size = size
        self.crop = RandomCrop(size, padding=check_padding(padding, size))

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.size != self.size[::-1]:
            raise ValueError(
                f'--random-crop-pad takes images of the input size, {self.size[1]}x{self.size[0]}, got '
                f'{image.size[0]}x{image.size[1]}')
        return self.crop(image)
