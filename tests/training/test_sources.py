"""Every form in which images come: tar files, WebDataset's shards, Hugging Face's data sets and torchvision's."""
import io
import json
import logging
import os
import pickle
import random
import shutil
from types import SimpleNamespace

import launch
import made
import pytest
import torch
from common import IS_OLD_TIMM
from filelock import FileLock, Timeout
from PIL import Image
from test_data import arguments
from test_loaders import CONFIG, CPU
from torch.utils.data import DataLoader

import train
import validate
from smpconv_models.training import dataset_factory, loader
from smpconv_models.training.data_config import class_names
from smpconv_models.training.datasets import Samples, Stream
from smpconv_models.training.distributed import DistributedContext
from smpconv_models.training.skipped import SkippedInTraining

TRAIN, VAL = (len(made.CLASSES) * count for count in made.SPLITS.values())

# name: (how it is made, --dataset with {} for its folder, name of the validation split)
SOURCES = {
    'folder': (made.make_folder, '', 'val'),
    'tars': (made.make_tars, '', 'val'),
    'class_tars': (made.make_class_tars, '', 'val'),
    'tar_of_tars': (made.make_tar_of_tars, '', 'val'),
    'torchvision': (made.make_folder, 'torch/folder', 'val'),
    'hfds_folder': (made.make_folder, 'hfds/{}', 'validation'),
    'hfds_parquet': (made.make_parquet, 'hfds/{}', 'validation'),
    'hfids': (made.make_parquet, 'hfids/{}', 'validation'),
    'wds': (made.make_wds, 'wds/made', 'val'),
}
STREAMS = ('hfids', 'wds')
MAPS = [name for name in SOURCES if name not in STREAMS]


@pytest.fixture(scope='module', autouse=True)
def quick_streams():
    """Without the five seconds that Hugging Face's streams wait for their threads where no process loads."""
    import datasets
    before = datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    yield
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = before


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """The folder of each source, made once."""
    found = {}

    def folder(name):
        make = SOURCES[name][0]
        if make not in found:
            found[make] = make(tmp_path_factory.mktemp(make.__name__))
        return found[make]

    return folder


def source(name, folder, **changes):
    """The arguments that name a source."""
    if name == 'hfids' and IS_OLD_TIMM:
        pytest.skip('timm before 1.0.31 passes trust_remote_code to streams, which datasets 4 has no more')
    dataset = SOURCES[name][1].format(folder)
    # Hugging Face's library keeps its tables there
    data_dir = folder.parent / f'{folder.name}_tables' if dataset.startswith('hf') else folder
    return arguments(
        dataset=dataset, data_dir=str(data_dir), train_split='train', val_split=SOURCES[name][2], seed=1,
        batch_size=changes.pop('batch_size', 4), **changes)


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / 'copy')


def opened(args, is_training=False):
    return dataset_factory.open_dataset(args, args.train_split if is_training else args.val_split, 3, is_training)


def training(args, world=None, tell=None):
    tell = tell or SkippedInTraining(args.max_unreadable)
    return loader.train_loader(args, opened(args, True), CONFIG, CPU, world or DistributedContext(), tell)


def evaluated(args, world=None):
    """The targets of all evaluation images."""
    images = loader.held_out(args, opened(args), CONFIG, CPU, world or DistributedContext())
    return sorted(int(target) for _, targets in images.loader for target in targets)


def world_of(rank, size):
    world = DistributedContext()
    world.rank, world.size = rank, size
    return world


# --- what is read ---


def contents(items):
    return sorted((image.size, image.tobytes(), int(target)) for image, target in items)


def indexed(samples):
    return (samples[0, index] for index in range(len(samples)))


@pytest.mark.parametrize('name', SOURCES)
def test_the_same_images_come_in_every_form(folders, name):
    for is_training, split in ((True, 'train'), (False, 'val')):
        dataset = opened(source(name, folders(name)), is_training)
        assert class_names(dataset) == (None if name == 'wds' else list(made.CLASSES))
        dataset.transform = lambda image: image
        items = Stream(dataset) if name in STREAMS else indexed(Samples(dataset, 0))
        expected = [
            (Image.open(io.BytesIO(content)).convert('RGB'), label) for _, label, _, content in made.samples(split)]
        assert contents(items) == contents(expected)


@pytest.mark.parametrize('in_chans', [1, 3])
def test_torchvisions_digits_come_in_the_models_channels(tmp_path, in_chans):
    args = arguments(dataset='torch/mnist', data_dir=str(made.make_mnist(tmp_path)))
    dataset = dataset_factory.open_dataset(args, 'train', in_chans, is_training=True)
    image, target = Samples(dataset, 0)[0, 3]
    assert image.mode == ('L' if in_chans == 1 else 'RGB') and target == 3
    assert len(dataset_factory.open_dataset(args, 'validation', in_chans, is_training=False)) == 20


def test_the_order_of_tar_files_is_not_the_file_systems(folders, monkeypatch):
    args = source('class_tars', folders('class_tars'))
    names = []
    for reverse in (False, True):
        monkeypatch.setattr(
            'timm.data.readers.reader_image_in_tar.glob',
            lambda pattern, recursive, reverse=reverse: sorted(map(str, folders('class_tars').glob('train/*.tar')),
                                                               reverse=reverse))
        names.append([Samples(opened(args, True), 0).name(index) for index in range(TRAIN)])
    assert names[0] == names[1] and names[0][0].endswith('train/ant.tar/0000.jpg')


@pytest.mark.parametrize('start', ['fork', 'pickle'])
@pytest.mark.parametrize('name', ['tars', 'class_tars', 'tar_of_tars'])
def test_an_open_tar_file_is_not_shared_with_workers(folders, name, start):
    """Neither inherited, as one position for all of them, nor sent along."""
    dataset = opened(source(name, folders(name)), True)
    dataset.transform = None
    expected = [dataset[index][1] for index in range(TRAIN)]
    if start == 'pickle':  # as it is sent to workers that are spawned
        again = pickle.loads(pickle.dumps(dataset))
        assert [again[index][1] for index in range(TRAIN)] == expected
        return
    samples = Samples(dataset, 0)
    loader = DataLoader(
        samples, sampler=[(0, index) for index in range(TRAIN)] * 30, batch_size=8, num_workers=2, collate_fn=list,
        multiprocessing_context='fork')
    assert [item[1] for batch in loader for item in batch] == expected * 30


# --- training and evaluation ---


@pytest.mark.parametrize('name', MAPS)
def test_an_epoch_goes_on_to_the_bit(folders, name):
    args = source(name, folders(name), aa='rand-m9-mstd0.5-inc1', reprob=0.5)
    whole = list(training(args).start(1, 0))
    assert len(whole) == TRAIN // 4
    for workers in (0, 1):
        args.workers = workers
        rest = list(training(args).start(1, 2))
        assert len(rest) == TRAIN // 4 - 2
        assert all(torch.equal(a, b) for ours, theirs in zip(rest, whole[2:]) for a, b in zip(ours, theirs))


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('name', STREAMS)
def test_a_stream_takes_its_steps(folders, name, workers):
    images = training(source(name, folders(name), workers=workers))
    assert images.steps == TRAIN // 4
    for epoch in range(2):
        targets = torch.cat([targets for _, targets in images.start(epoch, 0)]).tolist()
        assert sorted(targets) == sorted(label for _, label, _, _ in made.samples('train'))
    assert len(list(images.start(1, 4))) == 2


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('name', STREAMS)
def test_each_process_evaluates_all_of_a_stream(folders, name, workers):
    for rank in range(2):
        args = source(name, folders(name), workers=workers)
        assert evaluated(args, world_of(rank, 2)) == sorted(label for _, label, _, _ in made.samples('val'))


@pytest.mark.parametrize('name', ['class_tars', 'hfds_parquet'])
def test_processes_divide_what_is_no_stream(folders, name):
    parts = [evaluated(source(name, folders(name), workers=1), world_of(rank, 2)) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(label for _, label, _, _ in made.samples('val'))


# --- images that can't be read ---


def with_bad_images(name, root, split):
    """A source whose split has two more images, which can't be decoded, and what they are called."""
    make, label = SOURCES[name][0], len(made.CLASSES) - 1
    bad = [(made.CLASSES[label], label, file, b'no image') for file in ('x.jpg', 'y.jpg')]
    made_samples = made.samples

    def samples(asked, *args):
        return made_samples(asked, *args) + (bad if asked == split else [])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, 'samples', samples)
        return make(root)


NAMED = {
    'folder': '{split}/cow/x.jpg', 'tars': '{split}.tar/cow/x.jpg', 'class_tars': '{split}/cow.tar/x.jpg',
    'tar_of_tars': '{split}.tar/cow.tar/x.jpg', 'torchvision': '{split}/cow/x.jpg', 'hfds_folder': '{split}/cow/x.jpg',
    'hfds_parquet': '(x.jpg)', 'hfids': 'x.jpg', 'wds': '{split}-0000.tar/x',
}


@pytest.mark.parametrize('name', SOURCES)
def test_unreadable_training_images_are_left_out_and_named(tmp_path, caplog, name):
    folder = with_bad_images(name, tmp_path / 'made', 'train')
    left_out = SkippedInTraining(limit=2)
    images = training(source(name, folder, batch_size=13), tell=left_out)
    for epoch in range(2):
        assert [len(targets) for _, targets in images.start(epoch, 0)] == [13, 13]
    assert left_out.count == 4 and len(left_out.seen) == len(caplog.messages) == 2
    assert any(NAMED[name].format(split='train') in message for message in caplog.messages)


@pytest.mark.parametrize('name', SOURCES)
def test_unreadable_images_are_told_in_evaluation(tmp_path, caplog, name):
    args = source(name, with_bad_images(name, tmp_path / 'made', 'val'))
    with pytest.raises(ValueError, match=r'[xy](\.jpg)?\)? cannot be read \(UnidentifiedImageError.*--skip-unreadable'):
        evaluated(args)
    args.skip_unreadable = True
    assert len(evaluated(args)) == VAL
    assert NAMED[name].format(split='val') in caplog.text


def test_a_batch_of_unreadable_images_takes_the_next(tmp_path):
    folder = with_bad_images('folder', tmp_path, 'train')
    batches = [list(training(source('folder', folder, batch_size=1)).start(0, 0)) for _ in range(2)]
    assert [len(targets) for _, targets in batches[0]] == [1] * (TRAIN + 2)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*batches))


def test_nothing_but_unreadable_images_is_an_error(tmp_path):
    folder = made.make_wds(tmp_path)
    for shard in folder.glob('train*.tar'):
        made.write_tar(shard, [(file, content) for _, _, file, content in made.samples('train')])
    with pytest.raises(ValueError, match='the images ended after 0 of 6 batches'):
        next(training(source('wds', folder, max_unreadable=100)).start(0, 0))


def test_a_damaged_shard_is_no_shorter_evaluation(tmp_path, caplog):
    folder = made.make_wds(tmp_path)
    shard = folder / 'val-0001.tar'
    shard.write_bytes(shard.read_bytes()[:shard.stat().st_size // 2])
    args = source('wds', folder)
    with pytest.raises(ValueError, match=f'[1-9] of {VAL} images cannot be read .the stream ended'):
        evaluated(args)
    args.skip_unreadable = True
    assert 8 <= len(evaluated(args)) < VAL
    assert f'of {VAL} images (the stream ended before they came)' in caplog.text


def test_a_damaged_shard_is_made_up_for_in_training(tmp_path):
    folder = made.make_wds(tmp_path)
    (folder / 'train-0001.tar').write_bytes(b'no tar file' * 1000)
    assert len(list(training(source('wds', folder, workers=2)).start(0, 0))) == TRAIN // 4


@pytest.mark.parametrize('workers', [0, 1])
def test_a_damaged_table_of_a_stream_is_one_line(tmp_path, workers):
    """Whether this process reads it or another one, whose message comes with a traceback."""
    folder = made.make_parquet(tmp_path / 'made')
    (folder / 'data/train-00000-of-00002.parquet').write_bytes(b'x' * 500)
    with pytest.raises(ValueError, match=r'^the stream .*made cannot be read: .*Parquet magic bytes not found[^\n]*$'):
        list(training(source('hfids', folder, workers=workers)).start(0, 0))


# --- what is refused ---


def rewritten(name, split):
    """A change of a source's folder: one split's tar file, of other members."""
    def change(folder, members):
        made.write_tar(folder / name, members(made.samples(split)))
    return change


def flat(samples):
    return [(file, content) for _, _, file, content in samples]


def dotted(samples):
    return [(f'./{file}', content) for label, _, file, content in samples if label == 'cow']


@pytest.mark.parametrize('name, change, told', [
    ('folder', lambda folder: (folder / 'train' / 'empty').mkdir(), r"train has folders without .*: \['empty'\]"),
    ('folder', lambda folder: (folder / 'train' / 'logo.jpg').write_bytes(made.jpeg(0, 0)),
     r'in no class folder, such as .*train/logo\.jpg'),
    ('folder', lambda folder: shutil.copytree(folder / 'val', folder / 'valid'),
     r"'validation' may be any of \['val', 'valid'\]; name one of them"),
    ('tars', lambda folder: made.write_tar(folder / 'train.tar', []), r'train\.tar has no images'),
    ('tars', lambda folder: (folder / 'train.tar').write_bytes(b''), r'train\.tar .* as a tar file: empty file'),
    ('tars', lambda folder: (folder / 'train.tar').write_bytes(b'x' * 5000), r'train\.tar .*: invalid header'),
    ('tars', lambda folder: os.truncate(folder / 'train.tar', 700), r'train\.tar .*: unexpected end of data'),
    ('class_tars', lambda folder: os.truncate(folder / 'train' / 'cow.tar', 700), r'train/cow\.tar .*: unexpected end'),
    ('tar_of_tars', lambda folder: os.truncate(folder / 'train.tar', 40000), r'train\.tar .*: unexpected end of data'),
    ('tars', lambda folder: (folder / 'train.tar').unlink(), r"expected a folder named train .*found \['val\.tar'\]"),
    ('tars', lambda folder: rewritten('train.tar', 'train')(folder, flat), r'such as .*train\.tar/0000\.jpg'),
    ('class_tars', lambda folder: rewritten('train/cow.tar', 'train')(folder, dotted), r'such as .*/cow\.tar/\./2'),
    ('class_tars', lambda folder: made.write_tar(folder / 'train' / 'cow.tar', []),
     r"tar files without images: \['cow\.tar'\]"),
    ('class_tars', lambda folder: (folder / 'train' / 'cow.tar').write_bytes(b'x' * 5000),
     r'train/cow\.tar cannot be opened as a tar file'),
    ('wds', lambda folder: (folder / '_info.json').unlink(), r'expected _info\.json, or a split such as'),
    ('wds', lambda folder: (folder / '_info.json').write_text('{"splits"'), r'_info\.json has no readable splits'),
    ('wds', lambda folder: (folder / '_info.json').write_text('{"splits": {"train": {}, "val": {}}}'),
     "split 'val' of wds/made in .* cannot be opened: 'num_samples'"),
    ('wds', lambda folder: (folder / 'train-0001.tar').unlink(), r"lacks 1 of 2 shards: \['train-0001\.tar'\]"),
    ('wds', lambda folder: (folder / 'val-0000.tar').unlink(), r"lacks 1 of 2 shards: \['val-0000\.tar'\]"),
    ('hfds_folder', lambda folder: (folder / 'val' / 'cow').rename(folder / 'val' / 'dog'),
     r"has no image of 1 of 4 classes: \['cow'\]"),
    ('hfds_parquet', lambda folder: (folder / 'data/train-00000-of-00002.parquet').write_bytes(b'x' * 500),
     'cannot be opened: .*Parquet magic bytes not found'),
])
def test_damaged_sources_are_refused(folders, tmp_path, name, change, told):
    folder = copied(folders(name), tmp_path)
    change(folder)
    with pytest.raises(ValueError, match=told):
        for is_training in (False, True):
            opened(source(name, folder) if name != 'folder' else arguments(
                data_dir=str(folder), train_split='train', val_split='validation'), is_training)


@pytest.mark.parametrize('name, told', [
    ('folder', 'expected a folder named nope'),
    ('tars', 'expected a folder named nope'),
    ('class_tars', 'expected a folder named nope'),
    ('torchvision', 'expected a folder named nope'),
    ('hfds_folder', "split 'nope' of hfds/.* cannot be opened: Unknown split"),
    ('hfds_parquet', "split 'nope' of hfds/.* cannot be opened: Unknown split"),
    ('hfids', r"split of hfids/.* must be one of \['train', 'validation'\], got 'nope'"),
    ('wds', r"_info\.json: expected a split named nope, found \['train', 'val'\]"),
])
def test_a_split_is_never_replaced_by_another(folders, name, told):
    args = source(name, folders(name))
    for is_training in (False, True):
        with pytest.raises(ValueError, match=told):
            dataset_factory.open_dataset(args, 'nope', 3, is_training)
    with pytest.raises(ValueError, match='the name of a split must not be empty'):
        dataset_factory.open_dataset(args, '', 3, is_training=False)


def test_torchvisions_test_images_are_not_every_other_split(tmp_path):
    args = arguments(dataset='torch/mnist', data_dir=str(made.make_mnist(tmp_path)))
    with pytest.raises(ValueError, match=r"split of torch/mnist must be one of .*, got 'trian'"):
        dataset_factory.open_dataset(args, 'trian', 3, is_training=True)


@pytest.mark.parametrize('dataset, data_dir, told', [
    ('', 'made.tar', 'expected a folder with a folder or a tar file for each split, got a file'),
    ('wds/made', None, '--data-dir is needed: the folder of the shards of wds/made'),
    ('wds/made', '', '--data-dir is needed: the folder of the shards of wds/made'),
    ('', '', '--data-dir is needed: the folder that holds'),
    ('torch/mnist', None, '--data-dir is needed: the folder of torch/mnist'),
    ('wds/made', 'nowhere', 'nowhere: no such folder'),
    ('hfds/nowhere/at/all', '.', 'hfds/nowhere/at/all .*cannot be opened'),
    ('hfids/nowhere/at/all', '.', 'hfids/nowhere/at/all .*cannot be opened'),
    ('hfds/', '.', "then a name, got 'hfds/'"),
])
def test_missing_sources_are_told(tmp_path, dataset, data_dir, told):
    made.write_tar(tmp_path / 'made.tar', [])
    args = arguments(dataset=dataset, data_dir=data_dir and str(tmp_path / data_dir))
    with pytest.raises(ValueError, match=told) as error:
        dataset_factory.open_dataset(args, 'train', 3, is_training=True)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('dataset, package', [
    ('wds/x', 'webdataset'), ('hfds/x', 'datasets'), ('hfids/x', 'datasets'), ('tfds/x', 'tensorflow-datasets')])
def test_missing_packages_are_named(monkeypatch, tmp_path, dataset, package):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ValueError, match=rf'--dataset {dataset} needs \w+: pip install {package}$'):
        dataset_factory.open_dataset(arguments(dataset=dataset, data_dir=str(tmp_path)), 'train', 3, is_training=True)


@pytest.mark.parametrize('splits, told', [
    (('train-{0000..0003}.tar|24', 'val-{0000..0001}.tar|15'), r"lacks 2 of 4 shards: \['train-0002\.tar'"),
    (('train-{0000..0001}.tar|24', 'val-{0000..0001}.tar'), r'must say how many images it has: val-.*\.tar\|IMAGES'),
    (('train-{0000..0001}.tar|many', 'val-{0000..0001}.tar|15'), "invalid literal for int.*'many'"),
    (('train-{0000..0001}.tar|24', 'val-{0000..0001}.tar|15'), None),
])
def test_shards_by_pattern(folders, tmp_path, splits, told):
    folder = copied(folders('wds'), tmp_path)
    (folder / '_info.json').unlink()
    args = source('wds', folder)
    args.train_split, args.val_split = splits
    if told is None:
        assert len(opened(args, True)) == TRAIN and len(evaluated(args)) == VAL
        return
    with pytest.raises(ValueError, match=told):
        [opened(args, is_training) for is_training in (False, True)]


@pytest.mark.parametrize('name', STREAMS)
@pytest.mark.parametrize('changes, size, told', [
    (dict(workers=3), 1, r"--workers 3 must not exceed the shards of .*, split 'train': there are 2"),
    (dict(workers=2), 2, '--workers 2 x 2 processes must not exceed the shards'),
    (dict(batch_size=16, grad_accum_steps=2), 1, '--batch-size must not exceed the 24 training images, got 32'),
    (dict(batch_size=16), 2, '--batch-size must not exceed the 24 training images, got 32'),
])
def test_a_streams_parts_are_counted_first(folders, name, changes, size, told):
    with pytest.raises(ValueError, match=told):
        training(source(name, folders(name), **changes), world_of(0, size))


def parquet(root, columns, features):
    import datasets
    for split in ('train', 'validation'):
        datasets.Dataset.from_dict(columns, features=features and datasets.Features(features)).to_parquet(
            root / f'{split}.parquet')
    return arguments(dataset=f'hfds/{root}', data_dir=str(root / 'tables'))


@pytest.mark.parametrize('labels, kind, told', [
    (['a', 'b', 'a'], lambda datasets: datasets.Value('string'), 'must be whole numbers, got string'),
    ([-1, -1, -1], lambda datasets: datasets.ClassLabel(names=['a', 'b']), r'must be below 2, got \[-1\]'),
    ([0, None, 1], lambda datasets: datasets.ClassLabel(names=['a', 'b']), r'must be below 2, got \[None\]'),
    ([[0], [1], []], lambda datasets: datasets.Sequence(datasets.Value('int64')), 'whole numbers, got a list'),
])
def test_hugging_faces_labels_are_looked_at_first(tmp_path, labels, kind, told):
    if IS_OLD_TIMM and 'whole numbers' in told:
        pytest.skip('timm before 1.0.31 reads the names of the classes itself, and refuses labels without them')
    import datasets
    images = [dict(bytes=made.jpeg(index, 0), path=None) for index in range(3)]
    args = parquet(tmp_path, dict(image=images, label=labels), dict(image=datasets.Image(), label=kind(datasets)))
    with pytest.raises(ValueError, match=told):
        dataset_factory.open_dataset(args, 'validation', 3, is_training=False)


def test_hugging_faces_columns_are_named(tmp_path):
    args = parquet(tmp_path, dict(picture=['x'], kind=[0]), None)
    with pytest.raises(ValueError, match=r"expected columns image and label, found \['kind', 'picture'\]"):
        dataset_factory.open_dataset(args, 'train', 3, is_training=True)


@pytest.mark.usefixtures('logs_of_rank_0')
def test_classes_without_training_images_are_told(tmp_path, caplog):
    """Not refused, where the list of classes is the data set's own: it may be a part of a larger one."""
    import datasets
    images = [dict(bytes=made.jpeg(index, 0), path=None) for index in range(3)]
    features = dict(image=datasets.Image(), label=datasets.ClassLabel(names=['a', 'b', 'c']))
    args = parquet(tmp_path, dict(image=images, label=[0, 2, 0]), features)
    dataset_factory.open_dataset(args, 'validation', 3, is_training=False)
    assert not caplog.messages
    dataset_factory.open_dataset(args, 'train', 3, is_training=True)
    assert "has no image of 1 of 3 classes: ['b']" in caplog.text


def test_a_download_is_one_processs(tmp_path, monkeypatch):
    def create(*args, **options):
        with pytest.raises(Timeout):
            FileLock(tmp_path / 'new' / '.download.lock').acquire(timeout=0)
        return SimpleNamespace()

    monkeypatch.setattr(dataset_factory, 'create_dataset', create)
    args = arguments(dataset='torch/mnist', data_dir=str(tmp_path / 'new'), dataset_download=True)
    dataset_factory.open_dataset(args, 'train', 3, is_training=True)


# --- as a user calls it ---


def command(name, folder, tmp_path, *more):
    args = source(name, folder)
    named = ['--dataset', args.dataset] if args.dataset else []
    return [
        *launch.TINY, *named, '--data-dir', args.data_dir, '--val-split', args.val_split, '--img-size', '16',
        '--batch-size', '4', '--epochs', '1', '--warmup-epochs', '0', '--output', str(tmp_path), '--experiment', 'run',
        *more]


def last_row(folder):
    header, *rows = (folder / 'summary.csv').read_text().splitlines()
    return dict(zip(header.split(','), map(float, rows[-1].split(','))))


def test_tar_files_train_and_evaluate(folders, tmp_path, capsys):
    assert train.main(command('tars', folders('tars'), tmp_path)) == 0
    assert json.loads((tmp_path / 'run/summary.json').read_text())['classes'] == list(made.CLASSES)
    assert validate.main(['--checkpoint', str(tmp_path / 'run/last.pth.tar'), '--workers', '0']) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result['images'] == VAL
    assert result['loss'] == pytest.approx(last_row(tmp_path / 'run')['eval_loss'], abs=1e-5)


@pytest.mark.slow  # 11 s: two processes
def test_two_processes_train_and_evaluate_a_stream(folders, tmp_path, capsys):
    """The accuracy of both is that of one that evaluates alone."""
    argv = command('wds', folders('wds'), tmp_path, '--num-classes', '3', '--batch-size', '2', '--log-interval', '1')
    ends = launch.finish(launch.start(argv, ranks=2))
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert f'step {TRAIN // 4}/{TRAIN // 4}' in ends[0][1]
    validate.main(['--checkpoint', str(tmp_path / 'run/last.pth.tar'), '--split', 'val', '--workers', '0'])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result['images'] == VAL
    assert result['loss'] == pytest.approx(last_row(tmp_path / 'run')['eval_loss'], abs=1e-5)


@pytest.mark.parametrize('smoothing', ['0', '0.1'])
def test_labels_beyond_the_models_classes_are_one_line(folders, tmp_path, capsys, smoothing):
    argv = command('wds', folders('wds'), tmp_path, '--num-classes', '2', '--smoothing', smoothing)
    assert train.main(argv) == 1
    line, = capsys.readouterr().err.strip().splitlines()
    assert 'an image is of class 2, the model has 2 classes' in line


@pytest.mark.parametrize('name, more, told', [
    ('wds', ['--num-classes', '3', '--train-split', 'nope'], '_info.json: expected a split named nope'),
    ('hfds_parquet', ['--train-split', 'nope'], 'Unknown split "nope"'),
    ('tars', ['--train-split', 'nope'], 'expected a folder named nope'),
])
def test_a_mistake_is_one_line(folders, tmp_path, capsys, name, more, told):
    with pytest.raises(SystemExit) as stopped:
        train.main(command(name, folders(name), tmp_path, *more))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and told in lines[0]
    assert list(tmp_path.iterdir()) == []
    assert logging.getLogger('datasets').handlers == []


def test_each_process_augments_a_stream_by_draws_of_its_own():
    class Reader:
        def __iter__(self):
            return iter([(0, 0)] * 4)

    class Drawing:
        reader = Reader()

        def set_epoch(self, number):
            pass

        def transform(self, image):
            return random.random()

    def draws(rank, number):
        stream = Stream(Drawing(), 42, rank)
        stream.start(number)
        return [image for image, _ in stream]

    assert draws(0, 3) == draws(0, 3)
    assert len({*draws(0, 3), *draws(1, 3), *draws(0, 4)}) == 12
