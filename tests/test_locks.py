"""Locks between processes, whose files are removed."""
import functools
import multiprocessing
import os
import time

import pytest
from filelock import FileLock

from smpconv_models.utils import download
from smpconv_models.utils.download import locked


def enter_often(folder, times, entered):
    """Enter the block many times; the exclusive file shows whether another process is inside."""
    for _ in range(times):
        with locked(folder, 'file'):
            os.close(os.open(folder / 'inside', os.O_CREAT | os.O_EXCL))
            time.sleep(0.001)
            (folder / 'inside').unlink()
        with entered.get_lock():
            entered.value += 1


@pytest.mark.parametrize('counts_links', [True, False])
def test_one_process_at_a_time_and_no_file_is_left(tmp_path, monkeypatch, counts_links):
    monkeypatch.setattr(download, 'FileLock', functools.partial(FileLock, poll_interval=0.001))
    if not counts_links:  # as on NFS
        monkeypatch.setattr(download, '_counts_links', lambda folder: False)
    context = multiprocessing.get_context('fork')
    entered = context.Value('i', 0)
    processes = [context.Process(target=enter_often, args=(tmp_path / 'new', 100, entered)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert entered.value == 400
    assert os.listdir(tmp_path / 'new') == ([] if counts_links else ['.file.lock'])


def test_a_lock_is_released_by_an_error_and_in_a_removed_folder(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    assert os.listdir(tmp_path) == []
    with locked(tmp_path / 'a'):
        (tmp_path / 'a').rename(tmp_path / 'b')
    with locked(tmp_path / 'a'):
        pass


def test_the_next_process_continues_after_a_killed_one(tmp_path):
    (tmp_path / '.download.lock').touch()  # left by it
    with locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == []
