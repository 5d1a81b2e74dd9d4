"""Fixtures for tests of training."""
import logging
import signal

import made
import pytest


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
