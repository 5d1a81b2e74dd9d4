"""Class folders: which files are images, and what is passed over."""
import os
import stat
from dataclasses import dataclass, field
from typing import Any, Callable, Collection, Dict, FrozenSet, Iterable, List, Optional, Set, Tuple

from timm.data import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from .names import in_order, listed, natural_key, quoted, shown

# Formats that Pillow may read, of which a reader takes some.
_IMAGE_EXTENSIONS = {
    '.avif', '.bmp', '.gif', '.heic', '.heif', '.jfif', '.jp2', '.jpe', '.jpeg', '.jpg', '.jxl', '.pgm', '.png', '.ppm',
    '.tif', '.tiff', '.webp'}


@dataclass
class Scan:
    """Result of one walk over a folder of class folders.

    Attributes:
        root: Path to the folder.
        extensions: Lower-case endings of the images that are read.
        images: Path and folder of each image, in no particular order.
        top_level: Names of the folders in the root.
        hidden: Paths to images, and to folders, whose names begin with a dot; folders called ``__MACOSX``.
        special: Paths to pipes, sockets and devices whose names end like those of images.
        other: Paths to images in formats that are not read.
        loops: Paths to links and mounts that lead back to a folder they are in.
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
        """Look at every entry once.

        Raises:
            ValueError: If a folder cannot be read.
        """
        waiting: List[Tuple[str, FrozenSet[Tuple[int, int]]]] = [(self.root, frozenset())]
        try:
            while waiting:
                folder, above = waiting.pop()
                status = os.stat(folder)
                identity = (status.st_dev, status.st_ino)
                if identity in above:
                    self.loops.append(folder)
                    continue
                if len(above) == 1:
                    self.top_level.add(os.path.basename(folder))
                above |= {identity}
                waiting.extend((inner, above) for inner in self._read(folder))
        except OSError as error:
            raise ValueError(f'{shown(str(error.filename))} cannot be read: {error.strerror}') from error
        return self

    def _read(self, folder: str) -> List[str]:
        """Sort the entries of one folder by kind; return the folders among them."""
        inner = []
        with os.scandir(folder) as entries:
            for entry in entries:
                is_link = entry.is_symlink()
                extension = os.path.splitext(entry.name)[1].lower()
                # os.path's function is for links, as the entry's own raises for a link to itself
                if os.path.isdir(entry.path) if is_link else entry.is_dir():
                    (self.hidden if is_hidden(entry.name) else inner).append(entry.path)
                elif extension in self.extensions:
                    if is_hidden(entry.name):
                        self.hidden.append(entry.path)
                    elif _is_special(entry, is_link):
                        self.special.append(entry.path)
                    else:
                        self.images.append((entry.path, folder))
                elif extension in _IMAGE_EXTENSIONS and not is_hidden(entry.name):
                    self.other.append(entry.path)
        return inner

    def check_no_empty_folder(self) -> None:
        """Raise ValueError if a folder in the root has no image: the model would have one output less."""
        empty = self.top_level - {self.first_part(folder) for folder in {folder for _, folder in self.images}}
        if empty:
            others = [path for path in self.other if self.first_part(path) in empty]
            raise ValueError(
                f'{shown(self.root)} has folders without images ({_joined(self.extensions)}): {listed(empty, 8)}'
                + (f'; there are {_counted(others, "images in other formats")}' if others else ''))

    def first_part(self, path: str) -> str:
        """Return the name of the entry of the root that a path is in."""
        return path[len(os.path.join(self.root, '')):].split(os.sep, 1)[0]

    def notes(self) -> List[str]:
        """Return a line for each kind of entry that was passed over."""
        passed_over = (
            (self.hidden, 'hidden files and folders (names that begin with a dot, __MACOSX)'),
            (self.special, 'files that are neither regular files nor links to one'),
            (self.loops, 'links that lead back to a folder they are in'),
            (self.other, f'images in formats that are not read; {_joined(self.extensions)} are: convert the others'),
        )
        return [f'{shown(self.root)}: passed over {_counted(paths, what)}' for paths, what in passed_over if paths]


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is one that file managers and editors leave beside the images."""
    return name == '__MACOSX' or (name.startswith('.') and name not in ('.', '..'))


def _is_special(entry: Any, is_link: bool) -> bool:
    """Return whether a file is a pipe, a socket or a device, whose reader may wait forever.

    A link that leads nowhere is an image that cannot be read, and is reported as such in its turn.
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


def nesting_note(root: str, folders: Iterable[str]) -> Optional[str]:
    """Return a line if classes are not the folders in the root, but folders further down.

    Args:
        root: Path to the split, for the line.
        folders: Paths to the folders of images, relative to the root; the last part is the class.
    """
    folders = set(folders)
    deep = [folder for folder in folders if os.sep in folder]
    if not deep:
        return None
    classes = {os.path.basename(folder) for folder in folders}
    return (
        f'{shown(root)}: classes are named by the innermost folders, {len(folders)} folders make {len(classes)} '
        f'classes {listed(classes)}: {shown(min(deep))} is of class {quoted(os.path.basename(min(deep)))}')


class FolderReader(ReaderImageFolder):
    """timm's reader of class folders, over the images of a :class:`Scan`.

    The classes are the names of the innermost folders, as timm has it, and their order is a function of the names.

    Args:
        scan: Images of the split.
    """

    def __init__(self, scan: Scan) -> None:
        # without timm's own __init__, which walks again
        self.root = scan.root
        labels = {
            folder: '' if folder == scan.root else os.path.basename(folder)
            for folder in {folder for _, folder in scan.images}}
        self.class_to_idx: Dict[str, int] = {name: index for index, name in enumerate(in_order(labels.values()))}
        images = sorted(scan.images, key=lambda image: natural_key(image[0]))
        self.samples = [(path, self.class_to_idx[labels[folder]]) for path, folder in images]


def timm_scan(root: str) -> Scan:
    """Return the images of a folder of class folders, in the formats that timm reads."""
    return Scan(root, get_img_extensions(as_set=True)).walk()


class TorchFolder(ImageFolder):
    """torchvision's data set of class folders, over the images of a :class:`Scan`.

    The classes are the folders in the root, sorted by name, as torchvision has it.

    Args:
        root: Path to the split.
        loader: Function that reads an image file.

    Attributes:
        scan: Images of the split.
    """

    def __init__(self, root: str, loader: Callable[[str], Any]) -> None:
        self.scan = Scan(root, set(IMG_EXTENSIONS)).walk()
        super().__init__(root, loader=loader)

    def find_classes(self, directory: Any) -> Tuple[List[str], Dict[str, int]]:
        """Return the names of the class folders, and their indices."""
        names = sorted(self.scan.top_level)
        return names, {name: index for index, name in enumerate(names)}

    def make_dataset(self, directory: Any, class_to_idx: Dict[str, int], *_: Any, **__: Any) -> List[Tuple[str, int]]:
        """Return path and class index of each image."""
        images = self.scan.images
        named = [(self.scan.first_part(path), folder, path) for path, folder in images if folder != self.scan.root]
        return [(path, class_to_idx[name]) for name, _, path in sorted(named)]
