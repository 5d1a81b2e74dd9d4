"""Images that cannot be read: what that means in training and in evaluation."""
import logging
from argparse import Namespace
from struct import error as StructError
from subprocess import SubprocessError
from tarfile import TarError
from typing import List, NamedTuple, Set
from zlib import error as ZlibError

from PIL import Image

_logger = logging.getLogger(__name__)

# What Pillow's decoders and timm's readers raise for bytes that are no whole image, besides OSError. AVIF's decoder
# raises RuntimeError; timm asserts that an image of Hugging Face's has either bytes or a path.
ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, OverflowError, RuntimeError,
    AssertionError, StructError, SubprocessError, TarError, ZlibError, Image.DecompressionBombError,
)


class Unreadable(NamedTuple):
    """In an image's place."""
    name: str
    reason: str


class SkippedInTraining:
    """Counts the training images that this process could not read, and names each once.

    Args:
        limit: How many there may be.

    Raises:
        ValueError: There were too many.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self.seen: Set[str] = set()

    def __call__(self, unreadable: List[Unreadable]) -> None:
        self.count += len(unreadable)
        for name, reason in unreadable:
            if name not in self.seen:
                self.seen.add(name)
                _logger.warning('left out, as it cannot be read: %s (%s)', name, reason)
            if len(self.seen) > self.limit:
                raise ValueError(
                    f'{len(self.seen)} training images cannot be read, --max-unreadable is {self.limit}; the last is '
                    f'{name} ({reason})')


class SkippedInEvaluation:
    """An image that can't be evaluated is an error, or left out of the count and named.

    Args:
        args: Which of them.

    Raises:
        ValueError: It is an error.
    """

    def __init__(self, args: Namespace) -> None:
        self.is_allowed = args.skip_unreadable
        self.seen: Set[str] = set()

    def __call__(self, unreadable: List[Unreadable]) -> None:
        for name, reason in unreadable:
            if not self.is_allowed:
                raise ValueError(f'{name} cannot be read ({reason}); --skip-unreadable evaluates without such images')
            if name not in self.seen:
                self.seen.add(name)
                _logger.warning('evaluated without %s (%s)', name, reason)
