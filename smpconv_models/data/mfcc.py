"""Mel-frequency cepstral coefficients, as torchaudio computes them.

They are those of ``torchaudio.transforms.MFCC(sample_rate=16000, n_mfcc=20, log_mels=True, melkwargs=dict(n_fft=200,
n_mels=64))``, which the original release takes; torchaudio is no longer made for the newest PyTorch.
"""
import functools
import math

import torch
from torch import Tensor

_RATE = 16000
_WINDOW, _HOP = 200, 100  # samples: 12.5 ms, and half of it
_BANDS, _COEFFICIENTS = 64, 20
_FLOOR = 1e-6  # added to the energies before their logarithm


def mfcc(samples: Tensor) -> Tensor:
    """The coefficients of sound at 16 kHz.

    The power of 12.5 ms windows (Hann's, at a distance of half that, the sound reflected at its ends), summed in 64
    bands, whose logarithms are transformed by the first 20 of an orthonormal cosine transform.

    Args:
        samples: ``(..., S)``, of more than 100 samples, float32 or float64.

    Returns:
        ``(..., 20, 1 + S // 100)``, in the samples' dtype; of a second, 161 steps.
    """
    flat = samples.reshape(-1, samples.shape[-1])
    window = torch.hann_window(_WINDOW, dtype=samples.dtype, device=samples.device)
    power = torch.stft(flat, _WINDOW, _HOP, window=window, return_complex=True).abs().square()  # (N, 101, T)
    energies = _bands().to(samples) @ power
    coefficients = _cosines().to(samples) @ (energies + _FLOOR).log()
    return coefficients.reshape(*samples.shape[:-1], *coefficients.shape[1:])


@functools.lru_cache(maxsize=1)
def _bands() -> Tensor:
    """``(64, 101)``: triangles over frequency, each from its neighbours' centres; these lie evenly on the mel scale.

    The lowest are narrower than the distance of two frequencies, and some have none in them: always zero.
    """
    frequencies = torch.linspace(0, _RATE / 2, _WINDOW // 2 + 1, dtype=torch.float64)
    top = 2595 * math.log10(1 + _RATE / 2 / 700)
    centres = 700 * (10 ** (torch.linspace(0, top, _BANDS + 2, dtype=torch.float64) / 2595) - 1)
    rising = (frequencies - centres[:-2, None]) / (centres[1:-1] - centres[:-2])[:, None]
    falling = (centres[2:, None] - frequencies) / (centres[2:] - centres[1:-1])[:, None]
    return torch.minimum(rising, falling).relu()


@functools.lru_cache(maxsize=1)
def _cosines() -> Tensor:
    """``(20, 64)``, the first rows of the orthonormal cosine transform of the second type."""
    place = (torch.arange(_BANDS, dtype=torch.float64) + 0.5) * math.pi / _BANDS
    rows = torch.cos(torch.arange(_COEFFICIENTS, dtype=torch.float64)[:, None] * place) * math.sqrt(2 / _BANDS)
    rows[0] /= math.sqrt(2)
    return rows
