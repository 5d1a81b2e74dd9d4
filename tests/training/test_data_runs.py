"""Data sets of every form as a user trains and evaluates on them, on one rank and on two."""
import csv
import json
import logging
import os
import unicodedata
from contextlib import nullcontext

import launch
import made
import numpy as np
import pytest
import torch
from PIL import Image
from programs import ROOT, error_line, refused
from test_data import make_folder, options
from test_image_reading import GRAY, files
from test_sources import SOURCES, TRAIN, VAL, source

import train
import validate
from smpconv_models.training.dataset_factory import create_dataset
from smpconv_models.training.datasets import ReadImage
from smpconv_models.training.distributed import DistributedContext
from smpconv_models.training.trainer import _check_same_data

pytestmark = pytest.mark.usefixtures('logs_of_rank_0', 'quick_streams', 'no_pictures')


def command(data_dir, output, *more):
    return [*map(str, (
        *launch.TINY, '--data-dir', data_dir, '--img-size', '16', '--batch-size', '4', '--epochs', '1',
        '--warmup-epochs', '0', '--output', output, '--experiment', 'run', *more))]


@pytest.mark.slow  # 20 s on idle cores: four processes with hash seeds of their own
def test_ranks_with_different_hash_seeds_train_on_the_same_labels(tmp_path):
    """With timm's order the seeds 0 and 3 exchange A with a, and B with b."""
    make_folder(tmp_path / 'images', classes=('A', 'a', 'B', 'b'), count=8)
    (tmp_path / 'images/train/.hidden').mkdir()
    seeds = [{'PYTHONHASHSEED': '0'}, {'PYTHONHASHSEED': '3'}]
    ends = launch.finish(launch.start(command(tmp_path / 'images', tmp_path), ranks=2, environments=seeds))
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert [out.count('skipped 1 hidden') for _, out, _ in ends] == [1, 0]
    summary = json.loads((tmp_path / 'run/summary.json').read_text())
    assert summary['classes'] == ['A', 'a', 'B', 'b']
    for seed in seeds:
        argv = ['--checkpoint', tmp_path / 'run', '--workers', '0']
        (code, _, error), = launch.finish(launch.start(argv, script=ROOT / 'validate.py', environments=[seed]))
        assert code == 0, error


@pytest.mark.parametrize('classes, count, message', [
    (['cat', 'dgo'], 6, r"classes of rank 0 and rank 1 .*only in rank 0 \['dgo'\], only in rank 1 \['dog'\]"),
    (['dog', 'cat'], 6, "in another order: class 0 is 'dog' in rank 0 and 'cat' in rank 1"),
    (['cat', 'dog'], 7, 'rank 1 has found 6 images, rank 0 7'),
    (['cat', 'dog'], 6, None),
])
def test_ranks_must_find_the_data_of_rank_0(tmp_path, classes, count, message):
    dataset = create_dataset(options(make_folder(tmp_path)), 'train', 3, is_training=True)
    world = DistributedContext()
    world.rank, world.broadcast_object = 1, lambda own: [(classes, count)]
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        _check_same_data(world, torch.device('cpu'), dataset)


@pytest.mark.slow  # 6 s: two processes
def test_a_rank_with_other_data_ends_all(tmp_path):
    folders = [make_folder(tmp_path / str(rank), classes=('cat', f'dog{rank}')) for rank in range(2)]
    ends = launch.finish(launch.start(
        command(folders[0], tmp_path), ranks=2, more={1: ['--data-dir', folders[1]]}))
    assert [code for code, _, _ in ends] == [2, 2], ends
    assert "only in rank 0 ['dog0'], only in rank 1 ['dog1']" in ends[1][2]
    assert 'another rank has found other classes or images than rank 0' in ends[0][2]


def test_a_run_on_one_class_is_refused(tmp_path, capsys):
    make_folder(tmp_path / 'images', classes=('cat',))
    line = refused(train.main, capsys, *command(tmp_path / 'images', tmp_path / 'out'))
    assert "expected 2 classes or more, got 1 ('cat')" in line and not (tmp_path / 'out').exists()


NFC, NFD = 'Caf\u00e9', unicodedata.normalize('NFD', 'Caf\u00e9')
LATIN = 'caf\udce9'  # a byte that is not UTF-8


@pytest.mark.skipif(os.name == 'nt', reason='file names are Unicode there')
def test_names_that_are_not_utf_8_train_and_evaluate(tmp_path, capsys):
    make_folder(tmp_path / 'images', classes=(NFC, NFD, LATIN))
    if len(os.listdir(tmp_path / 'images/train')) < 3:
        pytest.skip('this file system takes composed and decomposed names for one')
    for split in ('train', 'val'):
        folder = tmp_path / 'images' / split / LATIN
        (folder / '0.png').rename(folder / 'n\udcfc.png')
    os.mkfifo(tmp_path / 'images/train' / LATIN / 'pipe\udcfc.png')
    (tmp_path / 'images/train' / LATIN / 'bad\udcfc.png').write_bytes(b'no image')
    assert train.main(command(tmp_path / 'images', tmp_path, '--batch-size', '5')) == 0
    out, error = capsys.readouterr()
    assert not error
    folder = tmp_path / 'images' / 'train' / r'caf\udce9'
    assert rf'such as {folder}/pipe\udcfc.png' in out and rf'cannot be read: {folder}/bad\udcfc.png (' in out
    assert json.loads((tmp_path / 'run/summary.json').read_text())['classes'] == [NFD, NFC, LATIN]
    table, picture = tmp_path / 'classes.csv', tmp_path / 'confusion.png'
    assert validate.main([
        '--checkpoint', str(tmp_path / 'run/last.pth.tar'), '--workers', '0', '--per-class-results', str(table),
        '--confusion-matrix', str(picture)]) == 0
    with open(table, encoding='utf-8', newline='') as file:
        assert [row['name'] for row in csv.DictReader(file)] == [NFD, NFC, r'caf\udce9']
    with Image.open(picture) as image:
        image.verify()


def test_orientation_is_kept_with_the_run(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    for split in ('train', 'val'):
        for index, name in enumerate(('cat', 'dog')):
            (tmp_path / split / name).mkdir(parents=True)
            image = Image.new('RGB', (16, 16))
            image.paste((255, 255, 255), (0, 0, 16, 8) if index else (0, 0, 8, 16))
            for number in range(2):
                image.save(tmp_path / split / name / f'{number}.jpg', exif=exif)
    assert train.main(command(
        tmp_path, tmp_path / 'out', '--epochs', '3', '--lr', '0.1', '--no-aug', '--exif-orientation')) == 0
    losses = []
    for more in ([], ['--exif-orientation'], ['--no-exif-orientation']):
        logging.getLogger('smpconv_models').setLevel(logging.WARNING)  # validate.py sets a level of its own
        capsys.readouterr()
        assert validate.main(['--checkpoint', str(tmp_path / 'out/run/last.pth.tar'), '--workers', '0', *more]) == 0
        out = capsys.readouterr().out
        assert ('EXIF orientation that is ignored' in out) == ('--no-exif-orientation' in more)
        losses.append(json.loads(out.splitlines()[-1])['loss'])
    assert losses[0] == losses[1] != losses[2]


# --- other sources ---


def source_command(name, folder, output, *more):
    data = source(name, folder)
    named = ['--dataset', data.dataset] if data.dataset else []
    return command(data.data_dir, output, *named, '--val-split', SOURCES[name][2], *more)


def last_row(folder):
    header, *rows = (folder / 'summary.csv').read_text().splitlines()
    return dict(zip(header.split(','), map(float, rows[-1].split(','))))


def test_tar_files_train_and_evaluate(folders, tmp_path, capsys):
    assert train.main(source_command('tars', folders('tars'), tmp_path)) == 0
    assert json.loads((tmp_path / 'run/summary.json').read_text())['classes'] == list(made.CLASSES)
    assert validate.main(['--checkpoint', str(tmp_path / 'run/last.pth.tar'), '--workers', '0']) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result['images'] == VAL
    assert result['loss'] == pytest.approx(last_row(tmp_path / 'run')['eval_loss'], abs=1e-5)


@pytest.mark.slow  # 11 s: two processes
def test_two_processes_train_and_evaluate_a_stream(folders, tmp_path, capsys):
    """The accuracy of both is that of one that evaluates alone."""
    argv = source_command(
        'wds', folders('wds'), tmp_path, '--num-classes', '3', '--batch-size', '2', '--log-interval', '1')
    ends = launch.finish(launch.start(argv, ranks=2))
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert f'step {TRAIN // 4}/{TRAIN // 4}' in ends[0][1]
    validate.main([
        '--checkpoint', str(tmp_path / 'run/last.pth.tar'), '--dataset', 'wds/made', '--data-dir', str(folders('wds')),
        '--split', 'val', '--workers', '0'])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result['images'] == VAL
    assert result['loss'] == pytest.approx(last_row(tmp_path / 'run')['eval_loss'], abs=1e-5)


@pytest.mark.parametrize('smoothing', ['0', '0.1'])
def test_labels_beyond_the_models_classes_are_one_line(folders, tmp_path, capsys, smoothing):
    argv = source_command('wds', folders('wds'), tmp_path, '--num-classes', '2', '--smoothing', smoothing)
    assert train.main(argv) == 1
    assert 'an image is of class 2, the model has 2 classes' in error_line(capsys)


@pytest.mark.parametrize('name, more, message', [
    ('wds', ['--num-classes', '3', '--train-split', 'nope'], '_info.json: expected a split named nope'),
    ('wds', ['--num-classes', '1'], 'expected 2 classes or more, got 1'),
    ('hfds_parquet', ['--train-split', 'nope'], 'Unknown split "nope"'),
    ('tars', ['--train-split', 'nope'], 'expected a folder named nope'),
])
def test_a_mistake_is_one_line(folders, tmp_path, capsys, name, more, message):
    argv = source_command(name, folders(name), tmp_path, *more)
    capsys.readouterr()  # of making the folder
    assert message in refused(train.main, capsys, *argv)
    assert list(tmp_path.iterdir()) == []
    assert not name.startswith('hf') or logging.getLogger('datasets').handlers == []


def test_figures_read_deep_images_as_training_does(tmp_path):
    from smpconv_models.figures import _inputs
    for path in files(tmp_path):
        (_, image), = _inputs._read_images([str(path)], 1, ReadImage('L'))
        assert np.array_equal(np.asarray(image), GRAY), path
