"""Fixtures for all tests."""
import gc
import logging
import os
from pathlib import Path

os.environ['HF_ENDPOINT'] = 'http://127.0.0.1:9'  # nobody is there: no test leaves the machine
import pytest
import torch
from safetensors.torch import load_file

# A test is no rank of the job of Slurm or torchrun that starts the tests.
for _name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'):
    os.environ.pop(_name, None)


def pytest_collection_finish():
    """Leave the objects of libraries out of garbage collections, which takes a tenth off the time of the tests."""
    gc.collect()
    gc.freeze()


def _keep_builtin_functions():
    """Keep PyTorch's built-in functions alive.

    TorchScript recognizes them by their address, which a list gets after ``torch.compile`` has freed one: then a
    module with that list cannot be scripted ("builtin cannot be used as a value"; torch 2.10 to 2.15).
    """
    register = torch.jit._builtins._register_builtin

    def register_and_keep(function, name):
        kept.append(function)
        register(function, name)
    kept = []
    torch.jit._builtins._register_builtin = register_and_keep


_keep_builtin_functions()


@pytest.fixture(scope='session')
def golden():
    """Reads a file of tests/golden by name: outputs of the original release's code and what they came from."""
    def read(name):
        return load_file(Path(__file__).parent / 'golden' / f'{name}.safetensors')
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


@pytest.fixture(autouse=True)
def no_handlers_stay():
    """Programs called as functions log to a standard output that ends with the test, and at a level of their own."""
    loggers = (logging.root, logging.getLogger('smpconv_models'))
    before, levels = list(logging.root.handlers), [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels):
        logger.setLevel(level)
    for handler in set(logging.root.handlers) - set(before):
        logging.root.removeHandler(handler)
