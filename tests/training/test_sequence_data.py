"""Training on sequences: the same program and guarantees, and what doesn't go with them."""
import signal

import pytest
import torch
from launch import differences
from made import make_mnist
from programs import refused, run
from test_resume import resumed

import train
import validate

TINY = [
    '--model', 'smpconv_sdigits', '--model-kwargs', 'depth=1', 'dim=4', 'num_points=5', '--workers', '0', '--dataset',
    'seq/permuted-digits', '--epochs', '2', '--warmup-epochs', '1', '--batch-size', '64', '--lr', '4e-3', '--opt',
    'adam']
EVERYTHING = [
    *TINY, '--model-ema', '--model-ema-decay', '0.9', '--clip-grad', '5', '--mixup', '0.2', '--grad-accum-steps', '2',
    '--random-crop-pad', '1', '--hflip', '0.3', '--cutmix', '0']


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """The folder of an unbroken run."""
    output = tmp_path_factory.mktemp('straight')
    assert run(train.main, *EVERYTHING, '--output', output, '--experiment', 'run') == 0
    return output / 'run'


def test_a_run_learns_and_leaves_its_results(straight):
    names = {path.name for path in straight.iterdir()}
    assert {'summary.csv', 'summary.json', 'summary.png', 'curves.png', 'model_best.pth.tar'} <= names
    loaded = torch.load(straight / 'last.pth.tar', weights_only=True)
    radii = [value for key, value in loaded['state_dict'].items() if key.endswith('.radius')]
    assert radii and all((radius >= 1e-4).all() and (radius <= 1).all() for radius in radii)
    rates = {group['lr_scale'] for group in loaded['optimizer']['param_groups']}
    assert rates == {1., 0.1}
    losses = [row['train_loss'] for row in loaded['progress']['rows']]
    assert losses[1] < losses[0]


def test_a_stopped_run_ends_in_the_same_bits(straight, tmp_path, capsys, signal_at):
    command = [*EVERYTHING, '--output', tmp_path, '--experiment', 'run']
    signal_at(signal.SIGTERM, 1408 + 720 + 500)
    assert run(train.main, *command) == 143
    progress = torch.load(tmp_path / 'run/last.pth.tar', weights_only=True)['progress']
    assert progress['epoch'] == 1 and 0 < progress['step'] < 11 and (tmp_path / 'run/curves.png').exists()
    assert run(train.main, *command, '--workers', 1) == 0
    assert resumed(tmp_path / 'run', capsys)
    assert differences(straight, tmp_path / 'run') == []


def test_validate_repeats_the_accuracy(straight, capsys):
    loaded = torch.load(straight / 'model_best.pth.tar', weights_only=True)
    assert run(validate.main, '--checkpoint', straight, '--workers', '0') == 0
    printed = capsys.readouterr().out
    assert f'top-1 {loaded["metric"]:.2f} %' in printed and 'of 360 (smpconv_sdigits' in printed


def test_mnist_from_its_files(tmp_path):
    make_mnist(tmp_path / 'data')
    kwargs = ['--model-kwargs', 'depth=1', 'dim=4', 'num_points=5']
    assert run(
        train.main, '--model', 'smpconv_smnist', *kwargs, '--dataset', 'seq/mnist', '--data-dir', tmp_path / 'data',
        '--val-split', 'test', '--epochs', '1', '--warmup-epochs', '0', '--batch-size', '20', '--random-crop-pad', '2',
        '--workers', '0', '--output', tmp_path) == 0
    (tmp_path / 'data').rename(tmp_path / 'moved')
    again = ['--checkpoint', tmp_path / 'smpconv_smnist', '--data-dir', tmp_path / 'moved', '--workers', '0']
    assert run(validate.main, *again) == 0


@pytest.mark.parametrize(('argv', 'message'), [
    (['--model', 'smpconv_nano'], 'needs a network for sequences'),
    (['--model', 'smpconv_sdigit'], 'did you mean smpconv_sdigits?'),
    (['--channels-last'], '--channels-last is for images, and seq/permuted-digits has sequences'),
    (['--mean', '0.5'], '--mean is for images'), (['--cutmix', '1'], '--cutmix is for images'),
    (['--img-size', '32'], '--img-size is for images'), (['--aa', 'rand-m9'], '--aa is for images'),
    (['--dataset', 'seq/digit'], "got 'digit'; did you mean digits?"),
    (['--dataset', 'seq/characters'], 'needs a folder for its files: --data-dir'),
    (['--model', 'smpconv_smnist'], r'made for sequences of (channels, steps) (1, 784)'),
    (['--in-chans', '3'], 'in_chans=1 sequence_length=64 makes one for them'),
    (['--in-chans', '3', '--model-kwargs', 'in_chans=1'], '--model-kwargs in_chans=1 contradicts the 3'),
    (['--random-crop-pad', '8'], '--random-crop-pad must be below the side of the images, 8, got 8'),
    (['--dataset', 'digits'], 'smpconv_sdigits is for sequences: expected --dataset seq/NAME'),
    (['--pretrained'], 'there are no pretrained weights'), (['--drop-path', '0.1'], 'drop_path_rate'),
    (['--val-split', 'nope'], "got 'nope'"), (['--num-classes', '3'], 'has 10 classes, the model 3'),
    (['--dataset', 'seq/mnist', '--data-dir', '/nowhere', '--model', 'smpconv_smnist'], '--dataset-download'),
])
def test_refusals(argv, message, tmp_path, capsys):
    line = refused(train.main, capsys, *TINY, *argv, '--output', tmp_path)
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_sequence_that_is_not_finite_is_named(tmp_path, capsys, monkeypatch):
    """Before the first step, with nothing written."""
    from smpconv_models.data import images
    original = images.InMemorySequences.__init__

    def damaged(self, what, classes, data, *rest, **kwargs):
        data = data.float()
        data[7, 0, 3] = torch.nan
        original(self, what, classes, data, *rest, **kwargs)

    monkeypatch.setattr(images.InMemorySequences, '__init__', damaged)
    line = refused(train.main, capsys, *TINY, '--output', tmp_path)
    assert 'NaN or inf in 1 of' in line and '7' in line
    assert list(tmp_path.iterdir()) == []
