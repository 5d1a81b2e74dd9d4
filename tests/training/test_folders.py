"""What a data folder holds besides images in class folders, and classes in every process alike."""
import contextlib
import csv
import json
import logging
import os
import random
import shutil
import socket
import unicodedata

import launch
import made
import pytest
import torch
from PIL import Image
from test_data import arguments, make_folder

import train
import validate
from smpconv_models.training import data_config, dataset_factory
from smpconv_models.training.class_folders import FolderReader, timm_scan
from smpconv_models.training.datasets import Samples
from smpconv_models.training.distributed import DistributedContext
from smpconv_models.training.skipped import Unreadable
from smpconv_models.training.trainer import _check_same_data

pytestmark = pytest.mark.usefixtures('logs_of_rank_0')

TIES = ('A', 'a', 'b', 'B', '01', '1')
IN_ORDER = ['01', '1', 'A', 'a', 'B', 'b']


def opened(root, split='train', **changes):
    return dataset_factory.open_dataset(arguments(data_dir=str(root), **changes), split, 3, is_training=True)


def names_of(root, **changes):
    return data_config.class_names(opened(root, **changes))


# --- classes in order ---


def test_classes_of_folders_do_not_depend_on_the_walk(tmp_path):
    make_folder(tmp_path, classes=TIES)
    scan = timm_scan(str(tmp_path / 'train'))
    expected = FolderReader(scan)
    assert list(expected.class_to_idx) == IN_ORDER
    assert all(os.path.dirname(path).endswith(f'/{IN_ORDER[target]}') for path, target in expected.samples)
    for seed in range(5):
        random.Random(seed).shuffle(scan.images)
        assert FolderReader(scan).samples == expected.samples


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('make', [made.make_tars, made.make_class_tars, made.make_tar_of_tars])
def test_classes_of_tar_files_do_not_depend_on_the_hash_seed(tmp_path, monkeypatch, make, reverse):
    make(tmp_path, classes=TIES)
    # a set of strings in an order of another process
    monkeypatch.setattr(
        'timm.data.readers.reader_image_in_tar.set',
        lambda values: sorted(dict.fromkeys(values), reverse=reverse), raising=False)
    dataset = opened(tmp_path)
    assert data_config.class_names(dataset) == IN_ORDER
    label_of = {name: label for label, name in enumerate(TIES)}
    samples = Samples(dataset, 0)
    for index in range(len(samples)):
        label = int(os.path.basename(samples.name(index))[0])  # of the file, as it was made
        assert label == label_of[IN_ORDER[samples[0, index][1]]]


@pytest.mark.slow  # 20 s on idle cores: four processes with hash seeds of their own
def test_ranks_with_different_hash_seeds_train_on_the_same_labels(tmp_path, monkeypatch):
    """With timm's order the seeds 0 and 3 exchange A with a, and B with b."""
    make_folder(tmp_path / 'images', classes=('A', 'a', 'B', 'b'), count=8)
    (tmp_path / 'images/train/.hidden').mkdir()
    argv = [
        *launch.TINY, '--data-dir', tmp_path / 'images', '--img-size', '16', '--batch-size', '4', '--epochs', '1',
        '--warmup-epochs', '0', '--output', tmp_path, '--experiment', 'run']
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    processes = []
    for rank, seed in enumerate(('0', '3')):
        monkeypatch.setenv('PYTHONHASHSEED', seed)
        for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR='127.0.0.1',
                                MASTER_PORT=port).items():
            monkeypatch.setenv(name, str(value))
        processes += launch.start(argv)
    ends = launch.finish(processes)
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert [out.count('skipped 1 hidden') for _, out, _ in ends] == [1, 0]
    summary = json.loads((tmp_path / 'run/summary.json').read_text())
    assert summary['classes'] == ['A', 'a', 'B', 'b']
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name)
    processes = []
    for seed in ('0', '3'):
        monkeypatch.setenv('PYTHONHASHSEED', seed)
        argv = ['--checkpoint', tmp_path / 'run', '--workers', '0']
        processes += launch.start(argv, script=launch.ROOT / 'validate.py')
    ends = launch.finish(processes)
    assert [code for code, _, _ in ends] == [0, 0], ends


class OfRankZero(DistributedContext):
    """A world whose rank 0 has found other data."""

    def __init__(self, found):
        super().__init__()
        self.rank, self.size, self.found = 1, 1, found

    def share(self, value):
        return self.found


@pytest.mark.parametrize('classes, count, told', [
    (['cat', 'dgo'], 6, r"classes of rank 0 and rank 1 .*only in rank 0 \['dgo'\], only in rank 1 \['dog'\]"),
    (['dog', 'cat'], 6, "in another order: class 0 is 'dog' in rank 0 and 'cat' in rank 1"),
    (['cat', 'dog'], 7, 'rank 1 has found 6 images, rank 0 7'),
    (['cat', 'dog'], 6, None),
])
def test_ranks_must_find_the_data_of_rank_0(tmp_path, classes, count, told):
    dataset = opened(make_folder(tmp_path))
    world = OfRankZero([(classes, count)])
    if told is None:
        _check_same_data(world, torch.device('cpu'), dataset)
        return
    with pytest.raises(ValueError, match=told):
        _check_same_data(world, torch.device('cpu'), dataset)


@pytest.mark.slow  # 6 s: two processes
def test_a_rank_with_other_data_ends_all(tmp_path):
    folders = [make_folder(tmp_path / str(rank), classes=('cat', f'dog{rank}')) for rank in range(2)]
    argv = [*launch.TINY, '--img-size', '16', '--batch-size', '2', '--epochs', '1', '--warmup-epochs', '0', '--output',
            tmp_path / 'out']
    ends = launch.finish(launch.start(
        argv, ranks=2, more={rank: ['--data-dir', folder] for rank, folder in enumerate(folders)}))
    assert [code for code, _, _ in ends] == [2, 2], ends
    assert "only in rank 0 ['dog0'], only in rank 1 ['dog1']" in ends[1][2]
    assert 'another rank has found other classes or images than rank 0' in ends[0][2]


@pytest.mark.parametrize('trained, evaluated, told', [
    (['a', 'A', 'b'], ['A', 'a', 'b'], r"3 and 3 in another order: class 0 is 'a' in training and 'A' in evaluation"),
    (['Caf\u00e9', 'b'], ['Cafe\u0301', 'b'], r"only in training \['Café'\], only in evaluation \['Cafe\\u0301'\]"),
    (['a', 'caf\udce9'], ['a', 'cafe'], r"only in training \['caf\\udce9'\]"),
])
def test_lists_that_differ_say_where(trained, evaluated, told):
    with pytest.raises(ValueError, match=told):
        data_config.check_classes(trained, evaluated)


def test_one_class_is_refused():
    for names in (['cat'], None):
        with pytest.raises(ValueError, match='expected 2 classes or more, got 1'):
            data_config.check_num_classes(names, 1)


def test_a_run_on_one_class_is_refused(tmp_path, capsys):
    make_folder(tmp_path / 'images', classes=('cat',))
    argv = [*launch.TINY, '--data-dir', tmp_path / 'images', '--img-size', '16', '--output', tmp_path / 'out']
    with pytest.raises(SystemExit) as stopped:
        train.main(list(map(str, argv)))
    line, = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and "expected 2 classes or more, got 1 ('cat')" in line
    assert not (tmp_path / 'out').exists()


# --- what is skipped ---


def add_hidden(root):
    for name in ('.ipynb_checkpoints', '__MACOSX', '.git'):
        shutil.copytree(root / 'train' / 'cat', root / 'train' / name)
    shutil.copy(root / 'train/cat/0.png', root / 'train/cat/._0.png')
    return '4 hidden files and folders', 'train/.git'


def add_formats(root):
    for suffix in ('webp', 'BMP', 'tif', 'gif', 'avif'):
        (root / 'train/cat' / f'new.{suffix}').write_bytes(b'any')
    (root / 'train/cat/notes.txt').write_text('')
    return '5 images in other formats than .jpeg, .jpg, .png (', 'train/cat/new.BMP'


def add_loop(root):
    (root / 'train/dog/again').symlink_to('../../train', target_is_directory=True)
    (root / 'train/dog/self').symlink_to('.', target_is_directory=True)
    (root / 'train/dog/nowhere').symlink_to('nowhere')
    return '2 links, junctions or mounts that lead back to a parent folder', 'train/dog/again'


def add_special(root):
    os.mkfifo(root / 'train/cat/x.png')
    (root / 'train/cat/y.png').symlink_to('x.png')
    return '2 files that are neither regular files nor links to one', 'train/cat/x.png'


@pytest.mark.parametrize('dataset', ['', 'torch/folder'])
@pytest.mark.parametrize('add', [add_hidden, add_formats, add_loop, add_special])
def test_what_is_no_image_is_skipped_in_one_line(tmp_path, caplog, add, dataset):
    make_folder(tmp_path)
    told, example = add(tmp_path)
    found = opened(tmp_path, dataset=dataset)
    assert data_config.class_names(found) == ['cat', 'dog']
    assert len(found) == 6 + (dataset != '' and add is add_formats) * 3
    line, = caplog.messages
    if not dataset or add is not add_formats:
        assert told in line and f'such as {tmp_path / example}' in line
    else:  # torchvision reads some of them
        assert '2 images in other formats than .bmp, ' in line and f'such as {tmp_path}/train/cat/new.avif' in line


def test_without_anything_else_nothing_is_reported(tmp_path, caplog):
    opened(make_folder(tmp_path))
    opened(make_folder(tmp_path / 'other'), dataset='torch/folder')
    opened(made.make_tar_of_tars(tmp_path / 'tars'))
    assert not caplog.messages


class Junction:
    """An entry as ``os.scandir`` returns it for a junction or a mount, which is no link."""

    def __init__(self, entry):
        self.entry = entry

    def __getattr__(self, name):
        return getattr(self.entry, name)

    def is_symlink(self):
        return False


def test_a_loop_that_is_no_link_is_skipped(tmp_path, monkeypatch):
    make_folder(tmp_path)
    add_loop(tmp_path)
    (tmp_path / 'train/dog/nowhere').unlink()  # a link to itself
    scandir = os.scandir
    monkeypatch.setattr(os, 'scandir', lambda path: contextlib.nullcontext(map(Junction, scandir(path))))
    scan = timm_scan(str(tmp_path / 'train'))
    assert sorted(map(os.path.basename, scan.loops)) == ['again', 'self'] and len(scan.images) == 6


def test_a_folder_of_torchvision_holds_its_list_once(tmp_path):
    dataset = opened(make_folder(tmp_path), dataset='torch/folder')
    holders = [name for name, value in vars(dataset).items() if str(tmp_path / 'train/cat/0.png') in repr(value)]
    assert holders == ['samples', 'imgs'] and dataset.samples is dataset.imgs


def test_links_to_images_and_folders_are_followed(tmp_path, caplog):
    make_folder(tmp_path / 'real', splits=('train',))
    (tmp_path / 'train').mkdir()
    for name in ('cat', 'dog'):
        (tmp_path / 'train' / name).symlink_to(tmp_path / 'real/train' / name, target_is_directory=True)
    (tmp_path / 'real/train/cat/link.png').symlink_to('0.png')
    assert len(opened(tmp_path)) == 7 and not caplog.messages


def test_a_broken_link_is_an_unreadable_image(tmp_path):
    make_folder(tmp_path)
    (tmp_path / 'train/cat/x.png').symlink_to('nowhere')
    (tmp_path / 'train/cat/y.png').symlink_to('y.png')
    samples = Samples(opened(tmp_path), 0)
    unreadable = [samples[0, index] for index in range(len(samples)) if isinstance(samples[0, index], Unreadable)]
    assert [os.path.basename(image.name) for image in unreadable] == ['x.png', 'y.png']


def test_a_class_in_another_format_is_told(tmp_path):
    make_folder(tmp_path)
    for path in (tmp_path / 'train/dog').iterdir():
        path.rename(path.with_suffix('.webp'))
    told = r"without images .*: \[.dog.\]; there are 3 images in other formats, such as .*dog/0"
    with pytest.raises(ValueError, match=told):
        opened(tmp_path)


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root reads every folder')
def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path):
    make_folder(tmp_path)
    (tmp_path / 'train/dog').chmod(0)
    try:
        with pytest.raises(ValueError, match='train/dog cannot be read: Permission denied'):
            opened(tmp_path)
    finally:
        (tmp_path / 'train/dog').chmod(0o700)


def test_nested_class_folders_are_reported(tmp_path, caplog):
    for name in ('cat', 'dog'):
        make_folder(tmp_path, splits=(f'train/{name}',), classes=('2023', '2024'))
    assert names_of(tmp_path) == ['2023', '2024']
    line, = caplog.messages
    assert "innermost folders; 4 folders give 2 classes ['2023', '2024'], for example cat/2023 gives '2023'" in line


@pytest.mark.parametrize('top, told', [('', 0), ('train/', 0), ('{}/', 1)])
def test_tar_files_of_nested_folders_are_reported(tmp_path, caplog, top, told):
    """Unless all folders are in one, which is how a whole folder is packed."""
    members = [
        (f'{top.format(label)}{name}/{file}', content) for name, label, file, content in made.samples('train')]
    made.write_tar(tmp_path / 'train.tar', members)
    assert names_of(tmp_path) == list(made.CLASSES)
    assert sum('innermost folders' in message for message in caplog.messages) == told == len(caplog.messages)


@pytest.mark.parametrize('tops', [('/', ''), ('./', ''), ('/', '/'), ('/data/', 'data/')])
def test_tar_files_of_absolute_and_relative_names_are_read(tmp_path, caplog, tops):
    members = [(f'{tops[label % 2]}{name}/{file}', content) for name, label, file, content in made.samples('train')]
    made.write_tar(tmp_path / 'train.tar', members)
    dataset = opened(tmp_path)
    assert data_config.class_names(dataset) == list(made.CLASSES) and not caplog.messages
    samples = Samples(dataset, 0)
    assert all(samples.name(index).startswith(f'{tmp_path}/train.tar/') for index in range(len(samples)))
    assert not any(isinstance(samples[0, index], Unreadable) for index in range(len(samples)))


def test_tar_files_in_a_tar_file_may_have_absolute_names(tmp_path, caplog):
    made.make_class_tars(tmp_path / 'made')
    tars = sorted((tmp_path / 'made/train').iterdir())
    made.write_tar(tmp_path / 'train.tar', [
        (f'{"/" if index else ""}{path.name}', path.read_bytes()) for index, path in enumerate(tars)])
    dataset = opened(tmp_path)
    assert data_config.class_names(dataset) == list(made.CLASSES) and not caplog.messages
    assert Samples(dataset, 0).name(len(dataset) - 1) == f'{tmp_path}/train.tar/cow.tar/2007.jpg'


@pytest.mark.parametrize('dataset', ['', 'torch/folder'])
def test_folders_may_be_nested_deeply(tmp_path, dataset):
    """Deeper than Python's functions may call each other, which is why pathlib and shutil cannot be used."""
    make_folder(tmp_path)
    before = len(opened(tmp_path, dataset=dataset))
    folders = [str(tmp_path / 'train/cat') + '/d' * depth for depth in range(1, 1200)]
    for folder in folders:
        os.mkdir(folder)
    image = folders[-1] + '/x.png'
    Image.new('L', (8, 8)).save(image)
    found = len(opened(tmp_path, dataset=dataset))
    os.remove(image)
    for folder in reversed(folders):
        os.rmdir(folder)
    assert found == before + 1


def test_hidden_members_of_tar_files_are_skipped(tmp_path, caplog):
    members = [(f'./{name}/{file}', content) for name, _, file, content in made.samples('train')]
    members += [(name, b'any') for name in (
        '__MACOSX/ant/._0000.jpg', './ant/.ipynb_checkpoints/0.jpg', './ant/._1.jpg')]
    made.write_tar(tmp_path / 'train.tar', members)
    dataset = opened(tmp_path)
    assert data_config.class_names(dataset) == list(made.CLASSES) and len(dataset) == len(made.samples('train'))
    line, = caplog.messages
    assert 'skipped 3 hidden files' in line and f'such as {tmp_path}/train.tar/' in line


def test_lines_are_of_the_level_of_rank_0(tmp_path, caplog, monkeypatch):
    make_folder(tmp_path)
    for add in (add_hidden, add_formats, add_loop, add_special):
        add(tmp_path)
    args = arguments(data_dir=str(tmp_path))
    dataset_factory.open_dataset(args, 'train', 3, is_training=True)
    assert len(caplog.messages) == 4
    caplog.clear()
    caplog.set_level(logging.WARNING, 'smpconv_models')
    monkeypatch.setattr(dataset_factory, '_check_headers', lambda *_: pytest.fail('headers were read for nothing'))
    dataset_factory.open_dataset(args, 'train', 3, is_training=True)
    assert not caplog.messages


# --- as a user calls it ---


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
    argv = [*launch.TINY, '--data-dir', tmp_path / 'images', '--img-size', '16', '--batch-size', '5', '--epochs', '1',
            '--warmup-epochs', '0', '--output', tmp_path, '--experiment', 'run']
    assert train.main(list(map(str, argv))) == 0
    out, error = capsys.readouterr()
    assert not error
    folder = tmp_path / 'images' / 'train' / r'caf\udce9'
    assert rf'such as {folder}/pipe\udcfc.png' in out and rf'cannot be read: {folder}/bad\udcfc.png (' in out
    assert json.loads((tmp_path / 'run/summary.json').read_text())['classes'] == [NFD, NFC, LATIN]
    table, picture = tmp_path / 'classes.csv', tmp_path / 'confusion.png'
    assert validate.main([
        '--checkpoint', str(tmp_path / 'run/last.pth.tar'), '--workers', '0', '--class-results', str(table),
        '--confusion', str(picture)]) == 0
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
    argv = [*launch.TINY, '--data-dir', tmp_path, '--img-size', '16', '--batch-size', '4', '--epochs', '3',
            '--warmup-epochs', '0', '--lr', '0.1', '--no-aug', '--output', tmp_path / 'out', '--experiment', 'run',
            '--exif-orientation']
    assert train.main(list(map(str, argv))) == 0
    losses = []
    for more in ([], ['--exif-orientation'], ['--no-exif-orientation']):
        logging.getLogger('smpconv_models').setLevel(logging.WARNING)  # validate.py sets a level of its own
        capsys.readouterr()
        assert validate.main(['--checkpoint', str(tmp_path / 'out/run/last.pth.tar'), '--workers', '0', *more]) == 0
        out = capsys.readouterr().out
        assert ('EXIF orientation that is ignored' in out) == ('--no-exif-orientation' in more)
        losses.append(json.loads(out.splitlines()[-1])['loss'])
    assert losses[0] == losses[1] != losses[2]
