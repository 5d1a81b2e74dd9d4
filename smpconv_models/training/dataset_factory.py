"""Opening data sets: everything that timm reads, and what is wrong with it told in one line."""
import importlib.util
import json
import logging
import os
import sys
import tarfile
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Dict, Iterable, Optional, Set, Tuple, Type

import numpy as np
from filelock import FileLock
from PIL import Image
from timm.data import ImageDataset, create_dataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from smpconv_models.utils.errors import first_line

from . import task_sequence
from .class_folders import FolderReader, TorchFolder, is_hidden, nesting_notes, timm_scan, torch_scan
from .class_names import in_order, listed, shown
from .data_config import SPLIT_SYNONYMS, Digits, class_names
from .datasets import image_name
from .image_reading import DEEP_MODES, ReadImage, orientation
from .skipped import ERRORS

_logger = logging.getLogger(__name__)

# Of the names under which timm reads other data sets than folders, and the packages that it takes for that.
_PREFIXES = {
    'torch': 'torchvision', 'hfds': 'datasets', 'hfids': 'datasets', 'tfds': 'tensorflow_datasets', 'wds': 'webdataset'}

# torchvision's data sets of two parts: any other split's name, however mistyped, is the test images to timm.
_TWO_PARTS = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist')

# What timm and the packages that it reads with raise where there is no such data, or it is damaged.
_ERRORS: Tuple[Type[Exception], ...] = (
    AssertionError, AttributeError, EOFError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
    UnpicklingError, tarfile.TarError)

# Number of images of a split whose headers are checked before the first step.
_HEADERS = 64


def open_dataset(args: Namespace, split: str, in_chans: int, is_training: bool) -> Any:
    """Open the data set that the arguments name: 'digits', ``seq/NAME``, or any of ``timm.data.create_dataset``.

    Without a name ``--data-dir`` holds, for each split, a folder of class folders (``train/CLASS/IMAGE``), a folder of
    tar files of a class each (``train/CLASS.tar``), or a tar file of either (``train.tar``).

    Skipped files, and properties of the data that the user may not expect, are logged at level INFO, which train.py
    enables on rank 0.

    Args:
        args: Names of the data set and its folder, and how images are read.
        split: Name of the split.
        in_chans: Channels of the images, 1 or 3.
        is_training: Whether to train on the split.

    Raises:
        ValueError: If the data set or the split does not exist, or has a fault that is found without reading the
            images.
    """
    if not split:
        raise ValueError('the name of a split must not be empty')
    if task_sequence.are_meant(args):
        return task_sequence.open_dataset(args, split)
    if in_chans not in (1, 3):
        raise ValueError(f'images are read with 1 channel (gray) or 3 (RGB), got in_chans {in_chans}')
    mode = 'L' if in_chans == 1 else 'RGB'
    if args.dataset == 'digits':
        return Digits(split, mode)
    dataset = _open_images(args, split, mode, is_training)
    dataset.read_image = ReadImage(mode, bool(args.exif_orientation))
    if _logger.isEnabledFor(logging.INFO):
        _check_headers(args, split, dataset)
    return dataset


def _open_images(args: Namespace, split: str, mode: str, is_training: bool) -> Any:
    if not args.dataset:
        return _open_folder(args, split, mode)
    prefix, name = _parse(args.dataset)
    if prefix == 'torch':
        return _open_torchvision(args, name.lower(), split, mode)
    if prefix == 'wds':
        return _open_shards(args, split, mode, is_training)
    if prefix in ('hfds', 'hfids'):
        return _open_hugging_face(args, prefix, split, mode, is_training)
    return _create(args, split, mode, is_training)


def _parse(dataset: str) -> Tuple[str, str]:
    """The prefix of the data set's name, whose package is there, and the rest."""
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


def _create(args: Namespace, split: str, mode: str, is_training: bool, **options: Any) -> Any:
    """``timm.data.create_dataset``, with users' mistakes as one line."""
    options = {'root': args.data_dir, 'download': args.dataset_download, **options}
    try:
        return create_dataset(
            args.dataset, split=split, is_training=is_training, batch_size=args.batch_size, seed=args.seed,
            input_img_mode=mode, **options)
    except _errors(args) as error:
        raise ValueError(f'{_described(args, split)} cannot be opened: {_reason(error)}') from error


def _errors(args: Namespace) -> Tuple[Type[Exception], ...]:
    if not args.dataset.lower().startswith(('hfds/', 'hfids/')):
        return _ERRORS
    from datasets.exceptions import DatasetsError
    return (*_ERRORS, DatasetsError)


def _reason(error: BaseException) -> str:
    """One line; of the cause where Hugging Face's library says no more than that there was one."""
    while error.__cause__ is not None and type(error).__module__.startswith('datasets.'):
        error = error.__cause__
    return first_line(error).replace('download=True', '--dataset-download')


def _described(args: Namespace, split: str) -> str:
    place = f' in {args.data_dir}' if args.data_dir else ''
    return f'split {split!r} of {args.dataset or "the images"}{place}'


# --- folders and tar files ---


def _open_folder(args: Namespace, split: str, mode: str) -> ImageDataset:
    path = _find_split(args.data_dir, split)
    if path.is_file() or _holds_tars(path):
        dataset = _open_tars(path, mode)
    else:
        dataset = _open_class_folders(path, mode)
    _check_class_folders(path, dataset)
    return dataset


def _log(lines: Iterable[str]) -> None:
    for line in lines:
        _logger.info('%s', line)


def _open_class_folders(path: Path, mode: str) -> ImageDataset:
    scan = timm_scan(str(path))
    scan.check_no_empty_folder()
    if not scan.images:
        raise ValueError(f'{shown(str(path))} has no images ({", ".join(sorted(scan.extensions))})')
    _log(scan.notes())
    _log(nesting_notes(str(path), {os.path.relpath(folder, path) for folder in {folder for _, folder in scan.images}}))
    return ImageDataset(str(path), reader=FolderReader(scan), input_img_mode=mode)


def _find_split(data_dir: Optional[str], split: str) -> Path:
    """The split's folder or tar file.

    timm falls back to the root where there is none, and would validate on the training images.
    """
    root = _root(data_dir, 'the folder that holds the training and validation images')
    names = next((names for names in SPLIT_SYNONYMS if split in names), (split,))
    for choice in ((split,), names):
        for suffix in ('', '.tar'):
            paths = [root / f'{name}{suffix}' for name in choice]
            paths = [path for path in paths if (path.is_file() if suffix else path.is_dir())]
            if len(paths) > 1:
                raise ValueError(
                    f'--data-dir {data_dir}: {split!r} may be any of {[path.name for path in paths]}; name one of them')
            if paths:
                return paths[0]
    raise ValueError(
        f'--data-dir {data_dir}: expected a folder named {" or ".join(names)}, or such a tar file '
        f'({split}.tar), found {_listed(root)}')


def _root(data_dir: Optional[str], what: str) -> Path:
    if not data_dir:  # the working folder has to be named, as "."
        raise ValueError(f'--data-dir is needed: {what}')
    root = Path(data_dir)
    if root.is_file():
        raise ValueError(
            f'--data-dir {data_dir}: expected a folder with a folder or a tar file for each split, got a file')
    if not root.is_dir():
        raise ValueError(f'--data-dir {data_dir}: no such folder')
    return root


def _listed(root: Path) -> str:
    return listed((path.name for path in root.iterdir()), 8)


def _holds_tars(folder: Path) -> bool:
    return any(folder.glob('*.tar')) and not _folders(folder)


def _folders(folder: Path) -> Set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.')}


def _open_tars(path: Path, mode: str) -> ImageDataset:
    reader = _read_tars(path)
    _skip_hidden(path, reader)
    _sort_classes(reader)
    folders = {_folder_of(sample) for sample in reader.samples}
    common = os.path.commonpath(folders) if len(folders) > 1 else ''  # of a whole folder that was packed
    _log(nesting_notes(str(path), {os.path.relpath(folder, common) if common else folder for folder in folders}))
    dataset = ImageDataset(str(path), reader=reader, input_img_mode=mode)
    if path.is_dir():
        empty = sorted({tar.name for tar in path.glob('*.tar')} - {name for _, name, _ in reader.samples})
        if empty:
            raise ValueError(f'{path} has tar files without images: {listed(empty, 8)}')
        # timm's order is the file system's, where images of several tar files have the same name
        order = sorted(range(len(reader)), key=lambda index: image_name(dataset, index))
        reader.samples, reader.targets = reader.samples[order], reader.targets[order]
    return dataset


def _folder_of(sample: Any) -> str:
    """Return the folder of an image of timm's tar reader, relative to the split; its last part names the class."""
    member, tar, inner = sample
    tars = [os.path.splitext(name)[0] for name in (tar, inner and inner.name) if name]
    parts = (part.lstrip('/') for part in (*tars, os.path.dirname(member.path)))  # names in a tar file may be absolute
    return os.path.normpath(os.path.join(*parts))


def _skip_hidden(path: Path, reader: ReaderImageInTar) -> None:
    """Remove the images that are hidden, or in hidden folders, from the reader."""
    hidden = np.array([any(map(is_hidden, member.path.split('/'))) for member, _, _ in reader.samples])
    if not hidden.any():
        return
    example = image_name(ImageDataset(str(path), reader=reader), int(hidden.argmax()))
    if hidden.all():
        raise ValueError(f'{path} has no images, except hidden ones such as {shown(example)}')
    _logger.info(
        '%s: skipped %d hidden files (names or folders that begin with a dot, __MACOSX), such as %s',
        path, hidden.sum(), shown(example))
    reader.samples, reader.targets = reader.samples[~hidden], reader.targets[~hidden]


def _sort_classes(reader: ReaderImageInTar) -> None:
    """Index the classes that have images, in sorted order.

    timm's indices differ from process to process if names of classes differ by case alone.
    """
    names = {index: name for name, index in reader.class_name_to_idx.items()}
    kept = in_order(names[index] for index in set(reader.targets.tolist()))
    reader.class_name_to_idx = {name: index for index, name in enumerate(kept)}
    reader.class_idx_to_name = dict(enumerate(kept))
    reader.targets = np.array([reader.class_name_to_idx[names[index]] for index in reader.targets.tolist()])


class _TarReader(ReaderImageInTar):
    """timm's tar reader, except that each process opens the files itself.

    DataLoader workers that inherit an open file share one position in the file, and read wrong bytes.
    With timm's reader and 4 workers, 706 of 2400 images were unreadable.
    """
    process = 0

    def __getitem__(self, index: int) -> Any:
        if self.process != os.getpid():
            self._reopen()
            self.process = os.getpid()
        return super().__getitem__(index)

    def __getstate__(self) -> Dict[str, Any]:
        self._reopen()
        return self.__dict__

    def _reopen(self) -> None:
        tars = [self.tar_state] if self.root_is_tar else list(self.tar_state.values())
        for tar in tars:
            for state in (tar, *tar.children.values()):
                state.reset()


def _read_tars(path: Path) -> _TarReader:
    """The list of the images, which timm keeps beside large tar files if it can."""
    is_writable = os.access(path if path.is_dir() else path.parent, os.W_OK)
    try:
        return _TarReader(str(path), cache_tarinfo=None if is_writable else False)
    except _ERRORS as error:
        if path.is_dir():
            for tar in sorted(path.glob('*.tar')):
                _read_tars(tar)  # which of them it is
        is_empty = 'not enough values to unpack' in str(error)  # timm's list of none
        raise ValueError(
            f'{path} ' + ('has no images' if is_empty else f'cannot be opened as a tar file: {_reason(error)}')
        ) from error


def _check_class_folders(path: Path, dataset: Any) -> None:
    """timm makes a class of the images that are in no folder."""
    names = class_names(dataset) or []
    stray = [names.index(name) for name in ('', '.') if name in names]
    if stray:
        reader = dataset.reader
        targets = reader.targets if isinstance(reader, ReaderImageInTar) else [target for _, target in reader.samples]
        index = next(index for index, target in enumerate(targets) if target in stray)
        raise ValueError(f'{path} has images that are in no class folder, such as {shown(image_name(dataset, index))}')


# --- headers ---


def _check_headers(args: Namespace, split: str, dataset: Any) -> None:
    """Log how many images have an EXIF orientation that is ignored, or more than 8 bits per value.

    The headers of at most 64 images, evenly spaced in the data set, are read. Pixels are not decoded. Streams are not
    checked.
    """
    files = getattr(dataset, 'samples', None)  # torchvision's
    if not isinstance(dataset, ImageDataset) and files is None:
        return
    count = len(dataset)
    indices = range(count) if count <= _HEADERS else [index * count // _HEADERS for index in range(_HEADERS)]
    turned, deep = [], []
    for index in indices:
        try:
            with Image.open(dataset.reader[index][0] if files is None else files[index][0]) as image:
                if orientation(image) != 1:
                    turned.append(index)
                if image.mode in DEEP_MODES:
                    deep.append(index)
        except ERRORS as error:  # reported as an unreadable image when it is loaded
            _logger.debug('the header of image %d cannot be read: %s', index, error)
    for found, what in (
        ([] if args.exif_orientation else turned,
         'have an EXIF orientation that is ignored (--exif-orientation applies it)'),
        (deep, 'have 16 or 32 bits per value (black is 0, white is 65535 for integers and 1 for floats)'),
    ):
        if found:
            _logger.info(
                '%s: %d of %d checked images %s, such as %s', _described(args, split), len(found), len(indices), what,
                shown(image_name(dataset, found[0])))


# --- torchvision ---


def _open_torchvision(args: Namespace, name: str, split: str, mode: str) -> Any:
    if name in ('folder', 'image_folder'):
        return _open_torch_folder(str(_find_split(args.data_dir, split)))
    root = args.data_dir
    if root is None:
        raise ValueError(f'--data-dir is needed: the folder of {args.dataset}')
    known = (*SPLIT_SYNONYMS[0], *SPLIT_SYNONYMS[1], 'test')
    if name in _TWO_PARTS and split not in known:
        raise ValueError(f'split of {args.dataset} must be one of {known}, got {split!r}')
    with _download_lock(args, root):
        dataset = _create(args, split, mode, False, root=root, search_split=False)
    if hasattr(dataset, 'loader'):
        dataset.loader = Image.open  # read_image converts the images
    return dataset


def _open_torch_folder(root: str) -> TorchFolder:
    scan = torch_scan(root)
    scan.check_no_empty_folder()
    if not scan.top_level:
        raise ValueError(f'{shown(root)} has no class folders with images')
    _log(scan.notes())
    return TorchFolder(scan, Image.open)


def _download_lock(args: Namespace, root: str) -> AbstractContextManager:
    """The first process of a machine downloads, the others find it there."""
    if not args.dataset_download:
        return nullcontext()
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f'--data-dir {root} cannot be made: {error.strerror}') from error
    return FileLock(Path(root) / '.download.lock')


# --- WebDataset ---


def _open_shards(args: Namespace, split: str, mode: str, is_training: bool) -> Any:
    """timm passes over shards that are missing, with a line in the log."""
    is_remote = '://' in (args.data_dir or '')
    is_pattern = 'tar' in split or '..' in split  # to timm
    if not is_remote:
        root = _root(args.data_dir, f'the folder of the shards of {args.dataset}')
        if not is_pattern:
            _check_info(root, split)
    dataset = _create(args, split, mode, is_training)
    if not dataset.reader.num_samples:
        raise ValueError(f'split {split!r} must say how many images it has: {split}|IMAGES')
    names = dataset.reader.split_info.filenames
    missing = [] if is_remote else [name for name in names if '://' not in name and not (root / name).is_file()]
    if missing:
        raise ValueError(
            f'{_described(args, split)} lacks {len(missing)} of {len(names)} shards: {sorted(missing)[:4]}')
    return dataset


def _check_info(root: Path, split: str) -> None:
    path = next((root / name for name in ('_info.json', 'info.json') if (root / name).is_file()), None)
    if path is None:
        raise ValueError(
            f'--data-dir {root}: expected _info.json, or a split such as {split}-{{0000..0003}}.tar|IMAGES, '
            f'found {_listed(root)}')
    try:
        splits = dict(json.loads(path.read_text())['splits'])
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f'{path} has no readable splits: {type(error).__name__} {error}') from error
    if split not in splits:
        raise ValueError(f'{path}: expected a split named {split}, found {sorted(splits)[:8]}')


# --- Hugging Face ---


def _open_hugging_face(args: Namespace, prefix: str, split: str, mode: str, is_training: bool) -> Any:
    _quieten()
    if prefix == 'hfids':
        _check_stream(args, split)
    dataset = _create(args, split, mode, is_training)
    if prefix == 'hfds':
        reader = dataset.reader
        # timm adds a column of images where there is none
        images = reader.dataset.data.column(reader.image_key)
        found = set(reader.dataset.column_names) - ({reader.image_key} if images.null_count == len(images) else set())
        _check_columns(args, found)
        _check_labels(args, split, dataset, is_training)
    return dataset


def _quieten() -> None:
    """Hugging Face's progress bars are for terminals, as ours are; its log goes where ours does."""
    import datasets
    logging.getLogger('datasets').handlers.clear()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _check_stream(args: Namespace, split: str) -> None:
    """What is known of a stream before it is opened; timm would ask for its length."""
    import datasets
    _, name = _parse(args.dataset)
    try:
        builder = datasets.load_dataset_builder(name, cache_dir=args.data_dir)
    except _errors(args) as error:
        raise ValueError(f'{_described(args, split)} cannot be opened: {_reason(error)}') from error
    splits = list(builder.info.splits or builder.config.data_files or ())
    if splits and split not in splits:
        raise ValueError(f'split of {args.dataset} must be one of {splits}, got {split!r}')
    if builder.info.features is not None:
        _check_columns(args, builder.info.features)
    if not builder.info.splits and not args.dataset_download:
        raise ValueError(
            f'{args.dataset} does not say how many images it has, for the schedule: --dataset-download finds out')


def _check_columns(args: Namespace, found: Iterable[str]) -> None:
    missing = [name for name in ('image', 'label') if name not in found]
    if missing:
        raise ValueError(f'{args.dataset}: expected columns image and label, found {sorted(found)}')


def _check_labels(args: Namespace, split: str, dataset: Any, is_training: bool) -> None:
    """Check that labels are class indices, and that the split has images of each class of the data set."""
    reader, names = dataset.reader, class_names(dataset)
    kind = getattr(reader.dataset.features[reader.label_key], 'dtype', 'a list')
    if 'int' not in kind:
        raise ValueError(f'labels of {_described(args, split)} must be whole numbers, got {kind}')
    if names is None:
        return
    labels = set(reader.dataset.unique(reader.label_key))
    outside = sorted(labels - set(range(len(names))), key=repr)
    if outside:
        raise ValueError(f'labels of {_described(args, split)} must be below {len(names)}, got {outside[:4]}')
    absent = [name for label, name in enumerate(names) if label not in labels]
    missing = f'{_described(args, split)} has no image of {len(absent)} of {len(names)} classes: {absent[:8]}'
    if absent and reader.dataset.info.builder_name == 'imagefolder' and '[' not in split:
        raise ValueError(missing)  # the splits' folders differ
    if absent and is_training:
        _logger.info('%s', missing)
