"""train.py as processes of their own."""
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch
from programs import ROOT

TINY = [
    '--model', 'smpconv_nano', '--model-kwargs', 'depths=(1,1)', 'dims=(4,8)', 'kernel_sizes=(7,5)', '--workers', '0']

# Everything that draws, decays, accumulates or averages.
EVERYTHING = [
    *TINY, '--dataset', 'digits', '--in-chans', '1', '--img-size', '8', '--epochs', '2', '--warmup-epochs', '1',
    '--lr', '4e-3', '--aa', 'rand-m9-mstd0.5-inc1', '--reprob', '0.25', '--mixup', '0.8', '--cutmix', '1',
    '--train-interpolation', 'random', '--drop', '0.1', '--drop-path', '0.2', '--layer-decay', '0.9', '--model-ema',
    '--model-ema-decay', '0.9', '--model-ema-warmup', '--clip-grad', '5', '--balance-classes',
    '--global-batch-size', '128', '--batch-size', '64', '--log-interval', '1']

# Learns in two epochs.
DIGITS = [
    '--model', 'smpconv_nano', '--model-kwargs', 'depths=(1,1)', 'dims=(16,32)', 'kernel_sizes=(7,5)', '--workers', '0',
    '--dataset', 'digits', '--in-chans', '1', '--img-size', '16', '--lr', '2e-2',
    '--warmup-epochs', '1', '--no-aug', '--experiment', 'run']


def start(argv, ranks=1, script=ROOT / 'train.py', more=None, environments=None, **options):
    """Start a program as torchrun would, or alone; `more` and `environments` are of single ranks."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        env = {**os.environ, **(environments[rank] if environments else {})}
        if ranks > 1:
            env.update(
                OMP_NUM_THREADS='1', RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        words = [*argv, *(more or {}).get(rank, ())]
        processes.append(subprocess.Popen(
            [sys.executable, str(script), *map(str, words)], env=env, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, **options))
    return processes


def finish(processes, timeout=120):
    """(exit code, standard output, standard error) of each."""
    ends = []
    try:
        for process in processes:
            out, error = process.communicate(timeout=timeout)
            ends.append((process.returncode, out, error))
    finally:
        for process in processes:
            process.kill()
    return ends


def wait_for_step(process, epoch, step):
    """Wait until the run prints this step; return what it printed before."""
    told, printed = f'epoch {epoch}  step {step}/', ''
    for line in process.stdout:
        if line.startswith(told):
            return printed
        printed += line
    raise AssertionError(f'the run ended without {told}: {process.stderr.read()}')


def children(process):
    return [int(pid) for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]


def stop(process, number=signal.SIGKILL):
    """Sends a signal; returns as :func:`finish` does."""
    process.send_signal(number)
    return finish([process])[0]


def differences(first, second):
    """Where the last checkpoints of two folders differ, but for how the runs were called; then the tables."""
    states = [torch.load(folder / 'last.pth.tar', weights_only=True) for folder in (first, second)]
    found = list(_differ(*states))
    if (first / 'summary.csv').read_bytes() != (second / 'summary.csv').read_bytes():
        found.append('summary.csv')
    return found


def _differ(a, b, path=''):
    if isinstance(a, torch.Tensor):
        if not torch.equal(a, b):
            yield path
    elif isinstance(a, dict):
        if list(a) != list(b):
            yield f'keys of {path}'
        for key in (key for key in a if key in b and key != 'args'):
            yield from _differ(a[key], b[key], f'{path}/{key}')
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            yield f'length of {path}'
        for index, (left, right) in enumerate(zip(a, b)):
            yield from _differ(left, right, f'{path}/{index}')
    elif a != b:
        yield path
