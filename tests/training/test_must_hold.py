"""The slow proofs: whole runs with every augmentation of the ImageNet recipes, in one process and in two, and kills."""
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import PEAK_KIB
from launch import ROOT, differences
from PIL import Image

DIGITS = [
    '--model', 'smpconv_nano', '--dataset', 'digits', '--in-chans', 1, '--mean', 0.305, '--std', 0.376, '--workers', 0,
    '--global-batch-size', 64, '--epochs', 40, '--lr', 4e-3, '--warmup-epochs', 3, '--scale', 0.7, 1, '--ratio', 0.8,
    1.25, '--hflip', 0, '--aa', 'rand-m9-mstd0.5-inc1', '--reprob', 0.25, '--mixup', 0.8, '--cutmix', 1,
    '--train-interpolation', 'random', '--drop-path', 0.1, '--sync-bn', '--model-ema', '--model-ema-decay', 0.99,
    '--model-ema-warmup', '--channels-last', '--log-interval', 1]
STEPS = 1437 // 64


def command(ranks, *argv):
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks > 1 else []
    return [sys.executable, *launcher, str(ROOT / 'train.py'), *map(str, argv)]


def run(ranks, *argv):
    done = subprocess.run(command(ranks, *argv), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_everything(of):
    """SIGKILL to every process whose command line has these words."""
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            words = path.read_text().split('\0')
        except OSError:  # it has ended
            continue
        if all(str(word) in words for word in of):
            os.kill(int(path.parent.name), signal.SIGKILL)


def run_to(step, ranks, *argv):
    """Kills a run a moment after a step, counted over all epochs."""
    process = subprocess.Popen(command(ranks, *argv), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    told = f'epoch {step // STEPS}  step {step % STEPS + 1}/'
    for line in process.stdout:
        if line.startswith(told):
            break
    else:
        raise AssertionError(f'the run ended before {told}')
    kill_everything(argv[-4:])
    process.communicate()


@pytest.mark.slow  # three runs of three to five minutes
@pytest.mark.timeout(3600)
def test_two_processes_learn_as_one_and_survive_kills(tmp_path):
    """The whole augmentation; within a point of one process; five SIGKILLs change no bit."""
    metrics = {}
    for name, ranks, batch_size in (('one', 1, 64), ('two', 2, 32)):
        run(ranks, *DIGITS, '--batch-size', batch_size, '--output', tmp_path, '--experiment', name)
        rows = torch.load(tmp_path / name / 'last.pth.tar', weights_only=True)['progress']['rows']
        metrics[name] = rows[-1]['ema_top1']
    assert abs(metrics['one'] - metrics['two']) <= 1
    broken = [*DIGITS, '--batch-size', 32, '--output', tmp_path, '--experiment', 'broken']
    for step in sorted(random.Random(0).sample(range(40 * STEPS - 1), 5)):
        run_to(step, 2, *broken)
    assert 'resuming from' in run(2, *broken)
    assert differences(tmp_path / 'two', tmp_path / 'broken') == []


@pytest.mark.slow  # two minutes
@pytest.mark.timeout(1200)
def test_a_recipe_runs_end_to_end(tmp_path):
    """Images of many sizes, two processes, two epochs, everything of the recipe on but the size of a step."""
    generator = np.random.default_rng(0)
    for split, count in (('train', 200), ('val', 40)):
        for index in range(count):
            folder = tmp_path / 'images' / split / f'class{index % 4}'
            folder.mkdir(parents=True, exist_ok=True)
            height, width = generator.integers(40, 500, 2)
            pixels = generator.integers(0, 256, (height, width, 3)).astype('uint8')
            Image.fromarray(pixels).save(folder / f'{index}.jpg')
    run(2, '--config', ROOT / 'recipes/imagenet_mobile31.yaml', '--data-dir', tmp_path / 'images', '--workers', 1,
        '--global-batch-size', 64, '--batch-size', 16, '--epochs', 2, '--warmup-epochs', 1, '--output', tmp_path)
    state = torch.load(tmp_path / 'imagenet_mobile31/last.pth.tar', weights_only=True)
    assert state['progress']['epoch'] == 2 and state['optimizer']['state'][0]['step'] == 6


@pytest.mark.slow  # a minute
@pytest.mark.timeout(600)
def test_torchrun_restarts_what_died(tmp_path):
    """With a store of its own for each start, see docs/training.md."""
    argv = [*DIGITS, '--epochs', 3, '--recovery-interval', 1, '--batch-size', 32, '--output', tmp_path]
    words = command(2, *argv)
    words.insert(words.index('--standalone'), '--max-restarts=1')
    process = subprocess.Popen(
        words, env={**os.environ, 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith('epoch 1  step 3/'):
            break
    for path in Path('/proc').glob('[0-9]*/environ'):
        try:
            environment = path.read_text().split('\0')
        except OSError:
            continue
        parent = (path.parent / 'stat').read_text().rsplit(')', 1)[1].split()[1]
        if 'RANK=1' in environment and parent == str(process.pid):
            os.kill(int(path.parent.name), signal.SIGKILL)
    printed, _ = process.communicate()
    assert process.returncode == 0 and f'resuming from {tmp_path}/smpconv_nano/last.pth.tar: epoch 1' in printed


@pytest.mark.slow  # minutes each
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(('recipe', 'least'), [('sequential_digits', 97.), ('permuted_digits', 95.)])
def test_sequences_of_digits_are_learned(recipe, least, tmp_path):
    run(1, '--config', ROOT / 'recipes' / f'{recipe}.yaml', '--output', tmp_path)
    assert json.loads((tmp_path / recipe / 'summary.json').read_text())['top1'] >= least


@pytest.mark.slow  # a minute or two, and more memory than it should take with others
@pytest.mark.timeout(1800)
def test_memory_of_raw_speech():
    """Forward and backward pass of the whole network, 16,000 steps, a batch of two: under 4 GB with all of Python."""
    script = f"""
import torch, smpconv_models
model = smpconv_models.create_sequence_model('smpconv_speech')
model(torch.randn(2, 1, 16000)).square().sum().backward()
assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
print({PEAK_KIB} * 1024)
"""
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4e9
