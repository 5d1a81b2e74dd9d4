"""DataLoader workers that stop or hang: each wait for them ends."""
import os
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from smpconv_models.training.distributed import BoundedLoader


class Ramps(Dataset):
    """Tensors of a size that is handed over by file descriptor; one item may never come."""

    def __init__(self, stuck=None):
        self.stuck = stuck

    def __len__(self):
        return 12

    def __getitem__(self, index):
        while index == self.stuck:
            time.sleep(1)
        return torch.full((1000,), float(index))


def bounded(stuck=None, seconds=0.4, workers=2):
    return BoundedLoader(DataLoader(Ramps(stuck), num_workers=workers, persistent_workers=workers > 0), seconds)


def started():
    """A loader with a short limit, whose workers have started, which may take longer than that."""
    loader = bounded(seconds=60)
    list(loader)
    loader.seconds = 0.4
    return loader


def pids(loader):
    return [worker.pid for worker in loader.loader._iterator._workers]


def are_gone(numbers):
    """Whether the processes have ended and were waited for."""
    for number in numbers:
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            continue
        return False
    return True


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_are_those_of_the_loader(workers):
    loader = bounded(seconds=60, workers=workers)
    for _ in range(2):
        assert [batch[0, 0].item() for batch in loader] == list(range(12))
    numbers = pids(loader) if workers else []
    loader.close()
    assert are_gone(numbers) and len(loader) == 12
    assert sum(1 for _ in loader) == 12  # starts new ones
    loader.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize('ahead', [0., 0.3], ids=['while it loads', 'while it hands over'])
def test_a_stopped_worker_ends_the_wait(ahead):
    """With the batches in the queue, PyTorch asks the worker for a file descriptor."""
    loader = started()
    batches = iter(loader)
    next(batches)
    time.sleep(ahead)
    stopped = pids(loader)
    for number in stopped:
        os.kill(number, signal.SIGSTOP)
    with pytest.raises(TimeoutError, match=r'no batch came from the DataLoader workers in 0\.4 s.*--workers than 2'):
        list(batches)
    assert are_gone(stopped)
    loader.seconds = 60
    assert len(list(loader)) == 12  # of new workers
    loader.close()


@pytest.mark.timeout(60)
def test_a_worker_that_hangs_ends_the_wait():
    loader = bounded(stuck=5)
    with pytest.raises(TimeoutError, match='no batch came'):
        list(loader)
    loader.close()


@pytest.mark.timeout(60)
def test_a_stopped_worker_ends_the_wait_for_the_next_epoch():
    loader = started()
    for number in pids(loader):
        os.kill(number, signal.SIGSTOP)
    with pytest.raises(TimeoutError, match='no batch came'):
        list(loader)
    loader.close()


@pytest.mark.timeout(60)
def test_a_stopped_worker_does_not_keep_the_end():
    loader = bounded(seconds=60)
    next(iter(loader))
    numbers = pids(loader)
    os.kill(numbers[0], signal.SIGSTOP)
    loader.close()
    assert are_gone(numbers)


@pytest.mark.timeout(60)
@pytest.mark.parametrize('error', [ConnectionResetError(104, 'Connection reset by peer'), EOFError()])
def test_a_worker_that_dies_while_it_hands_over_a_batch(monkeypatch, error):
    """PyTorch raises these errors at rare moments."""
    loader = bounded(seconds=60)
    batches = iter(loader)
    next(batches)

    def fail(iterator):
        raise error

    monkeypatch.setattr(type(loader.loader._iterator), '__next__', fail)
    with pytest.raises(RuntimeError, match=r'DataLoader worker \(pid unknown\) exited'):
        list(batches)
    monkeypatch.undo()
    loader.close()


def test_a_worker_that_dies_is_reported_by_pytorch():
    loader = bounded(seconds=60)
    batches = iter(loader)
    next(batches)
    os.kill(pids(loader)[1], signal.SIGKILL)
    with pytest.raises(RuntimeError, match='DataLoader worker'):
        list(batches)
    loader.close()
