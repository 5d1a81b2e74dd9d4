#!/usr/bin/env python3
"""Generate a small detection data set in COCO format: handwritten digits on textured backgrounds.

    python examples/digit_scenes.py FOLDER [--train 800 --val 200 --size 128]

The digits are scikit-learn's scans of 8x8 pixels, enlarged and drawn on clouds, stripes and grain of other colors. No
digit is in both training and validation images. The same arguments generate the same files.

    FOLDER/train/*.png  FOLDER/val/*.png  FOLDER/annotations/instances_train.json  instances_val.json
"""
import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from smpconv_models.training import Digits, cli
from smpconv_models.utils import streams

DIGITS = (1, 5)  # minimum and maximum number in an image
SIDES = (20, 44)  # range of the side of an enlarged scan, in pixels
CONTRAST = 100  # minimum between ink and background, of 255
INKED = 0.3  # opacity from which a pixel belongs to the digit, and to its box
OVERLAP = 0.1  # maximum share of the smaller of two boxes
TRIES = 20  # attempts to place a digit

Box = Tuple[int, int, int, int]  # left, top, right, bottom


def make(folder: Path, train: int = 800, val: int = 200, size: int = 128) -> Path:
    """Generate the data set, unless the folder has this data set already.

    Args:
        folder: Folder to create.
        train: Number of training images.
        val: Number of validation images.
        size: Side of the images, in pixels.

    Raises:
        ValueError: If the folder has other content.
    """
    description = {'description': f'handwritten digits on textures: {train} and {val} images of {size}x{size}, 1'}
    annotations = folder / 'annotations' / 'instances_val.json'
    if annotations.exists() and json.loads(annotations.read_text()).get('info') == description:
        return folder
    if folder.exists():
        raise ValueError(f'{folder} exists, and is not the data set of {description["description"]}: remove it')
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f'.{folder.name}.'))
    try:
        for key, (split, count) in enumerate({'train': train, 'val': val}.items()):
            _make_split(part, split, key, count, size, description)
        part.chmod(0o755)
        part.rename(folder)  # complete at once
    except BaseException:
        shutil.rmtree(part)
        raise
    return folder


def _make_split(folder: Path, split: str, key: int, count: int, size: int, description: Dict[str, str]) -> None:
    digits = Digits('train' if split == 'train' else 'validation')
    (folder / split).mkdir()
    (folder / 'annotations').mkdir(exist_ok=True)
    images: List[Dict[str, Any]] = []
    annotations: List[Dict[str, Any]] = []
    for index in tqdm(range(count), desc=f'{split} images', leave=False, disable=None):
        pixels, boxes, labels = scene(np.random.default_rng([key, index]), digits, size)
        name = f'{index:05d}.png'
        Image.fromarray(pixels).save(folder / split / name)
        images.append({'id': index + 1, 'file_name': name, 'height': size, 'width': size})
        for (left, top, right, bottom), label in zip(boxes, labels):
            width, height = right - left, bottom - top
            annotations.append({
                'id': len(annotations) + 1, 'image_id': index + 1, 'category_id': label + 1, 'iscrowd': 0,
                'bbox': [left, top, width, height], 'area': width * height})
    categories = [{'id': label + 1, 'name': name} for label, name in enumerate(digits.classes)]
    (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps(
        {'info': description, 'images': images, 'annotations': annotations, 'categories': categories}))


def scene(random: np.random.Generator, digits: Digits, size: int) -> Tuple[np.ndarray, List[Box], List[int]]:
    """Generate one image.

    Returns:
        Pixels ``(size, size, 3)`` of uint8, the boxes, and their digits.
    """
    pixels = texture(random, size)
    boxes: List[Box] = []
    labels: List[int] = []
    for _ in range(random.integers(*DIGITS, endpoint=True)):
        index = int(random.integers(len(digits)))
        opacity = _opacity(digits.images[index], int(random.integers(*SIDES, endpoint=True)))
        for _ in range(TRIES):
            left, top = (int(random.integers(0, size - opacity.shape[axis], endpoint=True)) for axis in (1, 0))
            box = (left, top, left + opacity.shape[1], top + opacity.shape[0])
            if all(_overlap(box, other) <= OVERLAP for other in boxes):
                _ink(random, pixels[top:box[3], left:box[2]], opacity)
                boxes.append(box)
                labels.append(digits.labels[index])
                break
    return pixels.round().astype('uint8'), boxes, labels


def texture(random: np.random.Generator, size: int) -> np.ndarray:
    """Generate clouds between two colors, stripes over them, and grain: ``(size, size, 3)``, 0 to 255."""
    colors = random.uniform(0, 255, (2, 3))
    cells = int(random.integers(2, 9))
    clouds = Image.fromarray(random.uniform(0, 1, (cells, cells)).astype('float32'))
    share = np.asarray(clouds.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    angle, period = random.uniform(0, np.pi), random.uniform(4, 24)
    y, x = np.mgrid[:size, :size]
    stripes = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)[..., None]
    grain = random.normal(0, random.uniform(0, 12), (size, size, 3))
    pixels = colors[0] * share + colors[1] * (1 - share) + stripes * random.uniform(0, 25) + grain
    return pixels.clip(0, 255)


def _opacity(digit: Image.Image, side: int) -> np.ndarray:
    """Return the enlarged scan, 0 to 1, cropped to its inked pixels."""
    opacity = np.asarray(digit.resize((side, side), Image.Resampling.BICUBIC)) / 255
    rows, columns = (np.flatnonzero((opacity >= INKED).any(axis)) for axis in (1, 0))
    return opacity[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]


def _ink(random: np.random.Generator, place: np.ndarray, opacity: np.ndarray) -> None:
    """Draw the digit in place, in a color that is lighter or darker than the background."""
    ground = place.mean((0, 1))
    color = random.uniform(0, 255, 3)
    while abs(color.mean() - ground.mean()) < CONTRAST:
        color = random.uniform(0, 255, 3)
    place += (color - place) * opacity[..., None]


def _overlap(box: Box, other: Box) -> float:
    """Return the intersection of two boxes over the area of the smaller one."""
    width, height = (min(box[i + 2], other[i + 2]) - max(box[i], other[i]) for i in (0, 1))
    return max(width, 0) * max(height, 0) / min(_area(box), _area(other))


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    for split, default in (('train', 800), ('val', 200)):
        parser.add_argument(
            f'--{split}', type=cli.positive_int, default=default, metavar='N', help='number of images (%(default)s)')
    parser.add_argument(
        '--size', type=cli.bounded_number(int, 48), default=128, metavar='PIXELS',
        help='side of the images (%(default)s)')
    args = parser.parse_args(argv)
    try:
        print(make(args.folder, args.train, args.val, args.size))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == '__main__':
    streams.keep_writable()
    sys.exit(main())
