"""train.py and validate.py, as a user calls them."""
import contextlib
import csv
import io
import json

import pytest
import timm
import torch
from launch import TINY
from programs import ROOT, refused, run
from test_data import make_folder

import train
import validate


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Return the folder of a short run on the digits with many options, and the printed text."""
    output = tmp_path_factory.mktemp('digits')
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run(
            train.main, '--config', ROOT / 'recipes' / 'digits.yaml', *TINY, '--output', output, '--epochs', 2,
            '--warmup-epochs', 1, '--img-size', 8, '--mixup', 0.2, '--cutmix', 1, '--batch-size', 128,
            '--grad-accum-steps', 2, '--clip-grad', 1, '--drop-path', 0.1, '--amp', '--amp-dtype', 'bfloat16') == 0
    return output / 'digits', printed.getvalue()


def test_a_run_leaves_its_results(digits):
    folder, printed = digits
    names = {path.name for path in folder.iterdir()}
    assert {name for name in names if not name.startswith('.')} == {
        'args.yaml', 'summary.csv', 'summary.json', 'curves.png', 'summary.png', 'last.pth.tar', 'previous.pth.tar',
        'model_best.pth.tar'}
    with open(folder / 'summary.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['epoch'] for row in rows] == ['0', '1']
    lines = printed.splitlines()
    assert [line.partition(':')[0] for line in lines[:4]] == ['device', 'data', 'model', 'steps']
    assert '1437 training and 360 validation samples of 10 classes, as 1x' in lines[1]
    assert [line.split()[0] for line in lines[4:7]] == ['epoch', '0', '1']
    scores = [max(float(row['eval_top1']), float(row['ema_top1'])) for row in rows]
    assert f'validation top-1: {scores[1]:.2f} % (' in lines[-3]
    assert lines[-2].startswith(f'best checkpoint: {folder / "model_best.pth.tar"} (top-1 {max(scores):.2f} %, ')
    assert lines[-1] == f'picture: {folder / "summary.png"}'
    checkpoint = torch.load(folder / 'last.pth.tar', weights_only=True)
    radii = [value for key, value in checkpoint['state_dict'].items() if key.endswith('.radius')]
    assert radii and all((radius >= 1e-3).all() and (radius <= 1).all() for radius in radii)
    assert checkpoint['classes'] == list('0123456789')


def test_validate_repeats_the_accuracy(digits, capsys, tmp_path):
    folder, _ = digits
    best = torch.load(folder / 'model_best.pth.tar', weights_only=True)
    results = tmp_path / 'results.json'
    assert run(validate.main, '--checkpoint', folder / 'model_best.pth.tar', '--workers', 0,
               '--amp', '--amp-dtype', 'bfloat16', '--results-file', results) == 0
    line, text = capsys.readouterr().out.splitlines()
    result = json.loads(text)
    assert result['top1'] == pytest.approx(best['metric'], abs=1e-3) and result['images'] == 360
    assert f'top-1 {result["top1"]:.2f} %' in line and json.loads(results.read_text()) == result


def test_validate_takes_either_weights_and_reparameterizes(digits, capsys):
    folder, _ = digits
    found = {}
    for options in ((), ('--use-ema',), ('--no-use-ema',), ('--reparam',)):
        run(validate.main, '--checkpoint', folder / 'last.pth.tar', '--workers', 0, *options)
        found[options] = json.loads(capsys.readouterr().out.splitlines()[1])
    better = json.loads((folder / 'summary.json').read_text())['weights']
    assert found['--use-ema',]['weights'] == 'state_dict_ema' and found['--no-use-ema',]['weights'] == 'state_dict'
    assert found[()]['weights'] == better and found['--use-ema',]['loss'] != found['--no-use-ema',]['loss']
    assert found['--reparam',]['loss'] == pytest.approx(found[()]['loss'], rel=1e-4)


def test_a_saved_recipe_trains_again(digits, tmp_path):
    assert run(train.main, '--config', digits[0] / 'args.yaml', '--output', tmp_path, '--epochs', 1) == 0
    rows = [(path / 'summary.csv').read_text().splitlines() for path in (digits[0], tmp_path / 'digits')]
    assert rows[0][0] == rows[1][0] and len(rows[1]) == 2


@pytest.mark.parametrize('model, workers', [('test_resnet', 1), ('test_vit', 0)])  # the latter has a fixed input size
def test_other_models_of_timm_train_and_evaluate(tmp_path, capsys, model, workers):
    folder = make_folder(tmp_path / 'data', classes=('a', 'b', 'c'))
    run(train.main, '--model', model, '--data-dir', folder, '--batch-size', 4, '--epochs', 1, '--workers', workers,
        '--warmup-epochs', 0, '--img-size', 32, '--output', tmp_path / 'output', '--experiment', 'run')
    assert torch.load(tmp_path / 'output/run/last.pth.tar', weights_only=True)['classes'] == ['a', 'b', 'c']
    run(validate.main, '--checkpoint', tmp_path / 'output/run/last.pth.tar', '--workers', 0)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result['images'], result['img_size']) == (9, 32)


def test_a_colour_model_trains_on_digits_by_an_optimizer_without_an_option(tmp_path, capsys):
    assert run(
        train.main, *TINY, '--dataset', 'digits', '--img-size', 8, '--epochs', 1, '--warmup-epochs', 0, '--opt', 'sgd',
        '--opt-betas', 0.9, 0.99, '--sched', 'step', '--decay-epochs', 1, '--batch-size', 512, '--output', tmp_path
    ) == 0
    assert '--opt sgd has no betas: --opt-betas [0.9, 0.99] is ignored' in capsys.readouterr().out


@pytest.mark.parametrize('argv, told', [
    ([], '--model is needed'),
    (['--model', 'smpconv_x'], "no model is named 'smpconv_x'; this package has ['smpconv_b'"),
    (['--model', 'smpconv_bb'], 'for sequences; did you mean smpconv_b?'),
    (['--model', 'smpconv_t.x'], "no weights are named 'smpconv_t.x'; timm knows ['smpconv_t.in1k']"),
    ([*TINY[:2], '--random-crop-pad', '2'], '--random-crop-pad takes images of the input size, 32x32, got 8x8'),
    ([*TINY[:2], '--num-classes', '10', '--model-kwargs', 'num_classes=20'], 'num_classes=20 contradicts the 10 that'),
    ([*TINY[:2], '--model-kwargs', 'nothing=1'], "unexpected keyword argument 'nothing'"),
    ([*TINY[:2], '--model-kwargs', 'kernel_sizes=(4,4,4,4)'], 'kernel size must be odd and positive, got 4'),
    ([*TINY[:2], '--model-kwargs', 'points_divisor=500'], 'points_divisor must leave at least one point'),
    ([*TINY, '--num-classes', '7'], 'the data set has 10 classes, the model 7'),
    ([*TINY, '--batch-size', '0'], '--batch-size: must be at least 1 and at most 1e+09, got 0'),
    ([*TINY, '--batch-size', '2000'], '--batch-size must not exceed the 1437 training images, got 2000'),
    ([*TINY, '--batch-size', '33', '--mixup', '0.2'], '--batch-size must be even with Mixup or CutMix, got 33'),
    ([*TINY, '--grad-accum-steps', '100'], '--batch-size must not exceed the 1437 training images, got 128 x 100'),
    ([*TINY, '--global-batch-size', '100'], '--global-batch-size must be a multiple of --batch-size 128 x 1 ranks'),
    ([*TINY, '--global-batch-size', '256', '--grad-accum-steps', '3'], '--grad-accum-steps 3 contradicts'),
    ([*TINY, '--resume', 'nowhere.pth'], 'expected a checkpoint file, found nothing at nowhere.pth'),
    ([*TINY, '--initial-checkpoint', 'nowhere.pth'], 'expected a checkpoint file, found nothing at nowhere.pth'),
    ([*TINY, '--device', 'cuda:77'], '--device cuda:77 cannot be used'),
    ([*TINY, '--dataset', '', '--data-dir', 'nowhere'], 'nowhere: no such folder'),
    ([*TINY, '--train-split', 'test'], 'split of the digits must be one of'),
    ([*TINY, '--lr', 'nan'], 'argument --lr: must be above 0 and at most 1e+06, got nan'),
    ([*TINY, '--smoothing', '1.5'], 'argument --smoothing: must be at least 0 and at most 0.999, got 1.5'),
    ([*TINY, '--warmup-epochs', '-1'], 'argument --warmup-epochs: must be at least 0 and at most 1e+09, got -1'),
    ([*TINY, '--img-size', '0'], 'argument --img-size: must be at least 1 and at most 1e+09, got 0'),
    ([*TINY, '--epochs', 'ten'], "argument --epochs: invalid whole number value: 'ten'"),
    ([*TINY, '--interpolation', 'nonsense'], "argument --interpolation: invalid choice: 'nonsense'"),
    ([*TINY, '--aa', 'nonsense'], 'the augmentation is not supported'),
    ([*TINY, '--opt', 'nonsense'], '--opt nonsense with its defaults cannot be created'),
    ([*TINY, '--opt-betas', '0.9'], 'cannot be created: expected 2 --opt-betas, got 1'),
    ([*TINY, '--min-lr', '1'], '--min-lr must not exceed --lr 0.001, got 1.0'),
    ([*TINY, '--warmup-lr', '1'], '--warmup-lr must not exceed --lr 0.001, got 1.0'),
    ([*TINY, '--epochs', '9' * 400], 'argument --epochs: must be at least 1 and at most 1e+09, got 999'),
    ([*TINY, '--drop-path', '0.1', '--model-kwargs', 'drop_path_rate=0.2'], 'drop_path_rate=0.2 contradicts the 0.1'),
    ([*TINY, '--input-size', '1', '16', '16', '--img-size', '32'], '--img-size 32 contradicts --input-size [1, 16,'),
    (['--model', 'test_vit3', '--model-kwargs', 'img_size=160', '--img-size', '32'],
     "test_vit3 cannot take images of (1, 32, 32): Input height (32) doesn't match model (160).; see --img-size"),
    ([*TINY, '--model-kwargs', 'depths=(1,1'], 'argument --model-kwargs: expected a value of Python, got depths=(1,1'),
    ([*TINY, '--opt', 'adahessian'], 'the optimizer takes second derivatives, which a step does not compute here'),
    ([*TINY[:2], '--model-kwargs', 'depths'], 'argument --model-kwargs: expected KEY=VALUE, got depths'),
    ([*TINY, '--mean', '1', '2'], '--mean takes 1 value, got [1.0, 2.0]'),
    ([*TINY, '--input-size', '3', '16', '16'], '--in-chans 1 contradicts --input-size [3, 16, 16]'),
    ([*TINY, '--scale', '1', '0.1'], '--scale takes the smaller value first'),
    ([*TINY, '--model-kwargs', 'num_classes=5'], 'the data set has 10 classes, the model 5'),
    ([*TINY, '--dataset', 'cifar10'], "--dataset must be 'digits' or begin with one of"),
    ([*TINY, '--device', 'meta'], '--device meta cannot be used'),
    ([*TINY, '--experiment', '../escape'], '--experiment must be the name of a folder, got ../escape'),
    ([*TINY, '--output', '/proc/nothing'], '--output /proc/nothing/smpconv_nano cannot be written to'),
    ([*TINY, '--torchcompile', 'nonsense'], '--torchcompile must be one of'),
    ([*TINY, '--experiment', '..'], '--experiment must be the name of a folder, got ..'),
    ([*TINY, '--nonsense'], 'unrecognized arguments: --nonsense'),
    ([*TINY, '--in-chans', '4'], 'got in_chans 4'),
    (['--model', 'smpconv_mobile31', '--pretrained'],
     'no pretrained weights except in files: validate.py --checkpoint, train.py --initial-checkpoint'),
    (['--model', 'smpconv_t', '--pretrained'], 'smpconv_t.in1k/model.safetensors cannot be downloaded from http://127'),
    (['--config', 'nowhere.yaml'], '--config nowhere.yaml cannot be read'),
])
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys, argv, told):
    line = refused(train.main, capsys, '--dataset', 'digits', '--in-chans', 1, '--output', tmp_path / 'output', *argv)
    assert line.startswith('train.py: error: ') and told in line
    assert list(tmp_path.iterdir()) == []


def test_weights_to_start_from_are_finite(tmp_path, capsys):
    weights = timm.create_model(
        'smpconv_nano', depths=(1, 1), dims=(4, 8), kernel_sizes=(7, 5), num_classes=10, in_chans=1)
    with torch.no_grad():
        weights.stages[0].blocks[0].mixer.large_kernel.large.conv.coords[0, 0] = torch.nan
    torch.save(weights.state_dict(), tmp_path / 'nan.pth')
    line = refused(
        train.main, capsys, *TINY, '--dataset', 'digits', '--in-chans', 1, '--initial-checkpoint', tmp_path / 'nan.pth',
        '--output', tmp_path / 'output')
    assert 'nan.pth: the checkpoint has weights that are not finite: stages.0.blocks.0.mixer.large_kernel' in line
    assert not (tmp_path / 'output').exists()


@pytest.mark.parametrize('content, told', [
    (None, 'found nothing at'),
    (b'', 'is empty'),
    (b'<html>sign in</html>', 'is an HTML or XML page'),
    (b'PK\x03\x04' + b'0' * 200, 'is a truncated or damaged checkpoint'),
    (b'version https://git-lfs.github.com/spec/v1\n', 'is a Git LFS pointer'),
])
def test_validate_refuses_what_is_no_checkpoint(tmp_path, capsys, content, told):
    path = tmp_path / 'checkpoint.pth'
    if content is not None:
        path.write_bytes(content)
    line = refused(validate.main, capsys, '--checkpoint', path, '--dataset', 'digits', '--model', 'smpconv_nano')
    assert line.startswith('validate.py: error: ') and told in line and str(path) in line


@pytest.mark.parametrize('options, told', [
    (['--model', 'smpconv_mobile31'], 'the checkpoint does not fit the model'),
    (['--dataset', '', '--data-dir', '.'], "only in evaluation ['cat', 'dog']"),
    (['--data-dir', '.'], "only in evaluation ['cat', 'dog']"),  # not the digits again, as named in the checkpoint
])
def test_validate_refuses_another_model_or_data_set(digits, capsys, tmp_path, monkeypatch, options, told):
    monkeypatch.chdir(make_folder(tmp_path))
    assert told in refused(validate.main, capsys, '--checkpoint', digits[0] / 'last.pth.tar', *options)


@pytest.mark.slow  # two minutes of training, more on a busy machine
@pytest.mark.timeout(1800)
def test_the_digits_recipe_reaches_its_accuracy(tmp_path, capsys):
    run(train.main, '--config', ROOT / 'recipes' / 'digits.yaml', '--output', tmp_path)
    checkpoint = torch.load(tmp_path / 'digits' / 'last.pth.tar', weights_only=True)
    accuracy = checkpoint['progress']['rows'][-1]['ema_top1']
    assert accuracy >= 98.5
    run(validate.main, '--checkpoint', tmp_path / 'digits' / 'last.pth.tar')
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['top1'] == pytest.approx(accuracy, abs=1e-3)


def test_a_pretrained_model_that_could_not_be_made_again_is_refused(tmp_path, capsys):
    """Its checkpoints would fit no model that their arguments make."""
    weights = timm.create_model('smpconv_nano', num_classes=10, in_chans=1)
    torch.save(weights.state_dict(), tmp_path / 'weights.pth')
    overlay = f"pretrained_cfg_overlay={{'file': {str(tmp_path / 'weights.pth')!r}, 'num_classes': 10, " \
              "'input_size': (1, 32, 32)}"
    command = [
        '--model', 'smpconv_nano', '--dataset', 'digits', '--in-chans', 1, '--pretrained', '--epochs', 1,
        '--warmup-epochs', 0, '--batch-size', 512, '--workers', 0, '--output', tmp_path / 'output', '--model-kwargs']
    line = refused(train.main, capsys, *command, overlay, 'kernel_sizes=(29,25,13,9)')
    assert 'is another model without --pretrained' in line and 'take kernel_scale' in line
    assert not (tmp_path / 'output').exists()
