"""What a run tells while it runs."""
import fcntl
import functools
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import programs
import pytest
from launch import TINY
from programs import ROOT

import train
from smpconv_models.training import logger

COMMAND = [*TINY, '--dataset', 'digits', '--in-chans', '1', '--img-size', '8', '--epochs', '2', '--warmup-epochs', '0']
pytestmark = pytest.mark.usefixtures('no_pictures')
run = functools.partial(programs.run, train.main)


def test_lines_where_there_is_no_terminal(tmp_path, capsys):
    assert run(*COMMAND, '--epochs', 1, '--log-interval', 4, '--output', tmp_path) == 0
    told = capsys.readouterr().out.splitlines()
    lines = [line.split() for line in told if line.startswith('epoch ') and line.endswith(' left')]
    assert [(line[1], line[3]) for line in lines] == [('0', '4/11'), ('0', '8/11')]
    assert all(line[4] == 'loss' and line[6] == 'lr' and line[9] == 'images/s,' for line in lines)
    assert float(lines[0][7].rstrip(',')) > float(lines[-1][7].rstrip(','))


def written_to(terminal):
    while True:
        try:
            yield os.read(terminal, 10_000)
        except OSError:  # nobody has its other end any more
            return


@pytest.mark.slow  # 12 s
def test_a_bar_on_a_terminal(tmp_path):
    """With no lines of steps between those of epochs."""
    terminal, other_end = pty.openpty()
    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack('4H', 40, 120, 0, 0))
    command = [sys.executable, ROOT / 'train.py', *COMMAND, '--epochs', 1, '--log-interval', 1, '--output', tmp_path]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=other_end, text=True) as process:
        os.close(other_end)
        shown = b''.join(written_to(terminal))
        out = process.stdout.read()
    told = rb'epoch 0: +\d+%\|.*\| \d+/11 \[.*, loss 2\.\d+, lr \S+, \d+ images/s, run 0:00:\d\d\]'
    assert re.search(told, shown), shown
    assert b'validating' in shown
    assert process.returncode == 0 and 'images/s' not in out


@pytest.mark.slow  # 8 s: three runs
def test_tensorboard_has_steps_and_epochs_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    command = [*COMMAND, '--log-interval', 2, '--log-tensorboard', '--output', tmp_path]
    assert run(*command, '--epochs', 1) == 0
    assert run(*command) == 0
    events = EventAccumulator(str(tmp_path / 'smpconv_nano' / 'tensorboard')).Reload()
    assert [event.step for event in events.Scalars('epoch/eval_top1')] == [11, 22]
    assert [event.step for event in events.Scalars('train/loss')] == [2, 4, 6, 8, 10, 13, 15, 17, 19, 21]
    assert {'train/lr', 'train/images_per_second', 'epoch/train_loss'} <= set(events.Tags()['scalars'])


@pytest.mark.parametrize('name', ['tensorboard', 'wandb'])
def test_what_is_not_installed_is_reported_before_the_run(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(logger.importlib.util, 'find_spec', lambda found: None if found == name else object())
    line = programs.refused(train.main, capsys, *COMMAND, f'--log-{name}', '--output', tmp_path / 'output')
    assert line == f'train.py: error: --log-{name} needs {name}: pip install {name}'
    assert not (tmp_path / 'output').exists()


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('torch.utils.tensorboard.SummaryWriter.add_scalar', full)
    command = [*COMMAND, '--epochs', 1, '--log-interval', 1, '--batch-size', 512, '--log-tensorboard']
    assert run(*command, '--output', tmp_path) == 0
    told = capsys.readouterr().out
    assert told.count('logging to TensorBoard ends: [Errno 28] No space left on device') == 1


def test_where_an_error_came_from_is_shown_if_asked_for(tmp_path, capsys):
    for more in ([], ['--debug']):
        with pytest.raises(SystemExit, match='2'):
            run(*COMMAND, '--train-split', 'nothing', '--output', tmp_path, *more)
        shown = capsys.readouterr()
        assert ('Traceback' in shown.out + shown.err) == bool(more)
        assert shown.err.splitlines()[-1].startswith('train.py: error: split of the digits')
