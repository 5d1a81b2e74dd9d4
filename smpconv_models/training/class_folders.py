"""Sources of images in class folders and in tar files, and the order of class names."""
import copy
import hashlib
import logging
import os
import re
import stat
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Collection, Dict, FrozenSet, Iterable, List, Set, Tuple, Type

import numpy as np
from PIL import Image
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from smpconv_models import checkpoint
from smpconv_models.utils.errors import first_line

from . import rng

_logger = logging.getLogger(__name__)

# Errors of timm, and of the packages that timm reads with, if data is missing or damaged.
READER_ERRORS: Tuple[Type[Exception], ...] = (
    AssertionError, AttributeError, EOFError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
    UnpicklingError, tarfile.TarError)

# Extensions of image files. timm and torchvision read some of them each, and skip the others.
_IMAGE_EXTENSIONS = {
    '.avif', '.bmp', '.gif', '.heic', '.heif', '.jfif', '.jp2', '.jpe', '.jpeg', '.jpg', '.jxl', '.pgm', '.png', '.ppm',
    '.tif', '.tiff', '.webp'}


@dataclass
class Scan:
    """Result of one walk over a folder of class folders.

    Attributes:
        root: Path to the folder.
        extensions: Lower-case extensions of the files that are read as images.
        images: Path and folder of each image, unsorted.
        top_level: Names of the folders directly in the root.
        hidden: Paths to hidden images and folders, by :func:`is_hidden`.
        special: Paths to pipes, sockets and devices that have the extension of an image.
        other: Paths to images in formats that are not read.
        loops: Paths to links, junctions and mounts that lead back to a parent folder.
    """
    root: str
    extensions: Collection[str]
    images: List[Tuple[str, str]] = field(default_factory=list)
    top_level: Set[str] = field(default_factory=set)
    hidden: List[str] = field(default_factory=list)
    special: List[str] = field(default_factory=list)
    other: List[str] = field(default_factory=list)
    loops: List[str] = field(default_factory=list)

    def walk(self) -> 'Scan':
        """Collect the entries of all folders, and return this scan.

        Raises:
            ValueError: If a folder cannot be read.
        """
        waiting: List[Tuple[str, FrozenSet[Tuple[int, int]]]] = [(self.root, frozenset())]
        try:
            while waiting:
                folder, parents = waiting.pop()
                status = os.stat(folder)
                identity = (status.st_dev, status.st_ino)
                if identity in parents:
                    self.loops.append(folder)
                    continue
                if len(parents) == 1:
                    self.top_level.add(os.path.basename(folder))
                parents |= {identity}
                waiting.extend((path, parents) for path in self._read(folder))
        except OSError as error:
            raise ValueError(f'{shown(str(error.filename))} cannot be read: {error.strerror}') from error
        return self

    def _read(self, folder: str) -> List[str]:
        """Sort the entries of one folder by kind, and return the paths to its subfolders."""
        subfolders: List[str] = []
        with os.scandir(folder) as entries:
            for entry in entries:
                is_link = entry.is_symlink()
                extension = os.path.splitext(entry.name)[1].lower()
                # entry.is_dir() raises for a link to itself, os.path.isdir does not
                if os.path.isdir(entry.path) if is_link else entry.is_dir():
                    (self.hidden if is_hidden(entry.name) else subfolders).append(entry.path)
                elif extension in self.extensions:
                    if is_hidden(entry.name):
                        self.hidden.append(entry.path)
                    elif _is_special(entry, is_link):
                        self.special.append(entry.path)
                    else:
                        self.images.append((entry.path, folder))
                elif extension in _IMAGE_EXTENSIONS and not is_hidden(entry.name):
                    self.other.append(entry.path)
        return subfolders

    def check_no_empty_folder(self) -> None:
        """Raise ValueError if a folder in the root has no image, as the model would lack an output for its class."""
        empty = self.top_level - {self.first_part(folder) for folder in {folder for _, folder in self.images}}
        if empty:
            others = [path for path in self.other if self.first_part(path) in empty]
            raise ValueError(
                f'{shown(self.root)} has folders without images ({_joined(self.extensions)}): {listed(empty, 8)}'
                + (f'; there are {_counted(others, "images in other formats")}' if others else '')
                + '; add images, or move the folders away')

    def first_part(self, path: str) -> str:
        """Return the name of the entry in the root that contains a path."""
        return path[len(os.path.join(self.root, '')):].split(os.sep, 1)[0]

    def notes(self) -> List[str]:
        """Return a line for each kind of entry that was skipped."""
        skipped = (
            (self.hidden, 'hidden files and folders (names that begin with a dot, __MACOSX)'),
            (self.special, 'files that are neither regular files nor links to one'),
            (self.loops, 'links, junctions or mounts that lead back to a parent folder'),
            (self.other, f'images in other formats than {_joined(self.extensions)} (to use them, convert them)'),
        )
        return [f'{shown(self.root)}: skipped {_counted(paths, what)}' for paths, what in skipped if paths]


def is_hidden(name: str) -> bool:
    """Return whether a name begins with a dot or is ``__MACOSX``, as file managers and editors name their own files."""
    return name == '__MACOSX' or (name.startswith('.') and name not in ('.', '..'))


def _is_special(entry: Any, is_link: bool) -> bool:
    """Return whether a file is a pipe, a socket or a device, which may block its reader forever.

    A broken link is not special; the image is reported as unreadable when it is loaded.
    """
    if not is_link:
        return not entry.is_file()
    try:
        return not stat.S_ISREG(os.stat(entry.path).st_mode)
    except OSError:
        return False


def _joined(extensions: Collection[str]) -> str:
    return ', '.join(sorted(extensions))


def _counted(paths: List[str], what: str) -> str:
    return f'{len(paths)} {what}, such as {shown(min(paths))}'


def log_nesting(root: str, folders: Iterable[str]) -> None:
    """Log a line if folders that are not directly in the root name classes.

    Args:
        root: Path to the split, for the line.
        folders: Paths to the folders of images, relative to the root; the last part names the class.
    """
    folders = set(folders)
    deep = [folder for folder in folders if os.sep in folder]
    if deep:
        classes = {os.path.basename(folder) for folder in folders}
        _logger.info(
            '%s: classes are named by the innermost folders; %d folders give %d classes %s, for example %s gives %s',
            shown(root), len(folders), len(classes), listed(classes), shown(min(deep)),
            quoted(os.path.basename(min(deep))))


class ClassFolders:
    """Source of the images of a :class:`Scan`, sorted by path.

    The order of the classes depends on their names alone.

    Args:
        scan: Images of the split.
        by_top_level: Whether the folders directly in the root name the classes, in the order of their code points, as
            in torchvision. Otherwise the innermost folders do, in the order of :func:`natural_key`, as in timm.
    """

    def __init__(self, scan: Scan, by_top_level: bool = False) -> None:
        self.root = scan.root
        if by_top_level:
            self.classes = sorted(scan.top_level)
            named = sorted(
                (scan.first_part(path), folder, path) for path, folder in scan.images if folder != scan.root)
            images = [(path, name) for name, _, path in named]
        else:
            labels = {
                folder: '' if folder == scan.root else os.path.basename(folder)
                for folder in {folder for _, folder in scan.images}}
            self.classes = in_order(labels.values())
            images = [(path, labels[folder]) for path, folder in sorted(
                scan.images, key=lambda image: natural_key(image[0]))]
        index = {name: number for number, name in enumerate(self.classes)}
        self.samples = [(path, index[name]) for path, name in images]

    @property
    def targets(self) -> List[int]:
        """Class indices of all images."""
        return [target for _, target in self.samples]

    def split(self, fraction: float, seed: int) -> Tuple['ClassFolders', 'ClassFolders']:
        """Divide the images of each class at random into training and validation images.

        The path of an image below the root decides, so that the split stays if the root is moved, and nearly stays if
        images are added.

        Args:
            fraction: Fraction of each class that is for validation, rounded, at least one image.
            seed: Seed of the split.

        Raises:
            ValueError: If a class has a single image.
        """
        members: List[List[Tuple[str, int]]] = [[] for _ in self.classes]
        for path, target in self.samples:
            members[target].append((path, target))
        single = [name for name, samples in zip(self.classes, members) if len(samples) == 1]
        if single:
            raise ValueError(
                f'classes of a single image cannot be split: {listed(single, 8)} in {shown(self.root)}; add images, or '
                'move their folders away')
        validation: Set[str] = set()
        for samples in members:
            samples.sort(key=lambda sample: rng.derive_seed(seed, self._name_below_root(sample[0])))
            count = min(max(round(fraction * len(samples)), 1), len(samples) - 1)
            validation.update(path for path, _ in samples[:count])
        parts = copy.copy(self), copy.copy(self)
        for is_validation, part in enumerate(parts):
            part.samples = [sample for sample in self.samples if (sample[0] in validation) == bool(is_validation)]
        return parts

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tuple[Image.Image, int]:
        path, target = self.samples[index]
        return Image.open(path), target

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return self.samples[index][0]

    def digest(self) -> str:
        """Return a hash of the paths below the root, which tells whether images were added, removed or renamed."""
        names = sorted(self._name_below_root(path) for path, _ in self.samples)
        return hashlib.sha256('\n'.join(names).encode(errors='surrogateescape')).hexdigest()

    def _name_below_root(self, path: str) -> str:
        return Path(path).relative_to(self.root).as_posix()


# --- tar files ---


class ClassTars(ReaderImageInTar):
    """Source of the images in a tar file of class folders, or in a folder with a tar file for each class.

    Differs from timm's reader: each process opens the files itself, hidden images are skipped, and the order of images
    and classes depends on their names alone.

    DataLoader workers that inherit an open file share one position in the file, and read wrong bytes.
    With timm's reader and 4 workers, 706 of 2400 images were unreadable.

    Args:
        path: Path to the tar file or the folder.

    Raises:
        ValueError: If there are no images, or a file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._process = 0
        is_writable = os.access(path if path.is_dir() else path.parent, os.W_OK)
        try:
            super().__init__(str(path), cache_tarinfo=None if is_writable else False)  # None: beside large tar files
        except READER_ERRORS as error:
            if path.is_dir():
                for tar in sorted(path.glob('*.tar')):
                    ClassTars(tar)  # raises the error of the damaged file
            is_empty = isinstance(error, ValueError)  # of unpacking nothing; tar files raise other errors
            raise ValueError(
                f'{path} has no images, or a damaged cache of their names' if is_empty else
                f'{path} cannot be opened as a tar file: {first_line(error)}') from error
        self._skip_hidden()
        self._sort_classes()
        folders = {self._folder(sample) for sample in self.samples}
        common = os.path.commonpath(folders) if len(folders) > 1 else ''  # of a whole folder that was packed
        log_nesting(str(path), {os.path.relpath(folder, common) if common else folder for folder in folders})
        if path.is_dir():
            empty = {tar.name for tar in path.glob('*.tar')} - {name for _, name, _ in self.samples}
            if empty:
                raise ValueError(f'{path} has tar files without images: {listed(empty, 8)}')
            # timm's order is the file system's, where images of several tar files have the same name
            self._select(sorted(range(len(self)), key=self.name))

    def name(self, index: int) -> str:
        """Return the path of an image, through its tar files."""
        member, tar, inner = self.samples[index]
        names = (tar, inner and inner.name, member.name)
        return os.path.join(self.root, *(name.lstrip('/') for name in names if name))

    def __getitem__(self, index: int) -> Tuple[Image.Image, int]:
        if self._process != os.getpid():
            self._reset()
            self._process = os.getpid()
        file, target = super().__getitem__(index)
        return Image.open(file), int(target)

    def __getstate__(self) -> Dict[str, Any]:
        self._reset()
        return self.__dict__

    def _reset(self) -> None:
        """Forget the open files."""
        tars = [self.tar_state] if self.root_is_tar else list(self.tar_state.values())
        for tar in tars:
            for state in (tar, *tar.children.values()):
                state.reset()

    def _select(self, indices: Any) -> None:
        self.samples, self.targets = self.samples[indices], self.targets[indices]

    def _skip_hidden(self) -> None:
        hidden = np.array([any(map(is_hidden, member.path.split('/'))) for member, _, _ in self.samples])
        if hidden.any():
            example = shown(self.name(int(hidden.argmax())))
            if hidden.all():
                raise ValueError(f'{self.root} has no images, except hidden ones such as {example}')
            _logger.info(
                '%s: skipped %d hidden files (names or folders that begin with a dot, __MACOSX), such as %s',
                self.root, hidden.sum(), example)
            self._select(~hidden)

    def _sort_classes(self) -> None:
        """Index the classes that have images, in sorted order.

        timm's indices differ from process to process if names of classes differ by case alone.
        """
        names = {index: name for name, index in self.class_name_to_idx.items()}
        self.classes = in_order(names[index] for index in set(self.targets.tolist()))
        order = {name: index for index, name in enumerate(self.classes)}
        self.targets = np.array([order[names[index]] for index in self.targets.tolist()])

    @staticmethod
    def _folder(sample: Any) -> str:
        """Return the folder of an image, relative to the split; its last part names the class."""
        member, tar, inner = sample
        tars = [os.path.splitext(name)[0] for name in (tar, inner and inner.name) if name]
        parts = (part.lstrip('/') for part in (*tars, os.path.dirname(member.path)))  # names may be absolute
        return os.path.normpath(os.path.join(*parts))


# --- order of class names, and names in messages ---


def natural_key(name: str) -> Tuple[List[Any], str]:
    """Return a key that sorts as timm's ``natural_key``, with ties broken by the name itself.

    timm's key is the same for ``a`` and ``A``, and for ``1`` and ``01``. Sorting a set by timm's key alone leaves such
    names in an order that differs from process to process. timm's key also fails for names such as ``1²2``.
    """
    parts = re.split(r'(\d+)', name.lower())  # text and digits alternate
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def in_order(names: Iterable[str]) -> List[str]:
    """Return the distinct names, sorted by :func:`natural_key`."""
    return sorted(set(names), key=natural_key)


def shown(name: str) -> str:
    """Return a name for messages, not shortened, and escaped so that no two names look alike."""
    return checkpoint.printable(name, limit=None)


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Return the first ``limit`` names as a sorted list for messages."""
    return f'[{", ".join(quoted(name) for name in in_order(names)[:limit])}]'


def quoted(name: str) -> str:
    """Return a name for messages, as :func:`shown` does, in quotes."""
    quote = '"' if "'" in name else "'"
    return f'{quote}{shown(name)}{quote}'
