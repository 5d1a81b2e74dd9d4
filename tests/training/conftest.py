"""Fixtures for tests of training."""
import signal

import pytest


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
