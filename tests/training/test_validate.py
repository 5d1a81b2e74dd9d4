"""Evaluations: several models in one call, each as alone; tables of classes; what is no result."""
import argparse
import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from common import randomize_
from launch import TINY
from PIL import Image
from programs import refused, run
from test_data import make_folder
from timm.data import IterableImageDataset

import train
import validate
from smpconv_models import checkpoint
from smpconv_models.training import DataOptions, DeviceOptions, EvalOptions, ModelOptions
from smpconv_models.training import validate as library
from smpconv_models.training.datasets import ReadImage, SeededIterableDataset
from smpconv_models.training.tasks import ImageTask
from smpconv_models.training.validate import (
    ClassificationMeter,
    expand_model_list,
    fill_from_checkpoint,
    per_class_results,
)

pytestmark = pytest.mark.usefixtures('no_pictures')
OPTIONS = EvalOptions(DataOptions(), ModelOptions(), DeviceOptions())
KWARGS = dict(depths=(1, 1), dims=(4, 8), kernel_sizes=(7, 5))
ON = ('--workers', 0, '--batch-size', 4)


def create(seed=0, name='smpconv_nano', num_classes=2, **kwargs):
    return randomize_(timm.create_model(name, num_classes=num_classes, **{**KWARGS, **kwargs}), seed).eval()


def save(path, model, **content):
    """A checkpoint with what train.py puts into it."""
    torch.save({
        'arch': 'smpconv_nano', 'model_kwargs': {**KWARGS, 'num_classes': model.num_classes},
        'state_dict': model.state_dict(), 'classes': None, **content}, path)
    return path


@pytest.fixture
def images(tmp_path):
    return make_folder(tmp_path / 'images')


@pytest.fixture
def files(tmp_path, images):
    """Checkpoints of two runs with different arguments, and one that tells nothing."""
    told = {'model': 'smpconv_nano', 'dataset': '', 'data_dir': str(images)}
    return [
        save(tmp_path / 'a.pth.tar', create(1), args={**told, 'img_size': 16, 'mean': [0.2], 'std': [0.1]}),
        save(tmp_path / 'b.pth.tar', create(2), args={**told, 'img_size': 24, 'interpolation': 'nearest'}),
        save(tmp_path / 'c.pth.tar', create(3)),
    ]


def told(capsys):
    """The lines of the standard output, and the results in the last one."""
    lines = capsys.readouterr().out.splitlines()
    return lines, json.loads(lines[-1])


def read_csv(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


# --- several models ---


@pytest.mark.parametrize('content', [
    dict(args=dict(seed=-1)), dict(epoch='last'), dict(epoch=1.5), dict(classes=10),
    dict(args=dict(data_dir=['a', 'b'], dataset=5, val_split=[1], img_size=[2], model=3))])
def test_wrong_values_that_options_replace_or_nobody_uses_do_no_harm(images, capsys, tmp_path, content):
    path = save(tmp_path / 'a.pth', create(), **{'args': {}, **content})
    assert run(validate.main, '--checkpoint', path, '--model', 'smpconv_nano', '--data-dir', images, '--dataset', '',
               '--split', 'val', '--img-size', 16, *ON) == 0


def test_nested_arguments_of_a_run_are_evaluated(images, capsys, tmp_path):
    block_args = {'attn_layer': 'se'}
    model = timm.create_model('test_resnet', num_classes=2, block_args=block_args)
    path = save(tmp_path / 'a.pth', model, model_kwargs={'block_args': block_args, 'num_classes': 2})
    assert run(validate.main, '--checkpoint', path, '--model', 'test_resnet', '--data-dir', images, '--img-size', 32,
               *ON) == 0


def test_what_is_left_out_of_a_checkpoint_is_reported_once(images, capsys, tmp_path, caplog):
    averaged = torch.optim.swa_utils.AveragedModel(create())
    path = save(tmp_path / 'a.pth', create(), state_dict=averaged.state_dict())
    assert run(validate.main, '--checkpoint', path, '--model', 'smpconv_nano', '--data-dir', images, *ON) == 0
    assert [record.getMessage() for record in caplog.records if 'AveragedModel' in record.getMessage()] == [
        'checkpoint: the count of torch.optim.swa_utils.AveragedModel is left out']


def test_each_of_several_models_is_evaluated_as_alone(files, images, capsys, tmp_path):
    named = ('--model', 'smpconv_nano', '--data-dir', images, *ON)
    alone = []
    for file in files:
        run(validate.main, '--checkpoint', file, *named)
        alone.append(told(capsys)[1])
    assert [result['img_size'] for result in alone] == [16, 24, 32] and len({result['loss'] for result in alone}) == 3
    assert run(validate.main, '--checkpoint', *files, *named, '--results-file', tmp_path / 'r.json') == 0
    lines, together = told(capsys)
    assert together == alone == json.loads((tmp_path / 'r.json').read_text())
    assert [line.split(': ')[0] for line in lines[:3]] == list(map(str, files))
    assert [line.split()[-1] for line in lines[4:8]] == ['checkpoint', *map(str, files)]
    assert len({line.index(line.split()[-2]) for line in lines[4:8]}) == 1  # the column of the weights


def test_options_come_before_the_description(tmp_path):
    given = replace(OPTIONS, checkpoint='a.pth', data=DataOptions(crop_pct=0.5))
    described = checkpoint.describe({'args': {
        'img_size': 16, 'crop_pct': 1., 'data_dir': str(tmp_path), 'val_split': 'test'}})
    filled = fill_from_checkpoint(given, described)
    assert (filled.data.img_size, filled.data.crop_pct, filled.data.data_dir) == (16, 0.5, str(tmp_path))
    assert filled.split == 'test'
    assert fill_from_checkpoint(given, checkpoint.describe({})) == given
    larger = checkpoint.describe({'args': {'img_size': 2048}})  # as its run was asked to
    with pytest.raises(ValueError, match=r'args\.img_size must be'):
        fill_from_checkpoint(given, larger)
    given = replace(given, data=DataOptions(img_size=2048))
    assert fill_from_checkpoint(given, larger).data.img_size == 2048


@pytest.mark.parametrize('args, option', [
    (dict(dataset='wds/x', data_dir='pipe:touch trap; echo ://', val_split='a-{0..1}.tar|10'), '--data-dir'),
    (dict(dataset='hfds/evil/x'), '--dataset'), (dict(dataset='torch/folder', data_dir='.'), '--dataset'),
    (dict(data_dir='file:///etc'), '--data-dir'), (dict(data_dir='//host/share'), '--data-dir'),
    (dict(data_dir='nowhere'), '--data-dir'), (dict(data_dir='a' * 4000), '--data-dir'),
    (dict(data_dir='.', val_split='../val'), '--split'),
    (dict(dataset='digits', val_split='a|10'), '--split'),
])
def test_a_checkpoint_does_not_locate_its_data(tmp_path, monkeypatch, capsys, args, option):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': create().state_dict(), 'args': {'model': 'smpconv_nano', **args}}, 'a.pth')
    line = refused(validate.main, capsys, '--checkpoint', 'a.pth')
    assert 'a.pth was' in line and len(line) < 500 and f'{option} ' in line
    assert [path.name for path in tmp_path.iterdir()] == ['a.pth']


@pytest.mark.parametrize('name', ['hf-hub:evil/x', 'local-dir:.', 'https://evil/x', 'none'])
def test_a_checkpoint_does_not_locate_its_model(tmp_path, capsys, name):
    torch.save({'state_dict': {'a': torch.zeros(1)}, 'args': {'model': name, 'dataset': 'digits'}}, tmp_path / 'a.pth')
    line = refused(validate.main, capsys, '--checkpoint', tmp_path / 'a.pth')
    assert f'names {name!r}, no model of this package or of timm: --model is needed' in line


@pytest.mark.parametrize('content, told', [
    (dict(model_kwargs=dict(dims=(20000,) * 4)), 'more numbers than the weights'),
    (dict(model_kwargs=dict(depths=(10 ** 5, 1, 1, 1))), 'more modules than the weights'),
    (dict(model_kwargs=dict(kernel_sizes=(4095,) * 4, points_divisor=1 << 20)), 'kernels of side 4095 take'),
    (dict(args=dict(model='resnet18'), model_kwargs=dict(num_classes=1 << 20)), 'more numbers than the weights'),
    (dict(args=dict(model='vit_tiny_patch16_224'), model_kwargs=dict(img_size=30000)), 'more numbers'),
    (dict(args=dict(model='smpconv_speech'), model_kwargs=dict(depth=10 ** 6)), 'than the weights'),
    (dict(args=dict(img_size=30000)), 'args.img_size must be a whole number from 1 to 1024, got 30000'),
    (dict(args=dict(crop_pct=1e-9)), 'args.crop_pct must be a number from 0.1 to 2, got 1e-09'),
    (dict(args=dict(model=['smpconv_nano'])), "args.model must be a text"),
    (dict(classes=[1, 2], model_kwargs={**KWARGS, 'num_classes': 2}), 'classes[0] must be a text'),
    (dict(args=dict(model='smpconv_cifar'), model_kwargs=dict(kernel_size=9999)), 'kernels of side 9999 take 3.1e+11'),
    (dict(args=dict(model='smpconv_speech'), model_kwargs=dict(sequence_length=1 << 20)), 'side 1048576 take 1.9e+09'),
])
def test_described_networks_and_images_are_bounded(tmp_path, capsys, content, told):
    args = {'model': 'smpconv_nano', 'dataset': 'seq/digits' if 'speech' in str(content) else 'digits'}
    state = {'state_dict': create().state_dict(), **content, 'args': {**args, **content.get('args', {})}}
    torch.save(state, tmp_path / 'a.pth')
    assert told in refused(validate.main, capsys, '--checkpoint', tmp_path / 'a.pth')


@pytest.mark.parametrize('checkpoints, models, expected', [
    ('ab', [], [('a', None), ('b', None)]),
    ('ab', ['smpconv_t'], [('a', 'smpconv_t'), ('b', 'smpconv_t')]),
    ('ab', ['smpconv_t', 'smpconv_b'], [('a', 'smpconv_t'), ('b', 'smpconv_b')]),
    ('', ['smpconv_t', 'smpconv_b'], [(None, 'smpconv_t'), (None, 'smpconv_b')]),
    ('', [], [(None, None)]),
    ('ab', ['smpconv_t'] * 3, 'expected 1 or 2, got 3'),
    ('a', ['smpconv_t'] * 2, 'expected 1 or 1, got 2'),
    ('ab', ['smpconv_t', 'smpconv_x'], "no model is named 'smpconv_x'"),
])
def test_models_go_with_checkpoints(tmp_path, monkeypatch, checkpoints, models, expected):
    monkeypatch.chdir(tmp_path)
    for name in checkpoints:
        torch.save({}, name)
    options = replace(OPTIONS, data=DataOptions(seed=3))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            expand_model_list(options, checkpoints, models)
    else:
        each = expand_model_list(options, checkpoints, models)
        assert [(own.checkpoint, own.model.model) for own in each] == expected
        assert all(own.data.seed == 3 for own in each)


def test_split_and_size_are_those_of_the_run_unless_given(images, capsys, tmp_path):
    """A folder of a run means its best checkpoint."""
    run(train.main, *TINY, '--data-dir', images, '--batch-size', 4, '--epochs', 1, '--warmup-epochs', 0, '--input-size',
        3, 16, 16, '--val-split', 'train', '--output', tmp_path, '--experiment', 'run')
    best = tmp_path / 'run/model_best.pth.tar'
    for options, split, size in ((), 'train', 16), (('--split', 'val', '--img-size', 32), 'val', 32), (
            ('--input-size', 3, 24, 24), 'train', 24):
        capsys.readouterr()
        assert run(validate.main, '--checkpoint', tmp_path / 'run', *ON, *options) == 0
        result = told(capsys)[1]
        assert (result['checkpoint'], result['split'], result['img_size']) == (str(best), split, size)
        if not options:
            assert result['top1'] == pytest.approx(torch.load(best, weights_only=True)['metric'], abs=1e-3)


def test_another_model_than_the_checkpoints_is_reported(files, capsys):
    line = refused(validate.main, capsys, '--checkpoint', files[0], '--model', 'resnet18', *ON)
    assert "unexpected keyword argument 'depths'" in line and line.endswith('it was trained as smpconv_nano')


def test_pretrained_models_in_a_series(images, capsys, tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(create().state_dict(), path)
    overlay = f"pretrained_cfg_overlay={{'file': {str(path)!r}, 'num_classes': 2, 'input_size': (3, 16, 16)}}"
    argv = ('--model-kwargs', overlay, *TINY[3:], '--data-dir', images)
    assert run(validate.main, '--model', 'smpconv_nano', 'smpconv_nano', '--num-classes', 2, *argv) == 0
    first, second = told(capsys)[1]
    assert first == second and first['weights'] == 'pretrained' and first['checkpoint'] == ''
    # not: a classifier made up at random
    line = refused(validate.main, capsys, '--model', 'smpconv_nano', '--num-classes', 3, *argv)
    assert 'the pretrained weights of smpconv_nano are for 2 classes, not for 3' in line


@pytest.mark.parametrize('name', ['smpconv_nano', 'smpconv_sdigits'])
def test_a_model_without_published_weights_names_the_option(capsys, name):
    dataset = 'digits' if name == 'smpconv_nano' else 'seq/digits'
    line = refused(validate.main, capsys, '--model', name, '--dataset', dataset)
    assert 'validate.py --checkpoint' in line and 'pretrained=False' not in line


@pytest.mark.parametrize('options', [(), ('--no-use-ema',), ('--reparam',)])
def test_every_kind_of_checkpoint_in_a_series(tmp_path, golden, capsys, options):
    """The same weights as we, timm's script and the original release save them; the averaged ones are others."""
    images = make_folder(tmp_path / 'images', classes=list('0123456789'), count=1)
    released = {key[11:]: value for key, value in golden('imagenet_tiny').items() if key.startswith('state_dict.')}
    plain = checkpoint.convert_original(released)
    averaged = {key: value * 0.5 if value.is_floating_point() else value for key, value in plain.items()}
    made = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), kernel_sizes=(13, 11, 9, 7), num_classes=10)
    timms = argparse.Namespace(model='smpconv_t', **{**made, 'num_classes': 10, 'model_kwargs': dict(made)}, lr=0.1)
    contents = {
        'ours': {'state_dict': plain, 'model_kwargs': made, 'classes': list('0123456789'), 'args': {'lr': 0.1}},
        'timm': {'state_dict': {f'module.{key}': value for key, value in plain.items()}, 'args': timms, 'version': 2},
        'release': {'state_dict': released, 'args': argparse.Namespace(model='x', mean=None)},
        'bare': plain,
        'average': {'state_dict': plain, 'state_dict_ema': averaged, 'model_kwargs': made},
    }
    paths = [tmp_path / name for name in contents]
    for path, content in zip(paths, contents.values()):
        torch.save(content, path)
    kwargs = [f'{key}={value!r}'.replace(' ', '') for key, value in made.items() if key != 'num_classes']
    assert run(validate.main, '--checkpoint', *paths, '--model', 'smpconv_t', '--model-kwargs', *kwargs,
               '--num-classes', 10, '--img-size', 32, '--data-dir', images, *ON, *options) == 0
    *same, average = told(capsys)[1]
    losses = [result['loss'] for result in same]
    assert losses == [losses[0]] * 4 and [result['weights'] for result in same] == ['state_dict'] * 3 + ['state dict']
    assert (average['loss'] == losses[0]) == ('--no-use-ema' in options)
    assert average['weights'] == ('state_dict' if '--no-use-ema' in options else 'state_dict_ema')


def test_timms_checkpoint_says_how_its_model_is_made(images, capsys, tmp_path):
    told_by_timm = argparse.Namespace(
        model='smpconv_nano', num_classes=2, in_chans=None, model_kwargs=KWARGS, data_dir=str(images), dataset='',
        img_size=16, input_size=None, mean=None, std=None, interpolation='', crop_pct=None)
    torch.save({'state_dict': create().state_dict(), 'args': told_by_timm}, tmp_path / 'a.pth.tar')
    assert run(validate.main, '--checkpoint', tmp_path / 'a.pth.tar', *ON) == 0
    assert told(capsys)[1]['img_size'] == 16


# --- what fails ---


def test_what_fails_is_reported_and_the_others_go_on(files, images, capsys, tmp_path):
    nan, infinite = create(4), create(5)
    nan.head.fc.bias.data[1] = float('nan')
    infinite.head.fc.bias.data[1] = float('inf')
    other = timm.create_model('smpconv_mobile31', num_classes=7)
    failing = {
        save(tmp_path / 'nan.pth', nan): 'has weights that are NaN: head.fc.bias',
        save(tmp_path / 'infinite.pth', infinite): 'are not finite: the loss is ',
        save(tmp_path / 'other.pth', other, model_kwargs={}): 'the weights fit smpconv_mobile31 with 7 classes and 3',
        save(tmp_path / 'cats.pth', create(6), classes=['cat', 'eagle']): "only in training ['eagle']",
    }
    argv = ('--model', 'smpconv_nano', '--data-dir', images, *ON, '--results-file', tmp_path / 'r.csv')
    assert run(validate.main, '--checkpoint', files[0], *failing, files[1], *argv) == 2
    printed = capsys.readouterr()
    errors = printed.err.splitlines()
    assert len(errors) == 4
    for line, (path, expected) in zip(errors, failing.items()):
        assert line.startswith('validate.py: error: ') and str(path) in line and expected in line
    results = json.loads(printed.out.splitlines()[-1])
    assert [result['checkpoint'] for result in results] == [str(files[0]), str(files[1])]
    rows = read_csv(tmp_path / 'r.csv')
    assert [dict(row) for row in rows] == [{key: str(value) for key, value in row.items()} for row in results]


def test_a_model_alone_that_is_not_finite_has_no_result(images, capsys, tmp_path):
    model = create()
    model.head.fc.weight.data[0] = float('inf')
    results = tmp_path / 'r.json'
    line = refused(validate.main, capsys, '--checkpoint', save(tmp_path / 'a.pth', model), '--model', 'smpconv_nano',
                   '--data-dir', images, *ON, '--results-file', results)
    assert f'the logits of {tmp_path}/a.pth are not finite' in line and not results.exists()


def test_results_are_written_after_each_model(files, capsys, tmp_path, monkeypatch):
    """Ctrl-C in the second evaluation."""
    def interrupted(*args, **kwargs):
        if results.exists():
            raise KeyboardInterrupt
        return evaluate_model(*args, **kwargs)

    results, evaluate_model = tmp_path / 'r.csv', validate.evaluate_model
    monkeypatch.setattr(validate, 'evaluate_model', interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(validate.main, '--checkpoint', *files[:2], *ON, '--results-file', results)
    assert stopped.value.code == 130 and capsys.readouterr().err == 'validate.py: interrupted\n'
    row, = read_csv(results)
    assert row['checkpoint'] == str(files[0])
    assert {path.name for path in tmp_path.iterdir()} == {'images', 'r.csv', *(path.name for path in files)}


def test_a_size_that_the_model_refuses_is_reported(images, capsys, tmp_path):
    path = tmp_path / 'a.pth'
    torch.save(timm.create_model('test_vit3', num_classes=2).state_dict(), path)
    line = refused(validate.main, capsys, '--checkpoint', path, '--model', 'test_vit3', '--num-classes', 2,
                   '--model-kwargs', 'img_size=160', '--img-size', 32, '--data-dir', images, *ON)
    assert "test_vit3 cannot be evaluated: Input height (32) doesn't match model" in line
    line = refused(validate.main, capsys, '--checkpoint', path, '--model', 'test_vit3', '--num-classes', 2,
                   '--img-size', 32, '--data-dir', images, *ON)
    assert 'pos_embed expected (1, 5, 96), got (1, 101, 96)' in line


@pytest.mark.parametrize('error, expected', [
    (torch.OutOfMemoryError('CUDA out of memory. Tried'), 'a.pth.tar: out of memory with --batch-size 4: CUDA'),
    (OSError(28, 'No space left on device'), 'a.pth.tar: [Errno 28] No space left on device'),
    (KeyError('a fault of the program'), None),
])
def test_errors_of_the_machine_are_one_line(files, capsys, monkeypatch, error, expected):
    def fail_first(*args):
        errors, calls[:] = calls[:1], calls[1:]
        for first in errors:
            raise first
        return evaluate(*args)

    calls, evaluate = [error], library.evaluate
    monkeypatch.setattr(library, 'evaluate', fail_first)
    argv = ('--checkpoint', *files[:2], *ON)
    if expected is None:
        with pytest.raises(KeyError):
            run(validate.main, *argv)
        return
    assert run(validate.main, *argv) == 2
    printed = capsys.readouterr()
    assert expected in printed.err and len(printed.err.splitlines()) == 1
    assert json.loads(printed.out.splitlines()[-1])[0]['checkpoint'] == str(files[1])


def test_models_of_other_images_are_not_compared(files, capsys, tmp_path):
    other = make_folder(tmp_path / 'other')
    trained = {'model': 'smpconv_nano', 'data_dir': str(other), 'img_size': 16}
    path = save(tmp_path / 'd.pth.tar', create(), args=trained)
    assert run(validate.main, '--checkpoint', files[0], path, *ON) == 2
    error = capsys.readouterr().err
    assert f'{path} is evaluated on other images than the models before it' in error
    assert f'expected {tmp_path}/images, got {other};' in error
    assert run(validate.main, '--checkpoint', files[0], path, '--data-dir', other, *ON) == 0


@pytest.mark.parametrize('argv, expected', [
    (['a.pth.tar', 'b.pth.tar', 'typo.pth'], 'expected a checkpoint file, found nothing at typo.pth'),
    (['typo.pth', '--results-file', 'r.json'], 'expected a checkpoint file, found nothing at typo.pth'),
    (['a.pth.tar', '--results-file', 'nowhere/r.json'], 'nowhere/r.json cannot be written: No such file or directory'),
    (['a.pth.tar', 'images'], 'found nothing at images/model_best.pth.tar'),
    (['a.pth.tar', 'b.pth.tar', '--model', 'smpconv_x'], "no model is named 'smpconv_x'"),
    (['a.pth.tar', 'b.pth.tar', '--per-class-results', 'c.csv'], '--per-class-results works with a single model'),
    (['a.pth.tar', 'b.pth.tar', '--confusion-matrix', 'c.png'], '--confusion-matrix works with a single model, got 2'),
    (['a.pth.tar', '--confusion-matrix', 'c.pdf'], '--confusion-matrix takes the name of a .png file, got c.pdf'),
    (['a.pth.tar', '--per-class-results', 'c.txt'], '--per-class-results takes the name of a .csv file, got c.txt'),
    (['a.pth.tar', '--per-class-results', 'c.csv', '--results-file', './c.csv'],
     '--per-class-results c.csv is the file of --results-file too'),
    (['a.pth.tar', '--results-file', 'a.pth.tar'], '--results-file a.pth.tar is the file of --checkpoint too'),
    (['a.pth.tar', '--results-file', 'images'], '/images is not a file'),
    (['a.pth.tar', '--results-file', '/dev/null'], '--results-file /dev/null is not a file'),
    (['a.pth.tar', '--confusion-matrix', 'nowhere/c.png'], 'nowhere/c.png cannot be written: No such file'),
])
def test_mistakes_are_reported_before_the_work(files, capsys, tmp_path, monkeypatch, argv, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validate, 'evaluate_model', None)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    line = refused(validate.main, capsys, '--checkpoint', *argv)
    assert line.startswith('validate.py: error: ') and expected in line
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_model_is_evaluated_from_python(files):
    evaluation = library.evaluate_model(replace(OPTIONS, checkpoint=str(files[0]), data=DataOptions(workers=0)))
    assert evaluation.result['images'] == 6 and evaluation.result['model'] == 'smpconv_nano'


# --- classes ---


def test_ties_count_alike_everywhere():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(3, (500, 10), generator=generator).float()
    tally = ClassificationMeter(torch.device('cpu'), 10)
    tally.add(logits, torch.randint(10, (500,), generator=generator))
    assert tally.confusion.trace() == tally.sums[1] and 0 < tally.sums[1] < 500


def test_rows_of_classes():
    confusion = torch.tensor([[2, 1, 1], [0, 0, 0], [0, 3, 1]])
    expected = [
        (0, 'cat', 4, 2, 50., 100., 66.6667, 'dog', 1),  # the first of two
        (1, 'dog', 0, 0, '', 0., 0., '', 0),
        (2, 'eel', 4, 1, 25., 50., 33.3333, 'dog', 3),
    ]
    rows = per_class_results(confusion, ['cat', 'dog', 'eel'])
    assert list(rows[0]) == [
        'index', 'name', 'images', 'correct', 'top1', 'precision', 'f1', 'mistaken_for', 'times']
    assert [tuple(row.values()) for row in rows] == expected
    unnamed = per_class_results(confusion)
    assert 'name' not in unnamed[0] and [row['mistaken_for'] for row in unnamed] == [1, '', 1]
    assert confusion.tolist() == [[2, 1, 1], [0, 0, 0], [0, 3, 1]]


def test_tables_and_picture_of_classes(files, capsys, tmp_path):
    table, picture = tmp_path / 'classes.csv', tmp_path / 'confusion.png'
    assert run(validate.main, '--checkpoint', files[0], *ON, '--per-class-results', table,
               '--confusion-matrix', picture, '--results-file', tmp_path / 'r.csv') == 0
    result = told(capsys)[1]
    rows = read_csv(table)
    assert [row['name'] for row in rows] == ['cat', 'dog'] and [row['images'] for row in rows] == ['3', '3']
    assert sum(int(row['correct']) for row in rows) == round(result['top1'] * 6 / 100)
    assert read_csv(tmp_path / 'r.csv') == [{key: str(value) for key, value in result.items()}]
    with Image.open(picture) as image:
        assert image.format == 'PNG'


# --- images that can't be read ---


def test_left_out_images_are_counted(files, images, capsys):
    (images / 'val' / 'cat' / '9.png').write_bytes(b'not an image')
    assert 'cat/9.png cannot be read' in refused(validate.main, capsys, '--checkpoint', files[0], *ON)
    assert run(validate.main, '--checkpoint', files[0], *ON, '--skip-unreadable') == 0
    lines, result = told(capsys)
    assert (result['images'], result['unreadable']) == (6, 1)
    assert 'of 6, without 1 that cannot be read (' in lines[0]


class Stream:
    """Gives some of the images that it says it has, as timm's readers of streams do in silence."""

    def __init__(self, said, labels):
        self.num_samples = said
        self.labels = labels

    def __len__(self):
        return self.num_samples // 2 * 2  # as for two workers

    def __iter__(self):
        return ((Image.new('RGB', (16, 16)), label) for label in self.labels)


@pytest.mark.parametrize('said, labels, options, expected', [
    (5, [0, 1, 1, 0, 1], (), 0),
    (5, [0, 1, 1], (), '2 of 5 images cannot be read (the stream ended before they came); --skip-unreadable'),
    (5, [0, 1, 1], ('--skip-unreadable',), 2),
    (3, [0, 1, 2], (), 'an image is of class 2, the model has 2 classes'),
    (3, [0, -1, 1], (), 'an image is of class -1, the model has 2 classes'),
    (0, [], (), 'there were no images to evaluate'),
])
def test_streams_must_be_whole(files, capsys, monkeypatch, said, labels, options, expected):
    dataset = SeededIterableDataset(IterableImageDataset('', reader=Stream(said, labels)), 0, ReadImage('RGB').convert)
    monkeypatch.setattr(ImageTask, 'create_dataset', lambda *args, **kwargs: dataset)
    argv = ('--checkpoint', files[0], *ON, *options)
    if isinstance(expected, str):
        assert expected in refused(validate.main, capsys, *argv)
    else:
        assert run(validate.main, *argv) == 0
        result = told(capsys)[1]
        assert (result['images'], result['unreadable']) == (len(labels), expected)


# --- the process ---


def test_openmp_is_reported_to_wait_before_torch_is_there():
    script = """
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == 'torch':
            print(os.environ.get('OMP_WAIT_POLICY'))
            sys.exit()

os.environ.pop('OMP_WAIT_POLICY', None)
sys.meta_path.insert(0, Finder())
import validate
"""
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, cwd=Path(validate.__file__).parent)
    assert (done.stdout, done.stderr) == ('passive\n', '')
