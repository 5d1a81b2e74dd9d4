"""Cepstral coefficients against torchaudio's."""
import math

import pytest
import torch

from smpconv_models.data.speech import mfcc

# Of float32. A coefficient is a sum of 64 logarithms, by factors of at most sqrt(2 / 64). A logarithm is wrong by a
# rounding of its magnitude, at most 14 (the floor's), and by its energy's relative error, some 100 roundings: of a
# transform of 200 samples, squared, in bands beside much stronger ones.
TOLERANCE = 64 * math.sqrt(2 / 64) * (14 + 100) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_coefficients_are_torchaudios(golden, dtype):
    read = golden('mfcc')
    found = mfcc(read['samples'].to(dtype) / 2 ** 15)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), read['coefficients'], atol=TOLERANCE, rtol=0)


def test_a_second_has_161_steps_of_20():
    samples = torch.randn(2, 3, 16000, generator=torch.Generator().manual_seed(0))
    found = mfcc(samples)
    assert found.shape == (2, 3, 20, 161)
    torch.testing.assert_close(found[1, 2], mfcc(samples[1, 2]), atol=TOLERANCE, rtol=0)


def test_silence_is_the_floor_in_the_first_coefficient():
    found = mfcc(torch.zeros(16000, dtype=torch.float64))
    expected = torch.zeros(20, 161, dtype=torch.float64)
    expected[0] = math.log(1e-6) * math.sqrt(64)
    torch.testing.assert_close(found, expected)
