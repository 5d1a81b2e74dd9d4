"""The operation's tests run with poisoned memory and a fixed seed, and select backends again."""
import pytest
import torch

from smpconv_models.ops import _backends


@pytest.fixture(autouse=True)
def poisoned_and_seeded(poison):
    torch.manual_seed(0)


@pytest.fixture
def fp32_precision():
    """Set PyTorch's precision of float32 convolutions for the duration of a test."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision

    def set_to(precision):
        conv.fp32_precision = precision
    yield set_to
    conv.fp32_precision = before


@pytest.fixture(autouse=True)
def no_cached_selection():
    _backends._known_runnable.clear()
    _backends._failed.clear()
    _backends._warn_once.cache_clear()
    yield
    _backends._known_runnable.clear()
    _backends._failed.clear()
