"""The operation's tests run with poisoned memory and a fixed seed."""
import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_and_seeded(poison):
    torch.manual_seed(0)
