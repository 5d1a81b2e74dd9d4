"""How a run ends: its exit code, its one line, what it leaves."""
import functools
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import programs
import pytest
from launch import EVERYTHING, TINY, children, finish, start, wait_for_step
from programs import ROOT, error_line
from torch import distributed

import train
from smpconv_models import checkpoint, training
from smpconv_models.training.checkpointing import RunDir
from smpconv_models.training.distributed import GracefulStop
from smpconv_models.training.train_step import TrainStep
from smpconv_models.utils import streams
from smpconv_models.utils.download import file_sha256

SMALL = [
    *TINY, '--dataset', 'digits', '--in-chans', 1, '--img-size', 8, '--batch-size', 512, '--epochs', 1,
    '--warmup-epochs', 0, '--color-jitter', 0, '--experiment', 'run']
pytestmark = pytest.mark.usefixtures('no_pictures')
run = functools.partial(programs.run, train.main)


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
    assert run(*command) == 1
    line = error_line(capsys)
    assert f'its best checkpoint is damaged: {path} is a truncated' in line and f'{tmp_path}/run/last.pth.tar' in line
    path.write_bytes(whole)
    assert run(*command) == 0


@pytest.mark.parametrize('options, count', [((), 10), (('--max-nonfinite-steps', 2), 2)])
def test_steps_that_are_not_finite_end_the_run_and_name_its_images(tmp_path, capsys, options, count):
    assert run(*SMALL, '--lr', 1e6, '--epochs', 10, *options, '--output', tmp_path) == 1
    line = error_line(capsys)
    assert f'{count} consecutive steps had NaN or infinity; the last: epoch ' in line
    assert re.search(r'not finite.*, at learning rate', line) and 'image ' in line  # which one depends on rounding
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
    assert 'error: a weight is not finite after epoch 1, step 0, at learning rate 2.00e-03; a lower --lr than' in (
        error_line(capsys))


@pytest.mark.parametrize('option', ['--lr', '--weight-decay', '--opt-eps'])
def test_numbers_that_overflow_in_the_optimizer_are_refused(option, capsys):
    line = programs.refused(train.main, capsys, *SMALL, option, 1e38)
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


@pytest.mark.parametrize(('code', 'number', 'printed'), [('words', 1, 'words\n'), (None, 0, ''), (3, 3, '')])
def test_a_process_ends_as_python_does_alone_and_at_once_among_others(
        code, number, printed, script, capsys, monkeypatch):
    """A process alone calls functions of atexit; a rank that waits for others in such a function would not end."""
    with pytest.raises(SystemExit) as end:
        script(code)
    assert end.value.code == code
    ends = []
    monkeypatch.setattr(os, '_exit', ends.append)
    distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)
    try:
        script(code)
    finally:
        distributed.destroy_process_group()
    assert (ends, capsys.readouterr().err) == ([number], printed)


# --- checkpoints that cannot be read ---


def test_a_checkpoint_that_may_not_be_read_gives_way_to_the_previous_one(tmp_path, monkeypatch):
    """Root may read files without permission, so the system's refusal is simulated."""
    folder, real = RunDir(tmp_path), open

    def refuse(path, *args, **kwargs):
        if path == folder.last:
            raise PermissionError(13, 'Permission denied', str(path))
        return real(path, *args, **kwargs)

    for number in (1, 2):
        folder.save({'state_dict': {}, 'progress': number})
    monkeypatch.setattr('builtins.open', refuse)
    for read in (checkpoint.load_file, checkpoint.check_file, file_sha256):
        with pytest.raises(ValueError, match=f'{folder.last} cannot be read: Permission denied'):
            read(folder.last)
    path, loaded = folder.load_latest()
    assert path == str(folder.previous) and loaded['progress'] == 1


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
@pytest.mark.parametrize(('name', 'code'), [('SIGHUP', 129), ('SIGQUIT', 131), ('SIGINT', 130), ('SIGTERM', 143)])
def test_a_signal_to_the_whole_job_saves_the_run(name, code, tmp_path, heard_signals):
    """Terminals and schedulers send signals to DataLoader workers too."""
    process, = start([*EVERYTHING, '--output', tmp_path, '--epochs', 1000, '--workers', 2], start_new_session=True)
    wait_for_step(process, 0, 3)
    os.killpg(process.pid, getattr(signal, name))
    (ended, _, error), = finish([process])
    assert ended == code and error.startswith(f'train.py: stopped by {name}; the same command resumes the run')
    assert RunDir(tmp_path / 'smpconv_nano').load_latest()[1]['progress']['step'] >= 3


# --- whole programs ---


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    assert run(*SMALL, '--output', folder) == 0
    return folder / 'run'


@pytest.mark.slow  # 9 s each: a process
@pytest.mark.timeout(120)
@pytest.mark.parametrize(('script', 'expected_code'), [('train.py', 1), ('validate.py', 2)])
def test_stopped_workers_end_a_program_in_time_with_one_line(trained, tmp_path, script, expected_code):
    argv = [*EVERYTHING, '--output', tmp_path, '--epochs', 1000] if script == 'train.py' else [
        '--checkpoint', trained, '--batch-size', 1]
    process, = start([*argv, '--workers', 2, '--dist-timeout', 3], script=ROOT / script)
    if script == 'train.py':
        wait_for_step(process, 0, 3)
    deadline = time.monotonic() + 60
    while len(children(process)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = children(process)
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    (code, _, error), = finish([process], timeout=30)
    line, = error.strip().splitlines()
    assert code == expected_code
    assert line.startswith(f'{script}: error: no batch came from the DataLoader workers in 3 s')
    assert not any(Path(f'/proc/{worker}').exists() for worker in workers)


@pytest.mark.slow  # 8 s each: a process
@pytest.mark.parametrize('script', ['train.py', 'validate.py'])
@pytest.mark.parametrize('redirection', [
    '>/dev/full', '>&-', '2>&-', '>&- 2>&-', '| head -c 1; exit ${PIPESTATUS[0]}'])
def test_programs_continue_without_a_reader_of_their_output(script, redirection, trained, tmp_path):
    argv = [*SMALL, '--output', tmp_path] if script == 'train.py' else ['--checkpoint', trained, '--workers', 0]
    command = [sys.executable, str(ROOT / script), *map(str, argv)]
    done = subprocess.run(['bash', '-c', f'"$@" {redirection}', 'bash', *command], capture_output=True, text=True)
    if script == 'validate.py' and redirection == '>/dev/full':    # the results are lost
        message = 'validate.py: error: standard output cannot be written: No space left on device\n'
        assert (done.returncode, done.stderr) == (1, message)
    else:
        assert (done.returncode, done.stderr) == (0, '')
    if script == 'train.py':
        assert RunDir(tmp_path / 'run').load_latest()[1]['progress']['epoch'] == 1


@pytest.mark.parametrize('happens', [
    lambda path: path.rename(path.with_name('renamed')), shutil.rmtree], ids=['renamed', 'removed'])
def test_a_folder_that_is_taken_away_from_its_run_is_one_line(happens, tmp_path, capsys, monkeypatch):
    save, before = RunDir.save, set(threading.enumerate())

    def take_away(folder, state):
        happens(folder.path)
        save(folder, state)

    monkeypatch.setattr(RunDir, 'save', take_away)
    assert run(*SMALL, '--output', tmp_path) == 1
    line = error_line(capsys)
    assert line.startswith(f'train.py: error: {tmp_path}/run/last.pth.tar cannot be written: ')
    assert line.endswith(f'; the folder {tmp_path}/run was removed or renamed')
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)  # none keeps the process from its end
