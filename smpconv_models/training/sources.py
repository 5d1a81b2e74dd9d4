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
from typing import Any, Callable, Dict, Iterable, Optional, Set, Tuple, Type

import numpy as np
from filelock import FileLock
from PIL import Image
from timm.data import ImageDataset, create_dataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from smpconv_models import checkpoint

from . import sequence_data
from .data import SPLIT_SYNONYMS, Digits, class_names
from .folders import FolderReader, TorchFolder, is_hidden, nesting_note, timm_scan
from .images import DEEP_MODES, ReadImage, orientation
from .names import in_order, listed, shown
from .samples import image_name
from .unreadable import ERRORS

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


# Image files whose headers are looked at before the first step.
_LOOKED_AT = 64

Tell = Callable[[str], None]


def _warn(line: str) -> None:
    _logger.warning('%s', line)


def _keep_quiet(line: str) -> None:
    """Log nothing: another rank does."""


def open_dataset(args: Namespace, split: str, in_chans: int, is_training: bool, is_first: bool = True) -> Any:
    """Open the data set that the arguments name: 'digits', ``seq/NAME``, or any of ``timm.data.create_dataset``.

    Without a name ``--data-dir`` holds, for each split, a folder of class folders (``train/CLASS/IMAGE``), a folder of
    tar files of a class each (``train/CLASS.tar``), or a tar file of either (``train.tar``).

    Args:
        args: Names of the data set and its folder, and how images are read.
        split: Name of the split.
        in_chans: Channels of the images, 1 or 3.
        is_training: Whether to train on the split.
        is_first: Whether to log what was passed over, or may be other than expected; one rank does.

    Raises:
        ValueError: There is no such data set, or no such split of it, or what is wrong with it shows without reading
            the images.
    """
    if not split:
        raise ValueError('the name of a split must not be empty')
    if sequence_data.are_meant(args):
        return sequence_data.open_dataset(args, split)
    if in_chans not in (1, 3):
        raise ValueError(f'images are read with 1 channel (gray) or 3 (RGB), got in_chans {in_chans}')
    mode = 'L' if in_chans == 1 else 'RGB'
    if args.dataset == 'digits':
        return Digits(split, mode)
    tell = _warn if is_first else _keep_quiet
    dataset = _open_images(args, split, mode, is_training, tell)
    dataset.read_image = ReadImage(mode, bool(args.exif_orientation))
    if is_first:
        _look_at_headers(args, split, dataset, tell)
    return dataset


def _open_images(args: Namespace, split: str, mode: str, is_training: bool, tell: Tell) -> Any:
    if not args.dataset:
        return _open_folder(args, split, mode, tell)
    prefix, name = _parse(args.dataset)
    if prefix == 'torch':
        return _open_torchvision(args, name.lower(), split, mode, tell)
    if prefix == 'wds':
        return _open_shards(args, split, mode, is_training)
    if prefix in ('hfds', 'hfids'):
        return _open_hugging_face(args, prefix, split, mode, is_training, tell)
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
    return checkpoint.first_line(error).replace('download=True', '--dataset-download')


def _described(args: Namespace, split: str) -> str:
    place = f' in {args.data_dir}' if args.data_dir else ''
    return f'split {split!r} of {args.dataset or "the images"}{place}'


# --- folders and tar files ---


def _open_folder(args: Namespace, split: str, mode: str, tell: Tell) -> ImageDataset:
    path = _find_split(args.data_dir, split)
    if path.is_file() or _holds_tars(path):
        dataset = _open_tars(path, mode, tell)
    else:
        dataset = _open_class_folders(path, mode, tell)
    _check_class_folders(path, dataset)
    return dataset


def _open_class_folders(path: Path, mode: str, tell: Tell) -> ImageDataset:
    scan = timm_scan(str(path))
    scan.check_no_empty_folder()
    if not scan.images:
        raise ValueError(f'{shown(str(path))} has no images ({", ".join(sorted(scan.extensions))})')
    for line in scan.notes():
        tell(line)
    _tell_nesting(path, {os.path.relpath(folder, path) for folder in {folder for _, folder in scan.images}}, tell)
    return ImageDataset(str(path), reader=FolderReader(scan), input_img_mode=mode)


def _tell_nesting(path: Path, folders: Iterable[str], tell: Tell) -> None:
    line = nesting_note(str(path), folders)
    if line is not None:
        tell(line)


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
    if data_dir is None:
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


def _open_tars(path: Path, mode: str, tell: Tell) -> ImageDataset:
    reader = _read_tars(path)
    _pass_over_hidden(path, reader, tell)
    _put_in_order(reader)
    folders = {_folder_of(sample) for sample in reader.samples}
    common = os.path.commonpath(folders) if len(folders) > 1 else ''  # of a whole folder that was packed
    _tell_nesting(path, {os.path.relpath(folder, common) if common else folder for folder in folders}, tell)
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
    """Return the folder of an image of timm's tar reader, whose last part is the class, relative to the split."""
    member, tar, inner = sample
    parts = [os.path.splitext(name)[0] for name in (tar, inner and inner.name) if name]
    return os.path.normpath(os.path.join(*parts, os.path.dirname(member.path.lstrip('/'))))


def _pass_over_hidden(path: Path, reader: ReaderImageInTar, tell: Tell) -> None:
    """Remove what a file manager or an editor has put beside the images, as in folders."""
    hidden = np.array([any(map(is_hidden, member.path.split('/'))) for member, _, _ in reader.samples])
    if not hidden.any():
        return
    example = image_name(ImageDataset(str(path), reader=reader), int(hidden.argmax()))
    if hidden.all():
        raise ValueError(f'{path} has no images, except hidden ones such as {shown(example)}')
    tell(
        f'{path}: passed over {hidden.sum()} hidden files (names or folders that begin with a dot, __MACOSX), such '
        f'as {shown(example)}')
    reader.samples, reader.targets = reader.samples[~hidden], reader.targets[~hidden]


def _put_in_order(reader: ReaderImageInTar) -> None:
    """Give the classes that have images their indices; those of timm depend on the process if names differ by case."""
    names = {index: name for name, index in reader.class_name_to_idx.items()}
    kept = in_order(names[index] for index in set(reader.targets.tolist()))
    reader.class_name_to_idx = {name: index for index, name in enumerate(kept)}
    reader.class_idx_to_name = dict(enumerate(kept))
    reader.targets = np.array([reader.class_name_to_idx[names[index]] for index in reader.targets.tolist()])


class _TarReader(ReaderImageInTar):
    """timm's tar reader, whose open files stay in one process.

    A DataLoader worker that inherits an open file shares its position with all others, and reads other bytes than those
    of its image. Of 2400 images in 4 workers 706 were unreadable.
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


def _look_at_headers(args: Namespace, split: str, dataset: Any, tell: Tell) -> None:
    """Report what the headers of some images, evenly over all, say of their orientation and depth.

    Pixels are not decoded. Streams are not looked at.
    """
    files = getattr(dataset, 'samples', None)  # torchvision's
    if not isinstance(dataset, ImageDataset) and files is None:
        return
    count = len(dataset)
    indices = range(count) if count <= _LOOKED_AT else [index * count // _LOOKED_AT for index in range(_LOOKED_AT)]
    turned, deep = [], []
    for index in indices:
        try:
            with Image.open(dataset.reader[index][0] if files is None else files[index][0]) as image:
                if orientation(image) != 1:
                    turned.append(index)
                if image.mode in DEEP_MODES:
                    deep.append(index)
        except ERRORS as error:  # it is counted and named in its turn
            _logger.debug('the header of image %d cannot be read: %s', index, error)
    told = f'{_described(args, split)}: %d of {len(indices)} images looked at %s, such as %s'
    if turned and not args.exif_orientation:
        what = 'have an EXIF orientation that is ignored (--exif-orientation turns them)'
        tell(told % (len(turned), what, shown(image_name(dataset, turned[0]))))
    if deep:
        what = 'have 16 or 32 bits (integers are read as 0 black to 65535 white, floats as 0. to 1.)'
        tell(told % (len(deep), what, shown(image_name(dataset, deep[0]))))


# --- torchvision ---


def _open_torchvision(args: Namespace, name: str, split: str, mode: str, tell: Tell) -> Any:
    if name in ('folder', 'image_folder'):
        return _open_torch_folder(str(_find_split(args.data_dir, split)), tell)
    root = args.data_dir
    if root is None:
        raise ValueError(f'--data-dir is needed: the folder of {args.dataset}')
    known = (*SPLIT_SYNONYMS[0], *SPLIT_SYNONYMS[1], 'test')
    if name in _TWO_PARTS and split not in known:
        raise ValueError(f'split of {args.dataset} must be one of {known}, got {split!r}')
    with _download_lock(args, root):
        dataset = _create(args, split, mode, False, root=root, search_split=False)
    if hasattr(dataset, 'loader'):
        dataset.loader = Image.open  # images are converted by read_image
    return dataset


def _open_torch_folder(root: str, tell: Tell) -> TorchFolder:
    dataset = TorchFolder(root, Image.open)
    dataset.scan.check_no_empty_folder()
    if not dataset.samples:
        raise ValueError(f'{shown(root)} has no class folders with images')
    for line in dataset.scan.notes():
        tell(line)
    del dataset.scan  # DataLoader workers would get its list of images besides that of the data set
    return dataset


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


def _open_hugging_face(args: Namespace, prefix: str, split: str, mode: str, is_training: bool, tell: Tell) -> Any:
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
        _check_labels(args, split, dataset, is_training, tell)
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


def _check_labels(args: Namespace, split: str, dataset: Any, is_training: bool, tell: Tell) -> None:
    """The classes are those of all splits together: whether this one has images of each is seen from its labels."""
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
    told = f'{_described(args, split)} has no image of {len(absent)} of {len(names)} classes: {absent[:8]}'
    if absent and reader.dataset.info.builder_name == 'imagefolder' and '[' not in split:
        raise ValueError(told)  # the splits' folders differ
    if absent and is_training:
        tell(told)
