"""Scan class folders for images, and read the images that were found."""
import os
import stat
from dataclasses import dataclass, field
from typing import Any, Callable, Collection, Dict, FrozenSet, Iterable, List, Set, Tuple

from timm.data import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from .class_names import in_order, listed, natural_key, quoted, shown

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
                + (f'; there are {_counted(others, "images in other formats")}' if others else ''))

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


def nesting_notes(root: str, folders: Iterable[str]) -> List[str]:
    """Return a line if folders that are not directly in the root name classes, otherwise no line.

    Args:
        root: Path to the split, for the line.
        folders: Paths to the folders of images, relative to the root; the last part names the class.
    """
    folders = set(folders)
    deep = [folder for folder in folders if os.sep in folder]
    if not deep:
        return []
    classes = {os.path.basename(folder) for folder in folders}
    return [
        f'{shown(root)}: classes are named by the innermost folders; {len(folders)} folders give {len(classes)} '
        f'classes {listed(classes)}, for example {shown(min(deep))} gives {quoted(os.path.basename(min(deep)))}']


class FolderReader(ReaderImageFolder):
    """timm's reader of class folders, with the images of a :class:`Scan`.

    As in timm, the innermost folders name the classes. The order of the classes depends on the names alone.

    Args:
        scan: Images of the split.
    """

    def __init__(self, scan: Scan) -> None:
        # timm's own __init__ would walk over the folders again
        self.root = scan.root
        labels = {
            folder: '' if folder == scan.root else os.path.basename(folder)
            for folder in {folder for _, folder in scan.images}}
        self.class_to_idx: Dict[str, int] = {name: index for index, name in enumerate(in_order(labels.values()))}
        images = sorted(scan.images, key=lambda image: natural_key(image[0]))
        self.samples = [(path, self.class_to_idx[labels[folder]]) for path, folder in images]


def timm_scan(root: str) -> Scan:
    """Scan a folder of class folders for images in the formats that timm reads."""
    return Scan(root, get_img_extensions(as_set=True)).walk()


def torch_scan(root: str) -> Scan:
    """Scan a folder of class folders for images in the formats that torchvision reads."""
    return Scan(root, set(IMG_EXTENSIONS)).walk()


class TorchFolder(ImageFolder):
    """torchvision's data set of class folders, with the images of a :class:`Scan`.

    As in torchvision, the classes are the folders directly in the root, sorted by name.

    Args:
        scan: Images of the split.
        loader: Function that reads an image file.
    """

    def __init__(self, scan: Scan, loader: Callable[[str], Any]) -> None:
        self.scan = scan
        super().__init__(scan.root, loader=loader)
        del self.scan  # samples has the same paths, and is sent to each DataLoader worker that is spawned

    def find_classes(self, directory: Any) -> Tuple[List[str], Dict[str, int]]:
        """Return the names of the class folders, and their indices by name."""
        names = sorted(self.scan.top_level)
        return names, {name: index for index, name in enumerate(names)}

    def make_dataset(self, directory: Any, class_to_idx: Dict[str, int], *_: Any, **__: Any) -> List[Tuple[str, int]]:
        """Return the path and the class index of each image."""
        images = self.scan.images
        named = [(self.scan.first_part(path), folder, path) for path, folder in images if folder != self.scan.root]
        return [(path, class_to_idx[name]) for name, _, path in sorted(named)]
