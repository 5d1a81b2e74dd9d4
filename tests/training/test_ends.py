"""How a run ends: its exit code, its one line, what it leaves."""
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from launch import EVERYTHING, ROOT, TINY, finish, start, wait_for_step
from test_faults import children
from torch import distributed

import train
from smpconv_models import checkpoint, training
from smpconv_models.training.checkpointing import RunDir
from smpconv_models.training.distributed import GracefulStop
from smpconv_models.training.train_step import TrainStep
from smpconv_models.utils import atomic_io, streams
from smpconv_models.utils.download import file_sha256

SMALL = [
    *TINY, '--dataset', 'digits', '--in-chans', 1, '--img-size', 16, '--batch-size', 512, '--epochs', 1,
    '--warmup-epochs', 0, '--color-jitter', 0, '--experiment', 'run']


def run(*argv):
    return train.main([str(argument) for argument in argv])


# --- what is said ---


def test_a_run_of_which_no_step_was_applied_has_failed(tmp_path, capsys):
    """Its steps are fewer than the patience; again, when the same command finds it finished."""
    command = [*SMALL, '--std', 1e-30, '--lr', 1e-4, '--output', tmp_path]
    for _ in range(2):
        assert run(*command) == 1
        told = capsys.readouterr()
        line, = told.err.strip().splitlines()
        assert line.startswith('train.py: error: no step of epochs 0 to 0 was applied, from step 0 on: ')
        assert 'a lower --lr than 0.0001' in line and 'best checkpoint' not in told.out


def test_a_finished_run_whose_best_weights_are_damaged_has_failed(tmp_path, capsys):
    command = [*SMALL, '--output', tmp_path]
    assert run(*command) == 0
    path = tmp_path / 'run/model_best.pth.tar'
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    capsys.readouterr()
    assert run(*command) == 1
    line, = capsys.readouterr().err.strip().splitlines()
    assert f'its best checkpoint is damaged: {path} is a truncated' in line and f'{tmp_path}/run/last.pth.tar' in line
    path.write_bytes(whole)
    assert run(*command) == 0


def test_a_rate_at_which_statistics_overflow_is_named_at_the_step(tmp_path, capsys):
    command = [*SMALL, '--lr', 1e6, '--epochs', 10, '--max-nonfinite-steps', 2, '--output', tmp_path]
    assert run(*command) == 1
    line, = capsys.readouterr().err.strip().splitlines()
    assert '2 consecutive steps had NaN or infinity; the last: epoch ' in line
    assert 'a lower --lr than 1e+06' in line


def test_the_step_that_broke_a_weight_is_named(tmp_path, capsys, monkeypatch):
    """Not the next one, whose learning rate is 3e-3."""
    apply = TrainStep._apply

    def break_weight(stepper, norm, number):
        apply(stepper, norm, number)
        if number == 2:
            next(stepper.model.parameters()).data.view(-1)[0] = float('nan')

    monkeypatch.setattr(TrainStep, '_apply', break_weight)
    command = [*SMALL, '--epochs', 3, '--sched', 'step', '--warmup-epochs', 2, '--warmup-lr', 0, '--lr', 4e-3]
    assert run(*command, '--output', tmp_path) == 1
    line, = capsys.readouterr().err.strip().splitlines()
    assert 'error: a weight is not finite after epoch 1, step 0, at learning rate 2.00e-03; a lower --lr than' in line


@pytest.mark.parametrize('option', ['--lr', '--weight-decay', '--opt-eps'])
def test_numbers_that_overflow_in_the_optimizer_are_refused(option, capsys):
    with pytest.raises(SystemExit, match='2'):
        run(*SMALL, option, 1e38)
    line, = capsys.readouterr().err.strip().splitlines()
    assert f'argument {option}: must be' in line and 'at most 1e+06, got 1e+38' in line


@pytest.fixture
def script(monkeypatch):
    """Runs train.py as a script that ends with this SystemExit."""
    handler = signal.getsignal(signal.SIGINT)

    def end_with(code):
        def end(*_):
            raise SystemExit(code)

        monkeypatch.setattr(training, 'build_trainer', end)
        monkeypatch.setattr(streams, 'keep_writable', lambda: None)  # pytest's own streams stay
        monkeypatch.setattr(sys, 'argv', ['train.py', *map(str, SMALL)])
        runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')

    yield end_with
    signal.signal(signal.SIGINT, handler)


CODES = [('words', 1, 'words\n'), (None, 0, ''), (3, 3, '')]


@pytest.mark.parametrize(('code', 'number', 'told'), CODES)
def test_a_process_alone_ends_as_python_does(code, number, told, script):
    """So that functions of atexit are called."""
    with pytest.raises(SystemExit) as end:
        script(code)
    assert end.value.code == code


@pytest.mark.parametrize(('code', 'number', 'told'), CODES)
def test_a_process_among_others_ends_at_once_with_the_same_code(code, number, told, script, capsys, monkeypatch):
    ends = []
    monkeypatch.setattr(os, '_exit', ends.append)
    distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)
    try:
        script(code)
    finally:
        distributed.destroy_process_group()
    assert (ends, capsys.readouterr().err) == ([number], told)


# --- checkpoints that cannot be read ---


@pytest.fixture
def unreadable(monkeypatch):
    """Makes files that the system refuses to open; root may read whatever has no permission."""
    refused = set()
    real = open

    def opened(path, *args, **kwargs):
        if path in refused:
            raise PermissionError(13, 'Permission denied', str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr('builtins.open', opened)
    return refused


def test_a_checkpoint_that_may_not_be_read_is_told(tmp_path, unreadable):
    path = tmp_path / 'last.pth.tar'
    torch.save({'a': 1}, path)
    unreadable.add(path)
    for read in (checkpoint.load_file, checkpoint.check_file, file_sha256):
        with pytest.raises(ValueError, match=f'{path} cannot be read: Permission denied'):
            read(path)


def test_in_place_of_a_checkpoint_that_may_not_be_read_the_previous_one_is_taken(tmp_path, unreadable):
    folder = RunDir(tmp_path)
    for number in (1, 2):
        folder.save({'state_dict': {}, 'progress': number})
    unreadable.add(folder.last)
    path, loaded = folder.load_latest()
    assert path == str(folder.previous) and loaded['progress'] == 1


def test_names_that_are_not_utf8_can_be_in_a_table(tmp_path):
    atomic_io.save_rows(tmp_path / 'rows.csv', [{'name': os.fsdecode(b'cat\xff')}])
    assert (tmp_path / 'rows.csv').read_bytes() == b'name\r\ncat\\udcff\r\n'


# --- signals ---


@pytest.mark.parametrize('name', ['SIGHUP', 'SIGQUIT', 'SIGTERM', 'SIGUSR1', 'SIGINT'])
def test_a_signal_asks_the_run_to_stop(name, heard_signals):
    number = getattr(signal, name)
    with GracefulStop() as stop:
        os.kill(os.getpid(), number)
        assert stop.number == number
    assert signal.getsignal(number) == signal.default_int_handler


def test_a_signal_that_is_ignored_stays_so():
    """As nohup ignores a closed terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with GracefulStop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow  # 8 s each: a process
@pytest.mark.parametrize(('name', 'code'), [('SIGHUP', 129), ('SIGQUIT', 131)])
def test_a_closed_terminal_saves_the_run(name, code, tmp_path, heard_signals):
    process, = start([*EVERYTHING, '--output', tmp_path, '--epochs', 1000, '--recovery-interval', 10000])
    wait_for_step(process, 0, 3)
    process.send_signal(getattr(signal, name))
    (ended, _, error), = finish([process])
    assert ended == code and error.startswith(f'train.py: stopped by {name}; the same command resumes the run')
    assert RunDir(tmp_path / 'smpconv_nano').load_latest()[1]['progress']['step'] >= 3


# --- whole programs ---


@pytest.mark.slow  # 9 s each: a process
@pytest.mark.timeout(120)
def test_stopped_workers_end_train_in_time_with_one_line(tmp_path):
    process, = start([
        *EVERYTHING, '--output', tmp_path, '--epochs', 1000, '--workers', 2, '--dist-timeout', 3])
    wait_for_step(process, 0, 3)
    workers = children(process)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    (code, _, error), = finish([process], timeout=30)
    line, = error.strip().splitlines()
    assert code == 1 and line.startswith('train.py: error: no batch came from the DataLoader workers in 3 s')
    assert not any(Path(f'/proc/{worker}').exists() for worker in workers)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    assert run(*SMALL, '--output', folder) == 0
    return folder / 'run'


@pytest.mark.slow  # 9 s each: a process
@pytest.mark.timeout(120)
def test_stopped_workers_end_validate_in_time_with_one_line(trained):
    process, = start(
        ['--checkpoint', trained, '--workers', 2, '--batch-size', 1, '--dist-timeout', 3], script=ROOT / 'validate.py')
    deadline = time.monotonic() + 60
    while len(children(process)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = children(process)
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    (code, _, error), = finish([process], timeout=30)
    line, = error.strip().splitlines()
    assert code == 2 and line.startswith('validate.py: error: no batch came from the DataLoader workers in 3 s')
    assert not any(Path(f'/proc/{worker}').exists() for worker in workers)


def shell(script, redirection, *argv):
    command = [sys.executable, str(script), *map(str, argv)]
    return subprocess.run(['bash', '-c', f'"$@" {redirection}', 'bash', *command], capture_output=True, text=True)


@pytest.mark.slow  # 8 s each: a process
@pytest.mark.parametrize('redirection', [
    '>/dev/full', '>&-', '2>&-', '>&- 2>&-', '| head -1; exit ${PIPESTATUS[0]}'])
def test_train_keeps_on_without_anybody_to_print_for(redirection, tmp_path):
    done = shell(ROOT / 'train.py', redirection, *SMALL, '--output', tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    assert RunDir(tmp_path / 'run').load_latest()[1]['progress']['epoch'] == 1


@pytest.mark.slow  # 6 s each: a process
@pytest.mark.parametrize('redirection', ['>/dev/full', '>&-', '2>&-', '| head -c 1; exit ${PIPESTATUS[0]}'])
def test_validate_keeps_on_without_anybody_to_print_for(redirection, trained):
    done = shell(ROOT / 'validate.py', redirection, '--checkpoint', trained, '--workers', 0)
    assert (done.returncode, done.stderr) == (0, '')


@pytest.mark.parametrize('happens', [
    lambda path: path.rename(path.with_name('renamed')), shutil.rmtree], ids=['renamed', 'removed'])
def test_a_folder_that_is_taken_away_from_its_run_is_one_line(happens, tmp_path, capsys, monkeypatch):
    save, before = RunDir.save, set(threading.enumerate())

    def take_away(folder, state):
        happens(folder.path)
        save(folder, state)

    monkeypatch.setattr(RunDir, 'save', take_away)
    assert run(*SMALL, '--output', tmp_path) == 1
    line, = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f'train.py: error: {tmp_path}/run/last.pth.tar cannot be written: ')
    assert line.endswith(f'; the folder {tmp_path}/run was removed or renamed')
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)  # none keeps the process from its end
