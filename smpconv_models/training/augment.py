"""timm's augmentation, on every Pillow."""
from typing import Any, Tuple

from PIL import Image, ImageOps
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import RandomCrop


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keeps the highest bits of each channel; 0 bits is black, as in Pillow before 13, which refuses it."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def repair(transform: Any) -> Any:
    """Puts :func:`posterize` in place of timm's in a transform of timm's, whose policies ask for 0 bits; returns it.

    RandAugment with increasing severity (``inc1``, the paper's) does, for about one image in 650.
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


def crop_padded(transform: Any, input_size: Tuple[int, int, int], padding: int) -> None:
    """Puts a crop of the padded image in place of timm's resized crop, in a transform of timm's; in place.

    Args:
        transform: Of ``create_transform``.
        input_size: (channels, height, width) of the crop.
        padding: Black pixels on each side.
    """
    parts = transform.transforms
    first = next(index for index, part in enumerate(parts) if isinstance(part, RandomResizedCropAndInterpolation))
    parts[first] = PaddedCrop(input_size[1:], padding)


def check_padding(padding: int, size: Tuple[int, int]) -> None:
    """Raises ValueError where a crop of an image could be all padding."""
    if padding >= min(size):
        raise ValueError(f'--crop-padding must be below the side of the images, {min(size)}, got {padding}')


class OtherSizeError(ValueError):
    """An image is not of the size that is asked for."""


class PaddedCrop:
    """A random crop of an image with black pixels around it, of the image's own size.

    Args:
        size: (height, width).
        padding: Pixels on each side.

    Raises:
        OtherSizeError: An image has another size.
    """

    def __init__(self, size: Tuple[int, int], padding: int) -> None:
        check_padding(padding, size)
        self.size = size
        self.crop = RandomCrop(size, padding=padding)

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.size != self.size[::-1]:
            raise OtherSizeError(
                f'--crop-padding takes images of the input size, {self.size[1]}x{self.size[0]}, got '
                f'{image.size[0]}x{image.size[1]}')
        return self.crop(image)
