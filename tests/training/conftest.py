"""Fixtures for tests of training."""
import functools
import hashlib
import logging
import signal
import tempfile
from pathlib import Path

import made
import pytest

from smpconv_models.data import images


@functools.lru_cache(maxsize=1)
def _made_mnist_md5():
    with tempfile.TemporaryDirectory() as folder:
        files = (made.make_mnist(Path(folder)) / 'MNIST' / 'raw').iterdir()
        return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(autouse=True)
def made_files_count_as_published(monkeypatch):
    """Replace the checksums of MNIST by those of the made files."""
    monkeypatch.setattr(images, 'MNIST_MD5', _made_mnist_md5())


@pytest.fixture
def logs_of_rank_0(caplog):
    """Level of the log on rank 0, as train.py sets it."""
    caplog.set_level(logging.INFO, 'smpconv_models')


@pytest.fixture
def heard_signals():
    """Signals to stop are not ignored here and in processes started here, as they are under nohup or a shell's &.

    A shell without job control starts its background commands with SIGINT and SIGQUIT ignored, and children inherit it.
    """
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT]
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)
