"""Fixtures for tests of training."""
import logging
import os
import signal
from pathlib import Path

import made
import pytest

from smpconv_models.training.datasets import SeededDataset


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


@pytest.fixture
def signal_at(monkeypatch, heard_signals):
    """Return a function that lets the n-th read of an image send this process a signal."""
    def arm(number, count):
        original, left = SeededDataset.__getitem__, [count]

        def read(self, position):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)
            return original(self, position)

        monkeypatch.setattr(SeededDataset, '__getitem__', read)

    return arm


@pytest.fixture(scope='module')
def no_pictures():
    """Runs write empty pictures: to draw them takes a third of a short run. test_run.py has real ones."""
    from smpconv_models import figures  # on use, as it needs matplotlib
    with pytest.MonkeyPatch.context() as patch:
        for name in ('save_curves', 'save_run'):
            patch.setattr(figures, name, lambda path, *_: Path(path).write_bytes(b''))
        yield


@pytest.fixture(scope='module')
def quick_streams():
    """No five seconds of waiting for the threads of Hugging Face's streams, in a process without DataLoader workers."""
    import datasets
    before = datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    yield
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = before


@pytest.fixture(scope='session')
def folders(tmp_path_factory):
    """The folder of each source, made once."""
    found = {}

    def folder(name):
        make = made.SOURCES[name][0]
        if make not in found:
            found[make] = make(tmp_path_factory.mktemp(make.__name__))
        return found[make]

    return folder
