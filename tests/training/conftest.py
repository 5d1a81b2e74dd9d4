"""Fixtures for tests of training."""
import logging
import signal

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
