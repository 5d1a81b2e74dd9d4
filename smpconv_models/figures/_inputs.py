"""Snapshots of a run and images, given on the command line."""
import re
from pathlib import Path
from typing import Any, Iterable, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from smpconv_models.data.images import Digits
from smpconv_models.prediction.inputs import LoadedModel, Preparation, find_images
from smpconv_models.training.datasets import DECODE_ERRORS, ReadImage
from smpconv_models.utils.errors import first_line

from .kernels import evenly_spaced


class InputBatch(NamedTuple):
    """Images in the form that a model takes."""
    names: List[str]  # of the files or digits
    inputs: Tensor  # normalized images, ``(N, C, H, W)``
    pixels: Tensor  # the same images in [0, 1], for display


def list_snapshots(paths: List[str]) -> List[str]:
    """Return the given files; the folder of a run stands for its ``checkpoint-EPOCH.pth.tar``, sorted by epoch."""
    found: List[str] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(str(path))
            continue
        numbered = [(re.fullmatch(r'checkpoint-(\d+)\.pth\.tar', file.name), file) for file in path.iterdir()]
        of_run = sorted((int(number[1]), str(file)) for number, file in numbered if number)
        if not of_run:
            raise ValueError(f'{path} has no checkpoint-EPOCH.pth.tar: train with --save-interval N to write them')
        found += [file for _, file in of_run]
    return found


def load_images(
        loaded: LoadedModel, images: Optional[List[str]], num_images: int, img_size: Optional[int]) -> InputBatch:
    """Load images as in a model's evaluation, at most ``num_images``, evenly chosen from all.

    Args:
        loaded: Model.
        images: Paths of files and folders, or 'digits'; None for the digits if the model was trained on them.
        num_images: Maximum number of images.
        img_size: Image side in pixels, by default the model's.

    Raises:
        ValueError: If there are no images, one cannot be read, or the model takes sequences.
    """
    preparation = Preparation.of(loaded, img_size)
    if images is None and loaded.description.text('dataset') == 'digits':
        images = ['digits']
    if images is None:
        raise ValueError("expected --images: files, folders, or 'digits' for the embedded ones")
    named = list(_read_images(images, num_images, preparation.read))
    inputs = torch.stack([preparation.transform(image) for _, image in named])
    return InputBatch([name for name, _ in named], inputs, preparation.pixels(inputs))


def _read_images(paths: List[str], count: int, read_image: ReadImage) -> Iterable[Tuple[str, Any]]:
    if paths == ['digits']:
        digits = Digits('validation', read_image.mode)
        for index in evenly_spaced(list(range(len(digits))), count):
            image, label = digits[index]
            yield f'digit {label}', image
        return
    for path in evenly_spaced(find_images(paths, '--images'), count):
        try:
            yield path.stem, read_image(path)
        except DECODE_ERRORS as error:
            raise ValueError(f'--images {path} cannot be read: {first_line(error)}') from error
