"""Fixtures for all tests."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope='session')
def golden():
    """Reads a file of tests/data by name: outputs of the original release's code and what they came from."""
    def read(name):
        return load_file(Path(__file__).parent / 'data' / f'{name}.safetensors')
    return read


@pytest.fixture
def poison():
    """Uninitialized memory is NaN, so that an element which nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
