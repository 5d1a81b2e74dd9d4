"""The embedded digits, and what a model must know of its data: classes, and how images are made ready."""
from argparse import Namespace
from typing import Any, Dict, List, Optional, Tuple

from PIL import Image
from timm.data import resolve_data_config
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset

# Names under which timm looks for a split's folder.
SPLIT_SYNONYMS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'))


class Digits(Dataset):
    """Handwritten digits, as scikit-learn ships them: 1,797 gray images of 8x8 pixels, 10 classes.

    A stratified fifth (360 images) is held out as the validation split; the division is fixed.

    Args:
        split: 'train' or 'validation', or a synonym that timm knows.
        mode: PIL's mode of the images, 'L' (gray) or 'RGB'.
        transform: Applied to the PIL image; timm's loader sets it.

    Raises:
        ValueError: Another split's name, or scikit-learn isn't installed.
    """

    classes = tuple('0123456789')

    def __init__(self, split: str, mode: str = 'L', transform: Any = None) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ValueError('the digits need scikit-learn: pip install scikit-learn') from error
        train_names, validation_names = SPLIT_SYNONYMS
        if split not in train_names + validation_names:
            raise ValueError(f'split of the digits must be one of {train_names + validation_names}, got {split!r}')
        images, labels = load_digits(return_X_y=True)
        train, validation = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
        indices = train if split in train_names else validation
        pixels = (images[indices] * (255 / 16)).round().astype('uint8').reshape(-1, 8, 8)
        self.images = [Image.fromarray(image).convert(mode) for image in pixels]
        self.labels = labels[indices].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image = self.images[index]
        return (image if self.transform is None else self.transform(image)), self.labels[index]


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
    if trained is None or evaluated is None or trained == evaluated:
        return
    raise ValueError(
        f'the classes of {first} and {second} must be the same: {len(trained)} and {len(evaluated)}, '
        f'only in {first} {sorted(set(trained) - set(evaluated))[:5]}, '
        f'only in {second} {sorted(set(evaluated) - set(trained))[:5]}'
    )


def check_num_classes(names: Optional[List[str]], num_classes: int) -> None:
    """Raises ValueError unless a model has an output for each class of the data set, where these are known."""
    if names is not None and len(names) != num_classes:
        raise ValueError(f'the data set has {len(names)} classes, the model {num_classes}')


def data_config(args: Namespace, model: Any) -> Dict[str, Any]:
    """timm's data configuration of model and arguments; the model's mean and std are averaged for other channels.

    Raises:
        ValueError: As many means or deviations were given as there are neither channels nor one.
    """
    overrides = {key: value for key, value in vars(args).items() if value is not None}
    overrides['in_chans'] = model.in_chans
    for key in ('mean', 'std'):
        if len(overrides.get(key, (0,))) not in (1, model.in_chans):
            expected = '1 value' if model.in_chans == 1 else f'1 or {model.in_chans} values'
            raise ValueError(f'--{key} takes {expected}, got {overrides[key]}')
    if args.input_size is None and args.img_size is None:
        overrides['input_size'] = (model.in_chans, *model.pretrained_cfg['input_size'][1:])
    config = resolve_data_config(overrides, model=model)
    config['num_classes'] = model.num_classes
    for key in ('mean', 'std'):
        if len(config[key]) != model.in_chans:
            config[key] = (sum(config[key]) / len(config[key]),) * model.in_chans
    return config
