"""What a data folder holds besides images in class folders, and classes in every process alike."""
import contextlib
import itertools
import logging
import os
import random
import shutil

import made
import pytest
from PIL import Image
from test_data import make_folder, options
from timm.data import get_img_extensions
from timm.utils.misc import natural_key

from smpconv_models.training import class_folders, dataset_factory
from smpconv_models.training.class_folders import ClassFolders, Scan
from smpconv_models.training.datasets import Unreadable

pytestmark = pytest.mark.usefixtures('logs_of_rank_0')

TIES = ('A', 'a', 'b', 'B', '01', '1')
IN_ORDER = ['01', '1', 'A', 'a', 'B', 'b']


def opened(root, split='train', **changes):
    return dataset_factory.create_dataset(options(root, **changes), split, 3, is_training=True)


def scanned(folder):
    return Scan(str(folder), get_img_extensions(as_set=True)).walk()


# --- classes in order ---


def test_classes_of_folders_do_not_depend_on_the_walk(tmp_path):
    make_folder(tmp_path, classes=TIES)
    scan = scanned(tmp_path / 'train')
    expected = ClassFolders(scan)
    assert expected.classes == IN_ORDER
    assert all(os.path.dirname(path).endswith(f'/{IN_ORDER[target]}') for path, target in expected.samples)
    for seed in range(5):
        random.Random(seed).shuffle(scan.images)
        assert ClassFolders(scan).samples == expected.samples


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('make', [made.make_tars, made.make_class_tars, made.make_tar_of_tars])
def test_classes_of_tar_files_do_not_depend_on_the_hash_seed(tmp_path, monkeypatch, make, reverse):
    make(tmp_path, classes=TIES)
    # a set of strings in an order of another process
    monkeypatch.setattr(
        'timm.data.readers.reader_image_in_tar.set',
        lambda values: sorted(dict.fromkeys(values), reverse=reverse), raising=False)
    dataset = opened(tmp_path)
    assert dataset.classes == IN_ORDER
    label_of = {name: label for label, name in enumerate(TIES)}
    for index in range(len(dataset)):
        label = int(os.path.basename(dataset.name(index))[0])  # of the file, as it was made
        assert label == label_of[IN_ORDER[dataset[0, index][1]]]


def test_order_depends_on_the_names_alone():
    permuted = list(itertools.permutations([*TIES, '001']))
    orders = {tuple(class_folders.in_order(order)) for order in permuted}
    assert orders == {('001', '01', '1', 'A', 'a', 'B', 'b')}
    assert len({tuple(sorted(order, key=natural_key)) for order in permuted}) > 1  # timm's alone


def test_order_without_ties_is_timms():
    draw = random.Random(0)
    drawn = {''.join(draw.choices('ab01729_-. éÉ٣', k=draw.randint(1, 8))) for _ in range(2000)}
    distinct = list({str(natural_key(name)): name for name in drawn}.values())
    assert len(distinct) > 1000
    assert class_folders.in_order(distinct) == sorted(distinct, key=natural_key)


def test_order_takes_digits_that_are_no_numbers():
    with pytest.raises(ValueError):
        natural_key('1²2')
    assert class_folders.in_order(['1²2', '1²1']) == ['1²1', '1²2']


@pytest.mark.parametrize('name, expected', [
    ('cat', 'cat'), ('Café', 'Café'), ('猫', '猫'), ('Cafe\u0301', r'Cafe\u0301'), ('\u1112\u1161', r'\u1112\u1161'),
    ('caf\udce9', r'caf\udce9'), ('a\nb', r'a\nb'), ('zero\u200bwidth', r'zero\u200bwidth'),
    (r'caf\udce9', r'caf\\udce9'),
])
def test_names_are_escaped_if_they_cannot_be_told_apart(name, expected):
    assert class_folders.shown(name) == expected
    assert expected == name or expected.encode().decode('unicode_escape') == name


def test_lists_are_in_order_and_bounded():
    assert class_folders.listed(['b10', 'b9', "it's", 'e\u0301'], 3) == r"""['b9', 'b10', 'e\u0301']"""
    assert class_folders.quoted("it's") == '''"it's"'''


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
    assert found.classes == ['cat', 'dog']
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
    scan = scanned(tmp_path / 'train')
    assert sorted(map(os.path.basename, scan.loops)) == ['again', 'self'] and len(scan.images) == 6


def test_a_folder_of_torchvision_holds_its_list_once(tmp_path):
    source = opened(make_folder(tmp_path), dataset='torch/folder').source
    holders = [name for name, value in vars(source).items() if str(tmp_path / 'train/cat/0.png') in repr(value)]
    assert holders == ['samples']


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
    samples = opened(tmp_path)
    unreadable = [samples[0, index] for index in range(len(samples)) if isinstance(samples[0, index], Unreadable)]
    assert [os.path.basename(image.name) for image in unreadable] == ['x.png', 'y.png']


def test_a_class_in_another_format_is_reported(tmp_path):
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
    assert opened(tmp_path).classes == ['2023', '2024']
    line, = caplog.messages
    assert "innermost folders; 4 folders give 2 classes ['2023', '2024'], for example cat/2023 gives '2023'" in line


@pytest.mark.parametrize('top, told', [('', 0), ('train/', 0), ('{}/', 1)])
def test_tar_files_of_nested_folders_are_reported(tmp_path, caplog, top, told):
    """Unless all folders are in one, which is how a whole folder is packed."""
    made.write_tar(tmp_path / 'train.tar', [
        (f'{top.format(label)}{name}/{file}', content) for name, label, file, content in made.samples('train')])
    assert opened(tmp_path).classes == list(made.CLASSES)
    assert sum('innermost folders' in message for message in caplog.messages) == told == len(caplog.messages)


@pytest.mark.parametrize('tops', [('/', ''), ('./', ''), ('/', '/'), ('/data/', 'data/')])
def test_tar_files_of_absolute_and_relative_names_are_read(tmp_path, caplog, tops):
    members = [(f'{tops[label % 2]}{name}/{file}', content) for name, label, file, content in made.samples('train')]
    made.write_tar(tmp_path / 'train.tar', members)
    dataset = opened(tmp_path)
    assert dataset.classes == list(made.CLASSES) and not caplog.messages
    assert all(dataset.name(index).startswith(f'{tmp_path}/train.tar/') for index in range(len(dataset)))
    assert not any(isinstance(dataset[0, index], Unreadable) for index in range(len(dataset)))


def test_tar_files_in_a_tar_file_may_have_absolute_names(tmp_path, caplog):
    made.make_class_tars(tmp_path / 'made')
    tars = sorted((tmp_path / 'made/train').iterdir())
    made.write_tar(tmp_path / 'train.tar', [
        (f'{"/" if index else ""}{path.name}', path.read_bytes()) for index, path in enumerate(tars)])
    dataset = opened(tmp_path)
    assert dataset.classes == list(made.CLASSES) and not caplog.messages
    assert dataset.name(len(dataset) - 1) == f'{tmp_path}/train.tar/cow.tar/2007.jpg'


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
    assert dataset.classes == list(made.CLASSES) and len(dataset) == len(made.samples('train'))
    line, = caplog.messages
    assert 'skipped 3 hidden files' in line and f'such as {tmp_path}/train.tar/' in line


def test_lines_are_of_the_level_of_rank_0(tmp_path, caplog, monkeypatch):
    make_folder(tmp_path)
    for add in (add_hidden, add_formats, add_loop, add_special):
        add(tmp_path)
    opened(tmp_path)
    assert len(caplog.messages) == 4
    caplog.clear()
    caplog.set_level(logging.WARNING, 'smpconv_models')
    monkeypatch.setattr(dataset_factory, '_check_headers', lambda *_: pytest.fail('headers were read for nothing'))
    opened(tmp_path)
    assert not caplog.messages
