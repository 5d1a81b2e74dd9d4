"""Ablations: the settings of the paper, one run for each, and the files with the results."""
import csv
import json

import pytest
import timm
import torch
import yaml
from PIL import Image
from programs import ROOT, load, refused

from smpconv_models.training import Trainer, TrainingInterrupted

script = load('experiments/ablations')
TINY = [
    '--tables', '6', '--seeds', '1', '--epochs', '1', '--warmup-epochs', '0', '--batch-size', '720', '--model-kwargs',
    'kernel_size=5', 'depths=(1,)', 'dims=(2,)', 'small_kernel_size=0']


def base_of(*arguments):
    args, args.others = script.create_parser().parse_known_args(list(arguments))
    return script.training_options(args)


def values(table, name, kernel_size=33):
    return [script.model_kwargs(setting.varied, kernel_size)[name] for setting in script.SETTINGS[table]]


# --- the settings ---


def test_settings_are_the_papers():
    assert values(6, 'learned') == [[], ['radius'], ['coords'], ['coords', 'radius']]
    assert values(7, 'coords_std') == [0.05, 0.2, 0.3, 0.5]
    assert values(8, 'init_radius') == [0.12, 0.18, 0.24, 0.3]
    assert values(9, 'num_points') == [4, 8, 16, 32, 64]
    assert {table: [setting.paper_top1 for setting in settings] for table, settings in script.SETTINGS.items()} == {
        6: [90.92, 91.35, 92.47, 93.00], 7: [93.00, 92.24, 91.84, 91.51], 8: [93.00, 92.36, 92.06, 91.76],
        9: [92.56, 92.28, 93.00, 92.84, 92.21]}


def test_the_network_of_the_paper_has_its_parameters():
    """16 points have 489,646; the table's numbers are rounded to thousands."""
    for setting in script.SETTINGS[9]:
        model = timm.create_model('smpconv_cifar', device='meta', **script.model_kwargs(setting.varied, 33))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        assert f'{parameters / 1e3:.0f}k' == setting.paper_parameters


def test_each_setting_differs_in_one_parameter_and_the_base_is_in_each_table():
    base = script.model_kwargs({}, 33)
    for settings in script.SETTINGS.values():
        differ = [
            [key for key, value in script.model_kwargs(setting.varied, 33).items() if value != base[key]]
            for setting in settings]
        assert differ.count([]) == 1 and all(len(keys) <= 1 for keys in differ)
    names = [script.name_of(script.model_kwargs(setting.varied, 33)) for table in (6, 7, 8, 9)
             for setting in script.SETTINGS[table]]
    assert len(set(names)) == len(names) - 3 == 14


def test_radii_of_the_digits_are_in_range():
    kernel_size = base_of().model.model_kwargs['kernel_size']
    assert values(8, 'init_radius', kernel_size) == [0.36, 0.54, 0.72, 0.9]


def test_the_recipe_of_cifar10_is_the_papers():
    values = base_of('--config', str(ROOT / 'recipes' / 'cifar10.yaml')).as_dict()
    assert tuple(values[name] for name in ('lr', 'epochs', 'warmup_epochs', 'batch_size', 'weight_decay', 'opt')) == (
        0.005, 210, 10, 64, 1e-5, 'adam')
    assert (values['dataset'], values['val_split'], values['model_kwargs']) == ('torch/cifar10', 'test', {})


# --- the command ---


def run_tiny(folder, *more):
    return script.main([*TINY, '--output', str(folder / 'out'), '--runs', str(folder / 'runs'), *more])


def test_files_are_complete_and_no_run_is_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(script.SETTINGS, 6, script.SETTINGS[6][2:3])  # each takes seconds
    assert run_tiny(tmp_path) == 0
    printed = capsys.readouterr()
    out = tmp_path / 'out'
    assert sorted(path.name for path in out.iterdir()) == sorted(script.FILES)
    with open(out / 'ablations.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['setting'], row['learned'], row['seed'], row['paper_top1']) for row in rows] == [
        ('C: coordinates', 'coords', '0', '92.47')]
    row, folder = rows[0], tmp_path / 'runs' / 'coords_std0.05_radius0.8_points16_epochs1_seed0'
    assert yaml.safe_load((folder / 'args.yaml').read_text())['model_kwargs']['learned'] == ['coords']
    summary = json.loads((folder / 'summary.json').read_text())
    assert (summary['top1'], summary['parameters']) == (float(row['top1']), int(row['parameters']))
    with open(folder / 'summary.csv', newline='') as file:
        assert float(list(csv.DictReader(file))[-1]['eval_loss']) == pytest.approx(float(row['loss']), abs=1e-4)
    text = (out / 'ablations.md').read_text()
    assert f'| C: coordinates | {float(row["top1"]):.2f} | {float(row["loss"]):.4f} | 92.47 |' in text
    assert text.split('| setting')[1].splitlines()[2] in printed.out
    with Image.open(out / 'ablations.png') as picture:
        assert picture.format == 'PNG'
    weights = {path: path.stat().st_mtime_ns for path in (tmp_path / 'runs').rglob('*.pth.tar')}
    monkeypatch.setattr(torch.Tensor, 'backward', lambda *args, **kwargs: pytest.fail('it trained again'))
    assert run_tiny(tmp_path) == 0
    assert capsys.readouterr().out == printed.out
    assert weights == {path: path.stat().st_mtime_ns for path in (tmp_path / 'runs').rglob('*.pth.tar')}


def test_settings_of_several_tables_are_trained_once(tmp_path, monkeypatch):
    done = []

    def run_one(base, kwargs, seed, folder):
        done.append((script.name_of(kwargs), seed))
        return script.Result(90. + seed, 0.3, 91., 100 * kwargs['num_points'])

    monkeypatch.setattr(script, 'run_one', run_one)
    assert script.main(['--seeds', '2', '--output', str(tmp_path), '--runs', str(tmp_path / 'runs')]) == 0
    assert len(done) == len(set(done)) == 28
    with open(tmp_path / 'ablations.csv', newline='') as file:
        assert len(list(csv.DictReader(file))) == 2 * (4 + 4 + 4 + 5)
    text = (tmp_path / 'ablations.md').read_text()
    assert '| 2.5 x 4/k = 0.9 | 90.50 ± 0.71 | 0.3000 ± 0.0000 | 91.76 |' in text
    assert '| 64 points | 90.50 ± 0.71 | 0.3000 ± 0.0000 | 92.21 | 6,400 | 1447k |' in text


def test_errors_are_one_line_and_train_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr(Trainer, 'train', lambda trainer: pytest.fail('it trained'))
    for arguments, message in (
            (('--tables', '5'), 'invalid choice: 5'), (('--seeds', '0'), 'must be at least 1 and'),
            (('--epochs', '0'), 'must be at least 1'), (('--tabels', '6'), '--tabels'),
            (('--seed', '7'), '--seed is set by the tables'), (('--model', 'resnet18'), '--model is set by the tables'),
            (('--model-kwargs', 'num_points=3'), 'the tables set num_points'),
            (('--config', tmp_path / 'none.yaml'), 'none.yaml cannot be read'), (('--device', 'tpu9'), 'tpu9'),
            (('--output', tmp_path / 'file'), str(tmp_path / 'file')),
            (('--runs', tmp_path / 'file'), str(tmp_path / 'file'))):
        line = refused(
            script.main, capsys, '--output', tmp_path / 'out', '--runs', tmp_path / 'runs', *arguments)
        assert line.startswith('ablations.py: error: ') and message in line


@pytest.mark.parametrize(('error', 'code', 'message'), [
    (KeyboardInterrupt(), 130, 'interrupted; finished runs are in'),
    (TrainingInterrupted(15), 143, 'stopped by SIGTERM; finished'),
    (FloatingPointError('NaN'), 1, 'error: neither_std0.05_radius0.8_points16_epochs1_seed0: NaN'),
])
def test_a_run_that_ends_early_is_one_line(tmp_path, capsys, monkeypatch, error, code, message):
    def train(trainer):
        raise error

    monkeypatch.setattr(Trainer, 'train', train)
    line = refused(lambda _: run_tiny(tmp_path), capsys, code=code)
    assert line.startswith(f'ablations.py: {message}')
    assert not list((tmp_path / 'out').iterdir())
