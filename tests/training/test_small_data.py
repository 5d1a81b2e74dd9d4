"""Training on a folder of photos: the split, what is trained, which weights count, when it ends."""
import csv
import json
import logging
import math
import shutil

import pytest
import timm
import torch
from launch import DIGITS, TINY
from made import make_folder
from test_run import refused, run
from torch import nn

import train
import validate
from smpconv_models import checkpoint, hub
from smpconv_models.figures.__main__ import main as draw
from smpconv_models.training import DataOptions, DeviceOptions, EvalOptions, ModelOptions, cli
from smpconv_models.training.batch_norm import accuracy_by_statistics, recalibrate_bn_, trained_norms
from smpconv_models.training.checkpointing import RunDir
from smpconv_models.training.class_folders import ClassFolders, Scan
from smpconv_models.training.dataset_factory import create_dataset
from smpconv_models.training.datasets import ResumableBatchSampler
from smpconv_models.training.factory import classifier_parameters, freeze_, load_first_weights, set_train_mode
from smpconv_models.training.validate import _check_same_images, fill_from_checkpoint, macro_averages

pytestmark = pytest.mark.usefixtures('no_pictures')
SHORT = [*TINY, '--img-size', '16', '--epochs', '1', '-b', '4', '--lr', '1e-3', '--experiment', 'run']


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Folder with a folder for each class, of 8 images each."""
    return make_folder(tmp_path_factory.mktemp('photos')) / 'train'


def rows_of(folder):
    with open(folder / 'summary.csv') as file:
        return list(csv.DictReader(file))


# --- which weights count ---


def test_short_runs_are_evaluated_as_they_are_trained(tmp_path, capsys):
    """44 steps leave running statistics and EMA weights far behind, unless both are made for so few steps."""
    assert run(train.main, *DIGITS, '--output', tmp_path, '--epochs', 2, '--model-ema', '-b', 64) == 0
    row = rows_of(tmp_path / 'run')[-1]
    assert float(row['eval_top1']) > 80 and float(row['ema_top1']) > 80
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    top1 = max(float(row['eval_top1']), float(row['ema_top1']))
    assert summary['top1'] == summary['best_top1'] == top1
    lines = capsys.readouterr().out.splitlines()
    names = {'state_dict': "model's weights", 'state_dict_ema': 'EMA weights'}
    assert f'validation top-1: {top1:.2f} % ({names[summary["weights"]]}; ' in lines[-3]
    assert f'(top-1 {top1:.2f} %, {names[summary["best_weights"]]}, epoch 1, chosen by validation top-1)' in lines[-2]


def test_an_ema_that_lags_does_not_hide_the_model(tmp_path, capsys):
    argv = [*DIGITS, '--epochs', 2, '--model-ema', '--no-model-ema-warmup', '-b', 64]
    assert run(train.main, *argv, '--output', tmp_path) == 0
    rows = rows_of(tmp_path / 'run')
    assert float(rows[-1]['ema_top1']) < 60 < float(rows[-1]['eval_top1'])
    assert "the EMA weights lag behind the model's to the end" in capsys.readouterr().out
    best = torch.load(tmp_path / 'run' / 'model_best.pth.tar', weights_only=True)
    assert best['best_weights'] == 'state_dict' and 'state_dict_ema' not in best
    assert best['metric'] == float(rows[-1]['eval_top1'])
    for name in ('model_best', 'last'):
        run(validate.main, '--checkpoint', tmp_path / 'run' / f'{name}.pth.tar', '--workers', 0)
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result['weights'] == 'state_dict' and result['top1'] == pytest.approx(best['metric'], abs=1e-3)
    last = checkpoint.load_file(tmp_path / 'run' / 'last.pth.tar')
    assert [checkpoint.select_state_dict(last, use)[1] for use in (None, True, False)] == [
        'state_dict', 'state_dict_ema', 'state_dict']
    assert checkpoint.select_state_dict({**last, 'best_weights': torch.ones(2)})[1] == 'state_dict_ema'


def test_lagging_statistics_are_reported(tmp_path, capsys):
    argv = [*DIGITS, '--epochs', 1, '--warmup-epochs', 0, '--recalibrate-bn', 0, '--bn-momentum', 0.001, '-b', 128]
    assert run(train.main, *argv, '--output', tmp_path) == 0
    line, = [line for line in capsys.readouterr().out.splitlines() if 'running statistics' in line]
    assert 'on 128 training images' in line and '--recalibrate-bn' in line
    assert float(rows_of(tmp_path / 'run')[0]['eval_top1']) < 30


def test_statistics_are_recalibrated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 2))
    batches = [torch.randn(8, 1, 4, 4) * 3 + 5 for _ in range(3)]
    norm = model[1]
    norm.momentum = 0.3
    before = [value.clone() for value in norm.buffers()]
    accuracy_by_statistics(model, batches[0], torch.zeros(8, dtype=torch.long))
    assert all(map(torch.equal, before, norm.buffers())) and not norm.training
    recalibrate_bn_([model], batches)
    maps = [model[0](batch) for batch in batches]
    torch.testing.assert_close(norm.running_mean, torch.stack([each.mean((0, 2, 3)) for each in maps]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([each.var((0, 2, 3)) for each in maps]).mean(0))
    assert norm.momentum == 0.3 and not any(module.training for module in model.modules())


# --- the split ---


def test_class_folders_alone_are_split(photos, tmp_path, capsys):
    moved = shutil.copytree(photos, tmp_path / 'moved')
    assert run(train.main, photos, *SHORT, '--output', tmp_path, '--val-split-fraction', 0.2) == 0
    assert '18 training and 6 validation samples of 3 classes' in capsys.readouterr().out
    with open(tmp_path / 'run' / 'split.csv') as file:
        rows = list(csv.DictReader(file))
    counts = {(name, split): sum(row['class'] == name and row['split'] == split for row in rows)
              for name in ('ant', 'bee', 'cow') for split in ('train', 'validation')}
    assert len({row['image'] for row in rows}) == 24 and set(counts.values()) == {6, 2}
    run(validate.main, moved, '--checkpoint', tmp_path / 'run', '--workers', 0, '--img-size', 16)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result['images'] == 6 and result['top1'] == pytest.approx(float(rows_of(tmp_path / 'run')[-1]['eval_top1']))


def test_renamed_images_do_not_change_parts_unnoticed(tmp_path, capsys):
    photos = make_folder(tmp_path / 'photos') / 'train'
    command = [photos, *SHORT, '--output', tmp_path, '--val-split-fraction', 0.2]
    assert run(train.main, *command) == 0
    split = (tmp_path / 'run/split.csv').read_text()
    for path in list((photos / 'ant').iterdir()):
        path.rename(path.with_name(f'new{path.name}'))
    line = refused(train.main, capsys, *command, '--epochs', 2)
    assert 'images were added, removed or renamed, in the training and validation part' in line
    assert (tmp_path / 'run/split.csv').read_text() == split
    run(validate.main, '--checkpoint', tmp_path / 'run', '--workers', 0)
    assert 'other images than those of the validation part in training' in ''.join(capsys.readouterr())


def test_a_split_depends_on_the_paths_below_the_root(photos, tmp_path):
    def parts(root, seed=1):
        return [
            {path[len(str(root)):] for path, _ in part.samples}
            for part in ClassFolders(Scan(str(root), {'.jpg'}).walk()).split(0.25, seed)]

    own = parts(photos)
    assert len(own[1]) == 6 and not own[0] & own[1]
    moved = shutil.copytree(photos, tmp_path / 'moved')
    assert parts(moved) == own != parts(moved, seed=2)
    shutil.copy(next((moved / 'ant').iterdir()), moved / 'ant' / 'new.jpg')
    assert len(own[0] & parts(moved)[0]) >= 17  # one image more moves at most one other


@pytest.mark.parametrize('argv, message', [
    (['PHOTOS'], '--val-split-fraction 0.2 divides a folder that has a folder for each class'),
    (['SPLITS', '--val-split-fraction', '0.2'], 'has train and val: leave out --val-split-fraction'),
    (['PHOTOS', '--val-split-fraction', '0.2', '--val-split', 'test'], "must be train, validation or all, got 'test'"),
    (['PHOTOS', '--val-split-fraction', '1'], 'must be at least 0.001 and at most 0.999'),
    (['--dataset', 'digits', '--val-split-fraction', '0.2'], 'divides a folder of class folders, got --dataset digits'),
    (['SINGLE', '--val-split-fraction', '0.2'], "classes of a single image cannot be split: ['ant', 'bee', 'cow']"),
    (['PHOTOS', '--data-dir', 'SPLITS'], '--data-dir is given twice'),
    (['PHOTOS', '--val-split-fraction', '0.2', '--freeze', 'stage'], 'no module of this name with weights'),
    (['PHOTOS', '--val-split-fraction', '0.2', '--freeze', 'backbone,head'], 'leaves nothing to train'),
    (['PHOTOS', '--val-split-fraction', '0.2', '--fit-img-size'], '--fit-img-size and --img-size or --input-size'),
    (['SPLITS', '--opt', 'adamww'], 'did you mean adamw?'), (['SPLITS', '--num-class', '3'], 'mean --num-classes?'),
    (['SPLITS', '--learning-rate', '1'], 'did you mean --lr?'), (['SPLITS', '--learning_rate', '1'], 'mean --lr?'),
])
def test_mistakes_are_one_line(photos, tmp_path, capsys, argv, message):
    for name in ('ant', 'bee', 'cow'):
        shutil.copytree(photos / name, tmp_path / 'single' / name, ignore=shutil.ignore_patterns('*[1-9].jpg'))
    places = {'PHOTOS': photos, 'SPLITS': make_folder(tmp_path / 'splits'), 'SINGLE': tmp_path / 'single'}
    argv = [places.get(word, word) for word in argv]
    assert message in refused(train.main, capsys, *SHORT, '--output', tmp_path / 'output', *argv)
    assert not (tmp_path / 'output').exists()


def test_the_last_of_several_options_counts():
    parser = train.create_parser()
    assert parser.parse_args(['--data-dir', 'a', '--data-dir', 'b']).data_dir == 'b'
    assert parser.parse_args(['a', '--data-dir', 'a']).data_dir == 'a'
    assert not hasattr(parser.parse_args(['a']), 'folder')


# --- what is trained, and how often ---


def test_frozen_modules_stay_as_they_are():
    torch.manual_seed(0)
    model = timm.create_model('smpconv_nano', depths=(1, 1), dims=(4, 8), kernel_sizes=(7, 5), num_classes=3)
    freeze_(model, 'stem,stages.0')
    set_train_mode(model)
    assert not model.stem.training and model.stages[1].training and model.training
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    recalibrate_bn_([model], [torch.randn(4, 3, 32, 32)])
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and not any(key.startswith(('stem.', 'stages.0.')) for key in changed)


def test_a_frozen_backbone_trains_its_classifier(photos, tmp_path, capsys):
    argv = [photos, *SHORT, '--val-split-fraction', 0.2, '--freeze', 'backbone', '--model-ema', '--output', tmp_path]
    assert run(train.main, *argv, '--experiment', 'one', '--epochs', 2) == 0
    first, last = (torch.load(tmp_path / 'one' / name, weights_only=True)['state_dict']
                   for name in ('model_best.pth.tar', 'last.pth.tar'))
    again = timm.create_model('smpconv_nano', depths=(1, 1), dims=(4, 8), kernel_sizes=(7, 5), num_classes=3)
    assert first.keys() == last.keys() == again.state_dict().keys()
    assert all(torch.equal(first[key], last[key]) for key in first if not key.startswith('head.fc'))
    assert 'of them frozen' in capsys.readouterr().out


def test_classes_are_balanced():
    targets = [0] * 90 + [1] * 9 + [2]
    order = ResumableBatchSampler(100, 10, 1, 0, 1, seed=0, targets=targets)
    found = [index for batch in order for _, index in batch]
    counts = [sum(targets[index] == label for index in found) for label in range(3)]
    assert len(found) == 100 and max(counts) - min(counts) <= 1
    assert len(set(found)) > 40  # images of the large class are not repeated
    order.start(1, 0)
    assert [index for batch in order for _, index in batch] != found


def test_a_data_set_without_known_classes_is_not_balanced(tmp_path, capsys):
    pytest.importorskip('datasets')
    folder = make_folder(tmp_path / 'images')
    line = refused(train.main, capsys, *SHORT, '--dataset', f'hfds/{folder}', '--balance-classes')
    assert '--balance-classes needs class indices without decoding' in line


def test_a_run_ends_when_it_no_longer_gets_better(photos, tmp_path, capsys):
    argv = [photos, *SHORT, '--val-split-fraction', 0.2, '--output', tmp_path, '--epochs', 30, '--lr', 1e-6,
            '--warmup-lr', 0, '--min-lr', 0, '--warmup-epochs', 0, '--patience', 2, '--save-top-k', 2]
    assert run(train.main, *argv) == 0
    rows, summary = rows_of(tmp_path / 'run'), json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert len(rows) == summary['epochs_done'] == summary['best_epoch'] + 3 < 30
    assert f'after {len(rows)} epochs' in capsys.readouterr().out
    scores = sorted(range(len(rows)), key=lambda epoch: -float(rows[epoch]['eval_top1']))
    assert {path.name for path in (tmp_path / 'run').glob('best-*')} == {
        f'best-{epoch}.pth.tar' for epoch in scores[:2]}
    assert run(train.main, *argv) == 0
    assert 'the run is finished already' in capsys.readouterr().out and len(rows_of(tmp_path / 'run')) == len(rows)


def test_a_default_warm_up_is_shortened(photos, tmp_path, capsys):
    assert run(train.main, photos, *SHORT, '--val-split-fraction', 0.2, '--output', tmp_path, '--epochs', 2) == 0
    assert 'the warm-up of 5 epochs is shortened to 1 of the 2 epochs' in capsys.readouterr().out


# --- weights to start from, and places ---


def test_a_classifier_of_other_classes_is_left_out(photos, tmp_path, capsys):
    other = shutil.copytree(photos, tmp_path / 'other')
    (other / 'ant').rename(other / 'elk')
    argv = [*SHORT, '--val-split-fraction', 0.2, '--output', tmp_path]
    assert run(train.main, photos, *argv, '--experiment', 'first') == 0
    first = tmp_path / 'first'
    for folder, suffix in ((photos, f'weights of {first}\n'), (other, 'without their classifier, which is of other')):
        capsys.readouterr()
        assert run(train.main, folder, *argv, '--initial-checkpoint', first, '--experiment', folder.name) == 0
        assert suffix in capsys.readouterr().out


def test_weights_for_gray_images_name_the_option(tmp_path):
    torch.save(timm.create_model('smpconv_nano', in_chans=1).state_dict(), tmp_path / 'gray.pth')
    with pytest.raises(ValueError, match='images of 1 channels, and the model takes 3: --in-chans 1 takes them'):
        load_first_weights(timm.create_model('smpconv_nano', num_classes=3), str(tmp_path / 'gray.pth'), None)


def test_a_checkpoint_is_independent_of_the_folder_of_its_model(photos, tmp_path, capsys):
    """A folder's configuration, mean and size are in the checkpoint: validate, resume, figures and convert."""
    run(train.main, photos, *SHORT, '--val-split-fraction', 0.2, '--output', tmp_path, '--mean', 0.2, '--std', 0.7,
        '--experiment', 'first')
    folder = tmp_path / 'folder'
    hub.convert(tmp_path / 'first' / 'model_best.pth.tar', folder)
    argv = [photos, '--model', f'local-dir:{folder}', '--pretrained', '--epochs', 2, '-b', 4, '--workers', 0,
            '--val-split-fraction', 0.2, '--output', tmp_path, '--experiment', 'second', '--warmup-epochs', 0]
    assert run(train.main, *argv, '--epochs', 1) == 0
    stored = torch.load(tmp_path / 'second' / 'last.pth.tar', weights_only=True)
    assert stored['arch'] == stored['args']['model'] == 'smpconv_nano' and stored['model_kwargs']['dims'] == [4, 8]
    assert stored['args']['mean'] == [0.2] * 3 and stored['args']['input_size'] == [3, 16, 16]
    moved = folder.rename(tmp_path / 'moved')
    capsys.readouterr()
    run(validate.main, photos, '--checkpoint', tmp_path / 'second', '--workers', 0)
    top1 = json.loads(capsys.readouterr().out.splitlines()[-1])['top1']
    assert top1 == pytest.approx(float(rows_of(tmp_path / 'second')[0]['eval_top1']), abs=1e-3)
    argv[2] = f'local-dir:{moved}'
    assert run(train.main, *argv) == 0
    printed = capsys.readouterr()
    assert 'resuming from' in printed.out and len(rows_of(tmp_path / 'second')) == 2
    assert draw(['kernels', '--checkpoint', str(tmp_path / 'second'), '--output', str(tmp_path / 'k.png')]) == 0
    assert hub.convert(tmp_path / 'second' / 'model_best.pth.tar', tmp_path / 'again').architecture == 'smpconv_nano'


def test_a_step_keeps_its_size(photos, tmp_path, capsys):
    argv = [photos, *SHORT, '--val-split-fraction', 0.2, '--output', tmp_path, '--warmup-epochs', 0]
    assert run(train.main, *argv, '-b', 8) == 0
    assert run(train.main, *argv, '-b', 4, '--epochs', 2) == 0
    assert '2 per epoch, global batch size 8 (4 x 2 accumulated)' in capsys.readouterr().out
    line = refused(train.main, capsys, *argv, '-b', 3, '--epochs', 3)
    assert 'global_batch_size 8 -> 3' in line and '--batch-size 8 keeps the 8 images of a step' in line


def test_only_a_finished_run_is_called_finished(photos, tmp_path, capsys):
    argv = [photos, *SHORT, '--val-split-fraction', 0.2, '--output', tmp_path, '--warmup-epochs', 0]
    assert run(train.main, *argv, '--epochs', 2) == 0
    assert 'has done 2 of its 2 epochs' not in refused(train.main, capsys, *argv, '--epochs', 1)


# --- metrics ---


def test_macro_averages():
    from sklearn.metrics import precision_recall_fscore_support
    torch.manual_seed(0)
    target, predicted = torch.randint(4, (2, 50))
    counts = [torch.bincount(each, minlength=6) for each in (target, predicted, target[target == predicted])]
    expected = precision_recall_fscore_support(target, predicted, average='macro', zero_division=0)
    found = macro_averages(*counts)
    assert list(found.values()) == pytest.approx([100 * value for value in expected[:3]])
    assert all(math.isfinite(value) for value in found.values())


def test_a_size_that_fits(photos, tmp_path, capsys):
    argv = [photos, *TINY, '--epochs', 1, '-b', 4, '--val-split-fraction', 0.2, '--output', tmp_path, '--fit-img-size']
    assert run(train.main, *argv, '--experiment', 'run') == 0
    assert 'as 3x32x32' in capsys.readouterr().out  # nano's own, as the photos are smaller than 64 pixels
    logging.getLogger('smpconv_models').setLevel(logging.NOTSET)


def test_the_command_line_overrides_the_folder_of_a_file(tmp_path):
    path = tmp_path / 'args.yaml'
    path.write_text('data_dir: A\n')
    for argv in (['--data-dir', 'B'], ['B']):
        assert cli.parse_args(train.create_parser(), ['--config', str(path), *argv]).data_dir == 'B'
    assert cli.parse_args(train.create_parser(), ['--config', str(path)]).data_dir == 'A'


def test_evaluation_takes_the_split_of_the_training(photos):
    described = checkpoint.describe({'args': {'data_dir': str(photos), 'val_split_fraction': 0.25, 'seed': 7}})

    def filled(**values):
        options = EvalOptions(DataOptions(**values), ModelOptions(), DeviceOptions(), checkpoint='a.pth')
        return fill_from_checkpoint(options, described)

    for values, expected in (
            ({}, (0.25, 7)), ({'val_split_fraction': 0.5}, (0.5, 7)), ({'seed': 3}, (0.25, 3)),
            ({'data_dir': str(photos.parent)}, (None, 42)), ({'dataset': 'digits'}, (None, 42))):
        data = filled(**values).data
        assert (data.val_split_fraction, data.seed) == expected, values
    with pytest.raises(ValueError, match=r'0.25 7, got .* 0.25 3; .*--seed name the images of all'):
        _check_same_images(filled(seed=3), filled())


def test_all_photos_can_be_evaluated(photos):
    data = DataOptions(data_dir=str(photos), val_split_fraction=0.25)
    assert [len(create_dataset(data, split, 3, False)) for split in ('train', 'validation', 'all')] == [18, 6, 24]


def test_two_classifiers_are_found():
    model = timm.create_model('deit_tiny_distilled_patch16_224', depth=1, embed_dim=12, num_heads=1, num_classes=3)
    assert {tuple(parameter.shape) for parameter in classifier_parameters(model)} == {(3, 12), (3,)}
    freeze_(model, 'backbone')
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 4


def test_statistics_of_frozen_modules_stay():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, affine=False)), nn.Conv2d(2, 2, 1))
    assert len(trained_norms(model)) == 1
    freeze_(model, '0')
    assert not trained_norms(model)


def test_files_of_the_user_are_not_removed(tmp_path):
    run_dir = RunDir(tmp_path)
    (tmp_path / 'best-of-all.pth.tar').touch()
    run_dir.keep_top([0], 0, {'state_dict': {}})
    run_dir.keep_top([1], 1, {'state_dict': {}})
    assert {path.name for path in tmp_path.glob('best-*')} == {'best-of-all.pth.tar', 'best-1.pth.tar'}


def test_an_ema_that_is_asked_for_must_be_there():
    state_dict = nn.Linear(1, 1).state_dict()
    with pytest.raises(ValueError, match='expected EMA weights, found none: leave out --use-ema'):
        checkpoint.select_state_dict({'state_dict': state_dict}, use_ema=True)
    assert checkpoint.select_state_dict({'state_dict': state_dict})[1] == 'state_dict'


def test_metadata_from_outside_is_bounded():
    state_dict = nn.BatchNorm2d(2).state_dict()
    state_dict._metadata[''] = {'version': 'x', 'base_size': torch.ones(3)}
    nn.BatchNorm2d(2).load_state_dict(checkpoint.select_state_dict({'state_dict': state_dict})[0])


@pytest.mark.parametrize('option', ['--val-split-fraction=0.2', '--fit-img-size'])
def test_options_of_images_are_not_for_sequences(tmp_path, capsys, option):
    line = refused(train.main, capsys, '--dataset', 'seq/digits', '--model', 'smpconv_sdigits', option,
                   '--output', tmp_path / 'output')
    assert f'{option.partition("=")[0]} is for images' in line
