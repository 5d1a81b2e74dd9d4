"""What goes wrong around a run: disks, memory, other runs, processes that load."""
import errno
import functools
import multiprocessing
import os
import random
import re
import resource
import signal
import stat
import time
from pathlib import Path

import programs
import pytest
import torch
from launch import EVERYTHING, TINY, children, finish, start, wait_for_step
from programs import ROOT, error_line
from test_data import make_folder

import train
from smpconv_models.training import checkpointing, describe_error
from smpconv_models.training.checkpointing import RunDir
from smpconv_models.training.distributed import DistributedContext

pytestmark = pytest.mark.usefixtures('no_pictures')
run = functools.partial(programs.run, train.main)
refused = functools.partial(programs.refused, train.main)

def state(number, megabytes=1):
    return {'state_dict': {'w': torch.full((megabytes * 2 ** 18,), float(number))}, 'progress': number}


# --- saving ---


def save_forever(path, saved):
    """In a process that will be killed; sets `saved` after the first one."""
    torch.set_num_threads(1)
    folder = RunDir(Path(path))
    number = 0 if folder.load_latest() is None else folder.load_latest()[1]['progress']
    while True:
        number += 1
        folder.save(state(number))
        saved.set()


def kill_while_saving(path, times, draw):
    """Kills a process that saves, again and again; the newest checkpoint's number after each."""
    numbers = []
    fork = multiprocessing.get_context('fork')
    for _ in range(times):
        saved = fork.Event()
        process = fork.Process(target=save_forever, args=(path, saved))
        process.start()
        assert saved.wait(60)  # however slow the machine: then it is in the midst of another
        time.sleep(draw.uniform(0, 0.09))
        process.kill()
        process.join()
        name, loaded = RunDir(path).load_latest()
        assert name == str(path / 'last.pth.tar')
        assert torch.equal(loaded['state_dict']['w'], state(loaded['progress'])['state_dict']['w'])
        numbers.append(loaded['progress'])
    return numbers


@pytest.mark.parametrize('times', [20, pytest.param(200, marks=pytest.mark.slow)])  # 200 take half a minute
def test_a_kill_while_saving_leaves_the_newest_whole(tmp_path, times):
    numbers = kill_while_saving(tmp_path, times, random.Random(times))
    assert numbers == sorted(numbers) and numbers[-1] >= times


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    (tmp_path / '.last.pth.tar.abcd').write_bytes(b'half')
    folder = RunDir(tmp_path)
    folder.acquire()
    assert not (tmp_path / '.last.pth.tar.abcd').exists()
    folder.release()


@pytest.mark.slow  # 20 s: three runs
def test_a_full_disk_is_reported_and_the_old_checkpoints_stay(tmp_path):
    """By a limit on the size of files."""
    command = [*EVERYTHING, '--output', tmp_path, '--experiment', 'run']
    assert run(*command, '--epochs', 1) == 0
    before = {name: (tmp_path / 'run' / name).read_bytes() for name in ('last.pth.tar', 'previous.pth.tar')}
    (code, _, error), = finish(start(
        command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))))
    assert code == 1
    line, = error.strip().splitlines()
    assert re.match(r'train\.py: error: no space: a checkpoint needs 0\.[12] MiB, the disk has ', line)
    assert f'MiB, a quota or limit (ulimit -f) has less, at {tmp_path}/run/last.pth.tar (File too large)' in line
    assert {name: (tmp_path / 'run' / name).read_bytes() for name in before} == before
    assert not list((tmp_path / 'run').glob('.*.pth.tar.*'))
    assert run(*command) == 0


def test_a_disk_without_hard_links_and_a_link_to_another_disk(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, 'no hard links here')

    elsewhere = tmp_path / 'elsewhere.pth.tar'
    checkpointing.save_checkpoint(elsewhere, state(1))
    folder = RunDir(tmp_path / 'run')
    folder.path.mkdir()
    folder.last.symlink_to(elsewhere)
    monkeypatch.setattr(os, 'link', refuse)
    folder.save(state(2))
    assert not folder.last.is_symlink() and torch.load(folder.last)['progress'] == 2
    assert torch.load(folder.previous)['progress'] == 1 == torch.load(elsewhere)['progress']


def test_the_umask_is_respected(tmp_path):
    folder = RunDir(tmp_path)
    old = os.umask(0o027)
    try:
        folder.save(state(1))
        folder.save(state(2))
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder.last, folder.previous)} == {0o640}


@pytest.mark.parametrize('key', ['state_dict', 'state_dict_ema'])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, key):
    folder = RunDir(tmp_path)
    folder.save(state(1))
    with pytest.raises(FloatingPointError, match=f'w of the {key} is not finite'):
        folder.save({**state(2), key: {'w': torch.tensor([1., float('nan')])}})
    assert folder.load_latest()[1]['progress'] == 1


# --- another run in the folder ---


@pytest.mark.slow  # 15 s: three runs
def test_two_runs_in_one_folder(tmp_path, capsys):
    first, = start([*EVERYTHING, '--output', tmp_path, '--experiment', 'run', '--epochs', 1000])
    wait_for_step(first, 0, 1)
    line = refused(capsys, *EVERYTHING, '--output', tmp_path, '--experiment', 'run')
    assert f'another run is in {tmp_path}/run: process {first.pid} on ' in line and '--experiment' in line
    first.kill()
    finish([first])
    folder = RunDir(tmp_path / 'run')  # a killed run holds nothing
    folder.acquire()
    folder.release()


# --- processes that load ---


@pytest.mark.slow  # 11 s: two runs with loaders
def test_a_dead_process_that_loads(tmp_path):
    process, = start([*EVERYTHING, '--output', tmp_path, '--epochs', 1000, '--workers', 2, '--recovery-interval', 1])
    wait_for_step(process, 0, 3)
    os.kill(children(process)[0], signal.SIGKILL)
    (code, _, error), = finish([process])
    assert code == 1
    line = error.strip().splitlines()[-1]
    assert 'a DataLoader worker died: DataLoader worker (pid' in line and 'fewer --workers than 2' in line
    assert RunDir(tmp_path / 'smpconv_nano').load_latest()[1]['progress']['step'] >= 2


@pytest.mark.slow  # 11 s of waiting for a loader
def test_full_shared_memory(tmp_path):
    """By a limit on the size of files, as its blocks are."""
    (code, _, error), = finish(start(
        [*TINY, '--dataset', 'digits', '--img-size', 64, '--epochs', 1, '--warmup-epochs', 0, '--workers', 1,
         '--dist-timeout', 8, '--output', tmp_path],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))))
    assert code == 1
    line = error.strip().splitlines()[-1]
    assert 'shared memory (/dev/shm) may be full: try fewer --workers' in line


@pytest.mark.slow  # ten seconds of standing still
@pytest.mark.parametrize('script', ['train.py', 'validate.py'])
def test_an_interrupt_while_pytorch_loads_is_one_line(script):
    process, = start([], script=ROOT / script)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert finish([process]) == [(130, '', f'{script}: interrupted\n')]


@pytest.mark.slow  # ten seconds
def test_a_second_interrupt_does_not_wait(tmp_path):
    """The first one waits for the step, which is stuck here."""
    process, = start([*EVERYTHING, '--output', tmp_path, '--epochs', 1000, '--workers', 1])
    wait_for_step(process, 0, 3)
    loads, = children(process)
    os.kill(loads, signal.SIGSTOP)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    os.kill(loads, signal.SIGCONT)
    (code, _, error), = finish([process])
    assert code == 130 and 'interrupted; the same command resumes the run from its last checkpoint' in error


# --- what is reported ---


def too_much_memory():
    try:
        torch.empty(2 ** 60)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize('error, is_training, expected', [
    (too_much_memory(), True, '--batch-size 64: .*--global-batch-size.*--amp.*--grad-checkpointing'),
    (MemoryError(), False, '.*a smaller --batch-size or --amp needs less'),
    (torch.OutOfMemoryError('CUDA out of memory. Tried'), False, '--batch-size 64'),
    (RuntimeError('mat1 and mat2 shapes'), False, None),  # faults of the program keep their traceback
    (AttributeError('x'), False, None),
])
def test_only_insufficient_memory_is_one_line(error, is_training, expected):
    line = describe_error(error, DistributedContext(), batch_size=64, workers=2, is_training=is_training)
    assert line is None if expected is None else re.fullmatch(f'out of memory with {expected}.*', line)


def test_a_missing_class_is_reported_before_training(tmp_path, capsys):
    make_folder(tmp_path / 'data', splits=('train',), classes=('cat', 'dog', 'eel'))
    make_folder(tmp_path / 'data', splits=('val',), classes=('cat', 'dog'))
    line = refused(
        capsys, *TINY, '--data-dir', tmp_path / 'data', '--batch-size', 2, '--output', tmp_path / 'output')
    assert "3 and 2, only in training ['eel']" in line and not (tmp_path / 'output').exists()


def test_an_unreadable_validation_image_ends_the_run_and_saves_it(tmp_path, capsys):
    folder = make_folder(tmp_path / 'data')
    (folder / 'val/cat/0.png').write_bytes((folder / 'val/cat/0.png').read_bytes()[:45])
    command = [
        *TINY, '--data-dir', folder, '--batch-size', 2, '--epochs', 1, '--warmup-epochs', 0, '--img-size', 16,
        '--output', tmp_path, '--experiment', 'run']
    assert run(*command) == 1
    line = error_line(capsys)
    assert f'{folder}/val/cat/0.png cannot be read' in line and '--skip-unreadable' in line
    assert run(*command, '--skip-unreadable') == 0  # the steps are not done again
    assert 'resuming from' in capsys.readouterr().out
