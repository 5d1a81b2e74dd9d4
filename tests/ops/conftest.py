"""The operation's tests run with poisoned memory and a fixed seed, and choose backends anew."""
import pytest
import torch

from smpconv_models.ops import _backends


@pytest.fixture(autouse=True)
def poisoned_and_seeded(poison):
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_choice_remembered():
    _backends._runnable.cache_clear()
    yield
    _backends._runnable.cache_clear()
