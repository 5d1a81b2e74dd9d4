import logging

import pytest


@pytest.fixture(autouse=True)
def no_handlers_stay():
    """Programs called as functions log to a standard output that ends with the test."""
    before = list(logging.root.handlers)
    yield
    for handler in set(logging.root.handlers) - set(before):
        logging.root.removeHandler(handler)
