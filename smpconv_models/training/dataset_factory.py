"""Image data sets by name: everything that timm reads, with errors in one line."""
import importlib.util
import json
import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple, Type, Union

import timm.data
from PIL import Image
from timm.data import get_img_extensions
from torchvision.datasets.folder import IMG_EXTENSIONS

from smpconv_models.data.images import Digits
from smpconv_models.data.registry import EVAL_SYNONYMS, TRAIN_SYNONYMS
from smpconv_models.utils.download import locked
from smpconv_models.utils.errors import first_line

from .class_folders import READER_ERRORS, ClassFolders, ClassTars, Scan, listed, log_nesting, shown
from .config import DataOptions
from .datasets import (
    DECODE_ERRORS,
    DEEP_MODES,
    HuggingFaceStream,
    ReadImage,
    SeededDataset,
    SeededIterableDataset,
    WebDatasetStream,
    names_by_index,
    orientation,
)

_logger = logging.getLogger(__name__)

# Prefixes of the names under which timm reads other data sets than folders, and the packages that they need.
_PREFIXES = {
    'torch': 'torchvision', 'hfds': 'datasets', 'hfids': 'datasets', 'tfds': 'tensorflow_datasets', 'wds': 'webdataset'}

# torchvision's data sets with two splits: timm takes any other split's name, however mistyped, for the test images.
_TRAIN_TEST_ONLY = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist')

# Number of images of a split whose headers are checked before the first step.
_NUM_HEADERS = 64


def create_dataset(
        data: DataOptions, split: str, in_chans: int, is_training: bool) -> Union[SeededDataset, SeededIterableDataset]:
    """Create the image data set that the options name: 'digits', or any of ``timm.data.create_dataset``.

    Without a name, ``data_dir`` holds for each split a folder of class folders (``train/CLASS/IMAGE``), a folder of
    tar files of a class each (``train/CLASS.tar``), or a tar file of either (``train.tar``). With
    ``val_split_fraction``, it holds the class folders themselves, whose images are divided. Skipped files, and
    properties that the user may not expect, are logged at level INFO, which train.py enables on rank 0.

    Args:
        data: Names of the data set and its folder, and how images are read.
        split: Name of the split.
        in_chans: Channels of the images, 1 or 3.
        is_training: Whether to train on the split.

    Raises:
        ValueError: If the data set or the split does not exist, or has a fault that is found without the images.
    """
    if not split:
        raise ValueError('the name of a split must not be empty')
    if data.dataset and data.val_split_fraction is not None:
        raise ValueError(f'--val-split-fraction divides a folder of class folders, got --dataset {data.dataset}')
    if in_chans not in (1, 3):
        raise ValueError(f'images are read with 1 channel (gray) or 3 (RGB), got in_chans {in_chans}')
    read_image = ReadImage('L' if in_chans == 1 else 'RGB', bool(data.exif_orientation))
    if data.dataset == 'digits':
        return SeededDataset(_MapStyleImages(Digits(split, read_image.mode)), data.seed, is_training=is_training)
    prefix, name = _parse_name(data.dataset) if data.dataset else ('', '')
    if prefix == 'wds':
        return _create_webdataset(data, split, read_image, is_training)
    if prefix == 'hfids':
        return _create_hugging_face_stream(data, name, split, read_image, is_training)
    if prefix == 'tfds':
        dataset = _create_with_timm(data, split, is_training, read_image.mode)
        return SeededIterableDataset(dataset, data.seed, read_image.convert)
    if prefix == 'hfds':
        source: Any = _create_hugging_face(data, split, is_training)
    elif prefix == 'torch':
        source = _create_torchvision(data, name.lower(), split)
    elif data.val_split_fraction is not None:
        source = _create_part(data, data.val_split_fraction, split)
    else:
        source = _create_folder(_find_split(data.data_dir, split))
    if _logger.isEnabledFor(logging.INFO):
        _check_headers(data, split, source)
    return SeededDataset(source, data.seed, read_image.convert, is_training)


def _parse_name(dataset: str) -> Tuple[str, str]:
    """Return the prefix of the data set's name, whose package is installed, and the rest."""
    prefix, _, name = dataset.partition('/')
    prefix = prefix.lower()
    if prefix not in _PREFIXES or not name:
        raise ValueError(
            f"--dataset must be 'digits' or begin with one of {('seq', *_PREFIXES)} and /, then a name, got "
            f'{dataset!r}')
    package = _PREFIXES[prefix]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f'--dataset {dataset} needs {package}: pip install {package.replace("_", "-")}')
    return prefix, name


def _create_with_timm(data: DataOptions, split: str, is_training: bool, mode: str = 'RGB', **options: Any) -> Any:
    """Return ``timm.data.create_dataset``, with errors as one line."""
    try:
        return timm.data.create_dataset(
            data.dataset or '', root=data.data_dir, split=split, is_training=is_training, batch_size=data.batch_size,
            seed=data.seed, input_img_mode=mode, download=data.dataset_download, **options)
    except _reader_errors(data) as error:
        raise _open_error(data, split, error) from error


def _reader_errors(data: DataOptions) -> Tuple[Type[Exception], ...]:
    if not (data.dataset or '').lower().startswith(('hfds/', 'hfids/')):
        return READER_ERRORS
    from datasets.exceptions import DatasetsError
    return (*READER_ERRORS, DatasetsError)


def _open_error(data: DataOptions, split: str, error: BaseException) -> ValueError:
    """Return the error for a split that cannot be opened."""
    # Hugging Face's errors may only report that there was another error
    while error.__cause__ is not None and type(error).__module__.startswith('datasets.'):
        error = error.__cause__
    may_be_missing = isinstance(error, RuntimeError) and (data.dataset or '').lower().startswith('torch/')
    hint = '; --dataset-download downloads missing files' if may_be_missing and not data.dataset_download else ''
    return ValueError(f'{_label(data, split)} cannot be opened: {first_line(error)}{hint}')


def _label(data: DataOptions, split: str) -> str:
    place = f' in {data.data_dir}' if data.data_dir else ''
    return f'split {split!r} of {data.dataset or "the images"}{place}'


# --- folders and tar files ---


def _create_folder(path: Path) -> Union[ClassFolders, ClassTars]:
    has_folders = path.is_dir() and any(item.is_dir() and not item.name.startswith('.') for item in path.iterdir())
    if path.is_file() or (not has_folders and any(path.glob('*.tar'))):
        source: Union[ClassFolders, ClassTars] = ClassTars(path)
    else:
        scan = _scan(path, get_img_extensions(as_set=True))
        if not scan.images:
            raise ValueError(f'{shown(str(path))} has no images ({", ".join(sorted(scan.extensions))})')
        log_nesting(str(path), {os.path.relpath(folder, path) for folder in {folder for _, folder in scan.images}})
        source = ClassFolders(scan)
    # timm makes a class of the images that are in no folder
    stray = {index for index, name in enumerate(source.classes) if name in ('', '.')}
    if stray:
        index = next(index for index, target in enumerate(source.targets) if target in stray)
        raise ValueError(f'{path} has images that are in no class folder, such as {shown(source.name(index))}')
    return source


def _create_part(data: DataOptions, fraction: float, split: str) -> ClassFolders:
    """Return the training or the validation images of a folder without splits."""
    root = _check_root(data.data_dir, 'the folder that holds a folder for each class')
    if split not in (*TRAIN_SYNONYMS, *EVAL_SYNONYMS, 'all'):
        raise ValueError(f'with --val-split-fraction the split must be train, validation or all, got {split!r}')
    found = find_splits(root)
    if found:
        raise ValueError(
            f'--data-dir {root} has {" and ".join(found)}: leave out --val-split-fraction, which divides a folder '
            'without splits')
    source = _create_folder(root)
    if isinstance(source, ClassTars):
        raise ValueError(f'--val-split-fraction divides class folders, and {root} has tar files')
    return source if split == 'all' else source.split(fraction, data.seed)[split in EVAL_SYNONYMS]


def find_splits(root: Path) -> List[str]:
    """Return the names of the folders and tar files in a folder that stand for a split."""
    names = {f'{name}{suffix}' for name in TRAIN_SYNONYMS + EVAL_SYNONYMS for suffix in ('', '.tar')}
    return sorted(path.name for path in root.iterdir() if path.name in names)


def _scan(path: Path, extensions: Iterable[str]) -> Scan:
    scan = Scan(str(path), set(extensions)).walk()
    scan.check_no_empty_folder()
    for line in scan.notes():
        _logger.info('%s', line)
    return scan


def _find_split(data_dir: Optional[str], split: str) -> Path:
    """Return the path to the split's folder or tar file.

    timm would fall back to the root if there is none, and evaluate on the training images.
    """
    root = _check_root(data_dir, 'the folder that holds the training and validation images')
    names = next((names for names in (TRAIN_SYNONYMS, EVAL_SYNONYMS) if split in names), (split,))
    for choice in ((split,), names):
        for suffix in ('', '.tar'):
            paths = [root / f'{name}{suffix}' for name in choice]
            paths = [path for path in paths if (path.is_file() if suffix else path.is_dir())]
            if len(paths) > 1:
                raise ValueError(
                    f'--data-dir {data_dir}: {split!r} may be any of {[path.name for path in paths]}; name one of them')
            if paths:
                return paths[0]
    hint = '' if find_splits(root) else '; --val-split-fraction 0.2 divides a folder that has a folder for each class'
    raise ValueError(
        f'--data-dir {data_dir}: expected a folder named {" or ".join(names)}, or such a tar file '
        f'({split}.tar), found {_list_folder(root)}{hint}')


def _check_root(data_dir: Optional[str], what: str) -> Path:
    if not data_dir:  # the working folder has to be named, as "."
        raise ValueError(f'--data-dir is needed: {what}; or --dataset names a data set')
    root = Path(data_dir)
    if root.is_file():
        raise ValueError(
            f'--data-dir {data_dir}: expected a folder with a folder or a tar file for each split, got a file')
    if not root.is_dir():
        raise ValueError(f'--data-dir {data_dir}: no such folder')
    return root


def _list_folder(root: Path) -> str:
    return listed((path.name for path in root.iterdir()), 8)


def _read_headers(source: Any, read: Callable[[Image.Image], Any]) -> Dict[int, Any]:
    """Return the results of ``read`` for at most 64 images, evenly spaced in a source, whose pixels are not decoded.

    An image that cannot be read is left out: it is reported as unreadable when it is loaded.
    """
    count = len(source)
    indices = range(count) if count <= _NUM_HEADERS else [
        index * count // _NUM_HEADERS for index in range(_NUM_HEADERS)]
    found = {}
    for index in indices:
        try:
            with source[index][0] as image:
                found[index] = read(image)
        except DECODE_ERRORS as error:
            _logger.debug('the header of image %d cannot be read: %s', index, error)
    return found


def fit_img_size(dataset: Any, largest: int) -> int:
    """Return an image side for a data set: the median of the shorter sides, as a multiple of 32.

    Args:
        dataset: Data set with readable headers, of which at most 64 are read.
        largest: Largest side to return; the smallest is 64.

    Raises:
        ValueError: If the data set is a stream, or none of the headers can be read.
    """
    if dataset.is_stream:
        raise ValueError('--fit-img-size cannot read the images of a stream beforehand: use --img-size')
    sides = _read_headers(dataset.source, lambda image: min(image.size)).values()
    if not sides:
        raise ValueError('--fit-img-size: none of the images can be read')
    return min(max(round(median(sides) / 32) * 32, 64), largest)


def _check_headers(data: DataOptions, split: str, source: Any) -> None:
    """Log how many images have an EXIF orientation that is ignored, or more than 8 bits per value.

    The headers of at most 64 images, evenly spaced in the data set, are read. Pixels are not decoded.
    """
    headers = _read_headers(source, lambda image: (
        not data.exif_orientation and orientation(image) != 1, image.mode in DEEP_MODES))
    turned, deep = ([index for index, header in headers.items() if header[kind]] for kind in (0, 1))
    for found, what in (
        (turned, 'have an EXIF orientation that is ignored (--exif-orientation applies it)'),
        (deep, 'have 16 or 32 bits per value (black is 0, white is 65535 for integers and 1 for floats)'),
    ):
        if found:
            _logger.info(
                '%s: %d of %d checked images %s, such as %s', _label(data, split), len(found),
                min(len(source), _NUM_HEADERS), what, shown(source.name(found[0])))


# --- torchvision ---


class _MapStyleImages:
    """Source of the images of a map-style data set such as torchvision's.

    Args:
        dataset: Data set of (image, target).
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        # torchvision's ImageNet has a tuple of synonyms for each class
        self.classes = [
            name if isinstance(name, str) else ', '.join(name) for name in dataset.classes
        ] if getattr(dataset, 'classes', None) is not None else None
        self.targets = getattr(dataset, 'targets', None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        return self.dataset[index]

    def name(self, index: int) -> str:
        """Return the path of an image, or its index if it has no path of its own."""
        files = getattr(self.dataset, 'samples', None)
        return f'image {index}' if files is None else str(files[index][0])


def _create_torchvision(data: DataOptions, name: str, split: str) -> Union[ClassFolders, _MapStyleImages]:
    if name in ('folder', 'image_folder'):
        path = _find_split(data.data_dir, split)
        scan = _scan(path, IMG_EXTENSIONS)
        if not scan.top_level:
            raise ValueError(f'{shown(str(path))} has no class folders with images')
        return ClassFolders(scan, by_top_level=True)
    if data.data_dir is None:
        raise ValueError(f'--data-dir is needed: the folder of {data.dataset}')
    known = (*TRAIN_SYNONYMS, *EVAL_SYNONYMS, 'test')
    if name in _TRAIN_TEST_ONLY and split not in known:
        raise ValueError(f'split of {data.dataset} must be one of {known}, got {split!r}')
    # the first process of a machine downloads, the others find the files
    with locked(Path(data.data_dir)) if data.dataset_download else nullcontext():
        dataset = _create_with_timm(data, split, False, search_split=False)
    if hasattr(dataset, 'loader'):
        dataset.loader = Image.open  # ReadImage converts the images
    return _MapStyleImages(dataset)


# --- WebDataset ---


def _create_webdataset(data: DataOptions, split: str, read_image: ReadImage, is_training: bool) -> WebDatasetStream:
    """Create a stream of shards; missing ones, which timm would pass over with a line in the log, are an error."""
    is_remote = '://' in (data.data_dir or '')
    is_pattern = 'tar' in split or '..' in split  # to timm
    if not is_remote:
        root = _check_root(data.data_dir, f'the folder of the shards of {data.dataset}')
        if not is_pattern:
            _check_info(root, split)
    dataset = _create_with_timm(data, split, is_training)
    if not dataset.reader.num_samples:
        raise ValueError(f'split {split!r} needs the number of its images: {split}|IMAGES')
    names = dataset.reader.split_info.filenames
    missing = [] if is_remote else [name for name in names if '://' not in name and not (root / name).is_file()]
    if missing:
        raise ValueError(f'{_label(data, split)} lacks {len(missing)} of {len(names)} shards: {sorted(missing)[:4]}')
    return WebDatasetStream(dataset, data.seed, read_image.convert)


def _check_info(root: Path, split: str) -> None:
    path = next((root / name for name in ('_info.json', 'info.json') if (root / name).is_file()), None)
    if path is None:
        raise ValueError(
            f'--data-dir {root}: expected _info.json, or a split such as {split}-{{0000..0003}}.tar|IMAGES, '
            f'found {_list_folder(root)}')
    try:
        splits = dict(json.loads(path.read_text())['splits'])
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f'{path} has no readable splits: {type(error).__name__} {error}') from error
    if split not in splits:
        raise ValueError(f'{path}: expected a split named {split}, found {sorted(splits)[:8]}')


# --- Hugging Face ---


class _HuggingFaceImages:
    """Source of the images of a Hugging Face data set, by timm's reader."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self.classes = names_by_index(reader.class_to_idx)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Tuple[Image.Image, Any]:
        file, target = self.reader[index]
        return Image.open(file), target

    def name(self, index: int) -> str:
        """Return the path of an image if it is absolute, otherwise the index of the image."""
        try:
            path = self.reader.filename(index, absolute=True) or ''
        except DECODE_ERRORS:
            path = ''
        if os.path.isabs(path):
            return path
        return f'image {index}' + (f' ({path})' if path else '')


def _create_hugging_face(data: DataOptions, split: str, is_training: bool) -> _HuggingFaceImages:
    _configure_hugging_face()
    reader = _create_with_timm(data, split, is_training).reader
    # timm adds a column of images if there is none
    images = reader.dataset.data.column(reader.image_key)
    found = set(reader.dataset.column_names) - ({reader.image_key} if images.null_count == len(images) else set())
    _check_columns(data, found)
    source = _HuggingFaceImages(reader)
    _check_labels(data, split, source, is_training)
    return source


def _create_hugging_face_stream(
        data: DataOptions, name: str, split: str, read_image: ReadImage, is_training: bool) -> HuggingFaceStream:
    """Create a stream whose length and columns are known; timm would fail at them with other words."""
    import datasets
    _configure_hugging_face()
    try:
        builder = datasets.load_dataset_builder(name, cache_dir=data.data_dir)
    except _reader_errors(data) as error:
        raise _open_error(data, split, error) from error
    splits = list(builder.info.splits or builder.config.data_files or ())
    if splits and split not in splits:
        raise ValueError(f'split of {data.dataset} must be one of {splits}, got {split!r}')
    if builder.info.features is not None:
        _check_columns(data, builder.info.features)
    if not builder.info.splits and not data.dataset_download:
        raise ValueError(
            f'{data.dataset} does not state its number of images, which the schedule needs: --dataset-download '
            'counts them')
    dataset = _create_with_timm(data, split, is_training, read_image.mode)
    return HuggingFaceStream(dataset, data.seed, read_image.convert)


def _configure_hugging_face() -> None:
    """Show Hugging Face's progress bars on terminals only, and propagate its log to ours."""
    import datasets
    logging.getLogger('datasets').handlers.clear()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _check_columns(data: DataOptions, found: Iterable[str]) -> None:
    missing = [name for name in ('image', 'label') if name not in found]
    if missing:
        raise ValueError(f'{data.dataset}: expected columns image and label, found {sorted(found)}')


def _check_labels(data: DataOptions, split: str, source: _HuggingFaceImages, is_training: bool) -> None:
    """Check that labels are class indices, and that the split has images of each class of the data set."""
    reader, names = source.reader, source.classes
    kind = getattr(reader.dataset.features[reader.label_key], 'dtype', 'a list')
    if 'int' not in kind:
        raise ValueError(f'labels of {_label(data, split)} must be whole numbers, got {kind}')
    if names is None:
        return
    labels = set(reader.dataset.unique(reader.label_key))
    outside = sorted(labels - set(range(len(names))), key=repr)
    if outside:
        raise ValueError(f'labels of {_label(data, split)} must be below {len(names)}, got {outside[:4]}')
    absent = [name for label, name in enumerate(names) if label not in labels]
    missing = f'{_label(data, split)} has no image of {len(absent)} of {len(names)} classes: {absent[:8]}'
    if absent and reader.dataset.info.builder_name == 'imagefolder' and '[' not in split:
        raise ValueError(missing)  # the splits' folders differ
    if absent and is_training:
        _logger.info('%s', missing)
