"""Sound files of one second."""
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smpconv_models.utils.errors import first_line

RATE = 16000  # samples in a second, and in a clip


def read_wave(path: Path) -> Tensor:
    """Reads a clip of at most a second at 16 kHz.

    A shorter one ends in silence, so that what was said stays where it was in time, and the causal network, which
    answers at the last step, has heard it all.

    Returns:
        ``(16000,)``, float32 in [-1, 1).

    Raises:
        ValueError: It is no such file, or damaged.
        OSError: It can't be read.
    """
    try:
        with wave.open(str(path), 'rb') as file:
            found = (file.getnchannels(), 8 * file.getsampwidth(), file.getframerate())
            count = file.getnframes()
            content = file.readframes(min(count, RATE))
    except (EOFError, wave.Error) as error:
        raise ValueError(f'{path} is no sound file, or damaged: {first_line(error)}') from error
    if found != (1, 16, RATE):
        raise ValueError(f'{path}: expected 1 channel of 16 bits at {RATE} Hz, found {found[0]} of {found[1]} at '
                         f'{found[2]} Hz')
    if not 0 < count <= RATE:
        raise ValueError(f'{path}: expected 1 to {RATE} samples, found {count}')
    if len(content) != 2 * count:
        raise ValueError(f'{path} is damaged: its header tells {2 * count} bytes of sound, it has {len(content)}')
    samples = torch.zeros(RATE)
    samples[:count] = torch.from_numpy(np.frombuffer(content, '<i2').astype(np.float32))
    return samples / 2 ** 15
