"""The folder of a run: who holds it, and what becomes of it under a run."""
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from smpconv_models.training import checkpointing as folders
from smpconv_models.training.checkpointing import RunDir


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(folders, '_LOCK_TIMEOUT_S', 0.2)


def held(path):
    folder = RunDir(path)
    folder.acquire()
    return folder


def test_a_refused_run_leaves_nothing(tmp_path):
    held(tmp_path / 'run').release()
    assert not (tmp_path / 'run').exists()


def test_a_run_leaves_its_files_and_the_next_one_takes_them(tmp_path):
    folder = held(tmp_path / 'run')
    folder.summary_csv.write_text('epoch\n')
    folder.release()
    assert sorted(path.name for path in folder.path.iterdir()) == ['.run.lock', 'summary.csv']
    held(tmp_path / 'run').release()
    assert folder.summary_csv.exists()


def test_whoever_takes_a_folder_while_it_is_left_keeps_it(tmp_path, monkeypatch):
    """The next run comes in the instant in which the lock is given up; its lock must be the one that a third meets."""
    first = held(tmp_path / 'run')
    release, after = first._lock.release, []

    def take_at_once(*args, **kwargs):
        release(*args, **kwargs)
        after.append(held(tmp_path / 'run'))

    monkeypatch.setattr(first._lock, 'release', take_at_once)
    first.release()
    with pytest.raises(ValueError, match='another run is in'):
        RunDir(tmp_path / 'run').acquire()
    after[0].release()


@pytest.mark.parametrize('happens', [
    lambda path: path.rename(path.with_name('renamed')),
    shutil.rmtree,
    lambda path: (shutil.rmtree(path), path.write_text('a file')),
], ids=['renamed', 'removed', 'replaced by a file'])
def test_a_folder_that_is_gone_is_left_without_an_error(tmp_path, happens):
    folder = held(tmp_path / 'run')
    happens(folder.path)
    folder.release()
    assert not folder._lock.is_locked


def test_a_folder_that_has_become_read_only_is_left_without_an_error(tmp_path, monkeypatch):
    """Permissions do not bind root, so the system's refusal is made."""
    def refuse(self, **kwargs):
        raise PermissionError(1, 'Operation not permitted', str(self))

    folder = held(tmp_path / 'run')
    with monkeypatch.context() as patched:
        patched.setattr(Path, 'unlink', refuse)
        folder.release()
    held(tmp_path / 'run').release()


def test_the_folder_of_another_run_is_left_alone(tmp_path):
    """After this one's was renamed, and another run has begun under its name."""
    first = held(tmp_path / 'run')
    first.path.rename(tmp_path / 'renamed')
    second = RunDir(tmp_path / 'run')
    second._owner['since'] = 'later'  # another process would differ by its number
    second.acquire()
    first.release()
    assert json.loads(second._owner_file.read_text())['since'] == 'later'
    with pytest.raises(ValueError, match='another run is in'):
        RunDir(tmp_path / 'run').acquire()
    second.release()


def take_and_leave(path, times, marker, doubles):
    """In a process of its own: the marker can be made by one holder at a time."""
    folders._LOCK_TIMEOUT_S = 60.
    for _ in range(times):
        folder = held(path)
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            doubles.value += 1
        else:
            os.unlink(marker)
        folder.release()


@pytest.mark.parametrize('processes, times', [
    (4, 10), pytest.param(16, 150, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])  # the latter takes a minute
def test_processes_that_take_and_leave_a_folder_never_share_it(tmp_path, processes, times):
    fork = multiprocessing.get_context('fork')
    doubles = fork.Value('i')
    workers = [
        fork.Process(target=take_and_leave, args=(tmp_path / 'run', times, tmp_path / 'marker', doubles))
        for _ in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * processes and doubles.value == 0


@pytest.mark.parametrize('content', ['[1]', '5', '"x"', 'null', '[' * 100_000, '{"pid": 1}', '\0'])
def test_a_marker_of_another_form_is_passed_over(tmp_path, content):
    folder = held(tmp_path / 'run')
    folder._owner_file.write_text(content)
    assert folder._describe_owner() == 'an unknown process'
    folder.release()
    assert not folder._lock.is_locked


def test_a_marker_that_cannot_be_printed_is_escaped(tmp_path):
    folder = held(tmp_path / 'run')
    folder._owner_file.write_text(json.dumps({'pid': 1, 'host': 'a\n\x1b[31m', 'since': '\ud800' + 'b' * 5000}))
    owner = folder._describe_owner()
    assert owner.startswith(r'process 1 on a\n\x1b[31m since \ud800b') and len(owner) < 500
