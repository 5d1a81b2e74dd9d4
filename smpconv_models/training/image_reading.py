"""Reading single images: one conversion for training, evaluation and figures."""
from typing import Any, NamedTuple

import numpy as np
from PIL import EpsImagePlugin, Image, ImageOps

# Pillow goes by the content of a file, whatever its name, and decodes PostScript by a program, Ghostscript. Without the
# program such a file is unreadable. Set for the process, as libraries of data sets call Pillow as well.
EpsImagePlugin.gs_binary = False

_ORIENTATION = 0x0112  # the EXIF tag

# Pillow's modes with more than 8 bits for each value; Pillow's own conversion clips their values to 255.
_DEEP_INTEGERS = ('I', 'I;16', 'I;16B', 'I;16L', 'I;16N')
DEEP_MODES = (*_DEEP_INTEGERS, 'F')


class ReadImage(NamedTuple):
    """Function that reads image files and converts them to one mode.

    Attributes:
        mode: Mode of the result, ``'L'`` or ``'RGB'``.
        exif_orientation: Whether to apply the EXIF orientation tag.
    """
    mode: str
    exif_orientation: bool = False

    def __call__(self, file: Any) -> Image.Image:
        """Return the converted image of a path or an open file."""
        with Image.open(file) as image:
            return self.convert(image)

    def convert(self, image: Image.Image) -> Image.Image:
        """Convert an opened image.

        Raises:
            ValueError: If the values of a 32-bit image are out of the range of :func:`to_8_bits`.
        """
        if self.exif_orientation:
            image = ImageOps.exif_transpose(image)
        return (to_8_bits(image) if image.mode in DEEP_MODES else image).convert(self.mode)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Convert a gray image with 16 or 32 bits per value to 8 bits.

    The scale depends on the mode of an image alone, never on its values. Integers range from 0 (black) to 65535
    (white); the upper byte is kept, as in Pillow's 16-bit RGB images. Floats range from 0. (black) to 1. (white).

    Args:
        image: Image in one of :data:`DEEP_MODES`.

    Raises:
        ValueError: If a value is outside of 0 to 65535, or of 0. to 1. for floats.
    """
    pixels = np.asarray(image)
    highest = 1. if image.mode == 'F' else 65535
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= highest):  # also true of NaN
        kind = 'float' if image.mode == 'F' else 'integer'
        raise ValueError(f'gray values of a 32-bit {kind} image must be from 0 to {highest:g}, got {low:g} to {high:g}')
    scaled = (pixels * 255).round() if image.mode == 'F' else pixels.astype('int32') >> 8
    return Image.fromarray(scaled.astype('uint8'))


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image, 1 if it has none, without decoding the pixels."""
    # not image.getexif(), which decodes a PNG image to find a tag at the end of the file
    return Image.Image.getexif(image).get(_ORIENTATION, 1)
