"""Every form in which images come: tar files, WebDataset's shards, Hugging Face's data sets and torchvision's."""
import io
import os
import pickle
import random
import shutil

import made
import pytest
import torch
from common import IS_OLD_TIMM
from filelock import FileLock, Timeout
from PIL import Image
from test_data import options
from test_loaders import STRONG, evaluation, targets_of, training
from torch.utils.data import DataLoader

from smpconv_models.training.dataset_factory import create_dataset
from smpconv_models.training.datasets import SeededIterableDataset, SkippedSamples
from smpconv_models.training.distributed import DistributedContext

pytestmark = pytest.mark.usefixtures('quick_streams')

TRAIN, VAL = (len(made.CLASSES) * count for count in made.SPLITS.values())

SOURCES = made.SOURCES
STREAMS = ('hfids', 'wds')
MAPS = [name for name in SOURCES if name not in STREAMS]


def source(name, folder, **changes):
    """The options that name a source."""
    if name == 'hfids' and IS_OLD_TIMM:
        pytest.skip('timm before 1.0.31 passes trust_remote_code to streams, which datasets 4 has no more')
    dataset = SOURCES[name][1].format(folder)
    # Hugging Face's library keeps its tables there
    data_dir = folder.parent / f'{folder.name}_tables' if dataset.startswith('hf') else folder
    return options(data_dir, dataset=dataset, **{**dict(seed=1, batch_size=4), **changes})


def opened(name, folder, is_training=False):
    return create_dataset(source(name, folder), 'train' if is_training else SOURCES[name][2], 3, is_training)


def evaluated(name, folder, world=None, **changes):
    """The targets of all evaluation images."""
    return sorted(targets_of(evaluation(source(name, folder, **changes), SOURCES[name][2], world).loader))


def labels_of(split):
    return sorted(label for _, label, _, _ in made.samples(split))


def world_of(rank, size):
    return DistributedContext(rank=rank, size=size)


# --- what is read ---


def contents(items):
    return sorted((image.size, image.tobytes(), int(target)) for image, target in items)


@pytest.mark.parametrize('name', SOURCES)
def test_the_same_images_come_in_every_form(folders, name):
    for is_training, split in ((True, 'train'), (False, 'val')):
        dataset = opened(name, folders(name), is_training)
        assert dataset.classes == (None if name == 'wds' else list(made.CLASSES))
        assert dataset.num_samples == (TRAIN if is_training else VAL)
        dataset.transform = lambda image: image
        items = dataset if dataset.is_stream else (dataset[0, index] for index in range(len(dataset)))
        expected = [
            (Image.open(io.BytesIO(content)).convert('RGB'), label) for _, label, _, content in made.samples(split)]
        assert contents(items) == contents(expected)


@pytest.mark.parametrize('in_chans', [1, 3])
def test_torchvisions_digits_come_in_the_models_channels(tmp_path, in_chans):
    data = options(made.make_mnist(tmp_path), dataset='torch/mnist')
    image, target = create_dataset(data, 'train', in_chans, is_training=True)[0, 3]
    assert image.mode == ('L' if in_chans == 1 else 'RGB') and target == 3
    assert len(create_dataset(data, 'validation', in_chans, is_training=False)) == 20
    with pytest.raises(ValueError, match=r"split of torch/mnist must be one of .*, got 'trian'"):
        create_dataset(data, 'trian', in_chans, is_training=True)


def test_the_order_of_tar_files_is_not_the_file_systems(folders, monkeypatch):
    names = []
    for reverse in (False, True):
        monkeypatch.setattr(
            'timm.data.readers.reader_image_in_tar.glob',
            lambda pattern, recursive, reverse=reverse: sorted(map(str, folders('class_tars').glob('train/*.tar')),
                                                               reverse=reverse))
        dataset = opened('class_tars', folders('class_tars'), True)
        names.append([dataset.name(index) for index in range(TRAIN)])
    assert names[0] == names[1] and names[0][0].endswith('train/ant.tar/0000.jpg')


@pytest.mark.parametrize('start', ['fork', 'pickle'])
@pytest.mark.parametrize('name', ['tars', 'class_tars', 'tar_of_tars'])
def test_an_open_tar_file_is_not_shared_with_workers(folders, name, start):
    """Neither inherited, as one position for all of them, nor sent along."""
    dataset = opened(name, folders(name), True)
    keys = [(0, index) for index in range(TRAIN)]
    expected = [dataset[key][1] for key in keys]
    assert sorted(expected) == labels_of('train')
    if start == 'pickle':  # as it is sent to workers that are spawned
        again = pickle.loads(pickle.dumps(dataset))
        assert [again[key][1] for key in keys] == expected
        return
    loader = DataLoader(
        dataset, sampler=keys * 30, batch_size=8, num_workers=2, collate_fn=list, multiprocessing_context='fork')
    assert [item[1] for batch in loader for item in batch] == expected * 30


# --- training and evaluation ---


@pytest.mark.parametrize('name', MAPS)
def test_an_epoch_resumes_to_the_bit(folders, name):
    whole = list(training(source(name, folders(name)), **STRONG).start(1, 0))
    assert len(whole) == TRAIN // 4
    for workers in (0, 1):
        rest = list(training(source(name, folders(name), workers=workers), **STRONG).start(1, 2))
        assert len(rest) == TRAIN // 4 - 2
        assert all(torch.equal(a, b) for ours, theirs in zip(rest, whole[2:]) for a, b in zip(ours, theirs))


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('name', STREAMS)
def test_a_stream_takes_its_steps(folders, name, workers):
    images = training(source(name, folders(name), workers=workers))
    assert images.steps == TRAIN // 4 and images.num_images is None and images.names(0) == []
    for epoch in range(2):
        assert sorted(targets_of(images.start(epoch, 0))) == labels_of('train')
    assert len(list(images.start(1, 4))) == 2


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('name', STREAMS)
def test_each_rank_evaluates_all_of_a_stream(folders, name, workers):
    for rank in range(2):
        assert evaluated(name, folders(name), world_of(rank, 2), workers=workers) == labels_of('val')


@pytest.mark.parametrize('name', ['class_tars', 'hfds_parquet'])
def test_ranks_divide_what_is_no_stream(folders, name):
    parts = [evaluated(name, folders(name), world_of(rank, 2), workers=1) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == labels_of('val')


# --- images that can't be read ---


def with_bad_images(name, root):
    """Create a source with two more images in each split, which cannot be decoded."""
    make, label = SOURCES[name][0], len(made.CLASSES) - 1
    bad = [(made.CLASSES[label], label, file, b'no image') for file in ('x.jpg', 'y.jpg')]
    made_samples = made.samples

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, 'samples', lambda *args: made_samples(*args) + bad)
        return make(root)


NAMED = {
    'folder': '{split}/cow/x.jpg', 'tars': '{split}.tar/cow/x.jpg', 'class_tars': '{split}/cow.tar/x.jpg',
    'tar_of_tars': '{split}.tar/cow.tar/x.jpg', 'torchvision': '{split}/cow/x.jpg', 'hfds_folder': '{split}/cow/x.jpg',
    'hfds_parquet': '(x.jpg)', 'hfids': 'x.jpg', 'wds': '{split}-0000.tar/x',
}


@pytest.mark.parametrize('name', SOURCES)
def test_unreadable_images_are_skipped_in_training_and_reported_in_evaluation(tmp_path, caplog, name):
    folder, skipped = with_bad_images(name, tmp_path / 'made'), SkippedSamples(limit=2)
    images = training(source(name, folder, batch_size=13), skipped=skipped)
    for epoch in range(2):
        assert [len(targets) for _, targets in images.start(epoch, 0)] == [13, 13]
    assert skipped.count == 4 and len(skipped.seen) == len(caplog.messages) == 2
    assert any(NAMED[name].format(split='train') in message for message in caplog.messages)
    caplog.clear()
    with pytest.raises(ValueError, match=r'[xy](\.jpg)?\)? cannot be read \(UnidentifiedImageError.*--skip-unreadable'):
        evaluated(name, folder)
    assert len(evaluated(name, folder, skip_unreadable=True)) == VAL
    assert NAMED[name].format(split='val') in caplog.text


def test_a_batch_of_unreadable_images_takes_the_next(tmp_path):
    folder = with_bad_images('folder', tmp_path)
    batches = [list(training(source('folder', folder, batch_size=1)).start(0, 0)) for _ in range(2)]
    assert [len(targets) for _, targets in batches[0]] == [1] * (TRAIN + 2)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*batches))


def test_nothing_but_unreadable_images_is_an_error(tmp_path):
    folder = made.make_wds(tmp_path)
    for shard in folder.glob('train*.tar'):
        made.write_tar(shard, [(file, content) for _, _, file, content in made.samples('train')])
    with pytest.raises(ValueError, match='the images ended after 0 of 6 batches'):
        next(training(source('wds', folder), skipped=SkippedSamples(limit=100)).start(0, 0))


def test_a_damaged_shard_is_no_shorter_evaluation(tmp_path, caplog):
    folder = made.make_wds(tmp_path)
    shard = folder / 'val-0001.tar'
    shard.write_bytes(shard.read_bytes()[:shard.stat().st_size // 2])
    with pytest.raises(ValueError, match=f'[1-9] of {VAL} images cannot be read .the stream ended'):
        evaluated('wds', folder)
    images = evaluation(source('wds', folder, skip_unreadable=True))
    count = len(targets_of(images.loader))
    assert 8 <= count < VAL and images.num_skipped(count) == VAL - count
    assert f'of {VAL} images (the stream ended before they came)' in caplog.text


def test_a_damaged_shard_is_made_up_for_in_training(tmp_path):
    folder = made.make_wds(tmp_path)
    (folder / 'train-0001.tar').write_bytes(b'no tar file' * 1000)
    assert len(list(training(source('wds', folder, workers=2)).start(0, 0))) == TRAIN // 4


@pytest.mark.parametrize('workers', [0, 1])
def test_a_damaged_table_of_a_stream_is_one_line(tmp_path, workers):
    """In this process and in a DataLoader worker, where PyTorch would add a traceback."""
    folder = made.make_parquet(tmp_path / 'made')
    (folder / 'data/train-00000-of-00002.parquet').write_bytes(b'x' * 500)
    with pytest.raises(ValueError, match=r'^the stream .*made cannot be read: .*Parquet magic bytes not found[^\n]*$'):
        list(training(source('hfids', folder, workers=workers)).start(0, 0))


# --- what is refused ---


def flat(samples):
    return [(file, content) for _, _, file, content in samples]


def dotted(samples):
    return [(f'./{file}', content) for label, _, file, content in samples if label == 'cow']


@pytest.mark.parametrize('name, change, message', [
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
    ('tars', lambda folder: made.write_tar(folder / 'train.tar', flat(made.samples('train'))),
     r'such as .*train\.tar/0000\.jpg'),
    ('class_tars', lambda folder: made.write_tar(folder / 'train/cow.tar', dotted(made.samples('train'))),
     r'such as .*/cow\.tar/\./2'),
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
def test_damaged_sources_are_refused(folders, tmp_path, name, change, message):
    folder = shutil.copytree(folders(name), tmp_path / 'copy')
    change(folder)
    with pytest.raises(ValueError, match=message):
        for split in ('validation' if name == 'folder' else SOURCES[name][2], 'train'):
            create_dataset(source(name, folder), split, 3, split == 'train')


@pytest.mark.parametrize('name, message', [
    ('folder', 'expected a folder named nope'),
    ('tars', 'expected a folder named nope'),
    ('class_tars', 'expected a folder named nope'),
    ('torchvision', 'expected a folder named nope'),
    ('hfds_folder', "split 'nope' of hfds/.* cannot be opened: Unknown split"),
    ('hfds_parquet', "split 'nope' of hfds/.* cannot be opened: Unknown split"),
    ('hfids', r"split of hfids/.* must be one of \['train', 'validation'\], got 'nope'"),
    ('wds', r"_info\.json: expected a split named nope, found \['train', 'val'\]"),
])
def test_a_split_is_never_replaced_by_another(folders, name, message):
    for is_training in (False, True):
        with pytest.raises(ValueError, match=message):
            create_dataset(source(name, folders(name)), 'nope', 3, is_training)
    with pytest.raises(ValueError, match='the name of a split must not be empty'):
        create_dataset(source(name, folders(name)), '', 3, is_training=False)


@pytest.mark.parametrize('dataset, data_dir, message', [
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
def test_missing_sources_are_reported(tmp_path, dataset, data_dir, message):
    made.write_tar(tmp_path / 'made.tar', [])
    with pytest.raises(ValueError, match=message) as error:
        create_dataset(options(data_dir and tmp_path / data_dir, dataset=dataset), 'train', 3, is_training=True)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('dataset, package', [
    ('wds/x', 'webdataset'), ('hfds/x', 'datasets'), ('hfids/x', 'datasets'), ('tfds/x', 'tensorflow-datasets')])
def test_missing_packages_are_named(monkeypatch, tmp_path, dataset, package):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ValueError, match=rf'--dataset {dataset} needs \w+: pip install {package}$'):
        create_dataset(options(tmp_path, dataset=dataset), 'train', 3, is_training=True)


@pytest.mark.parametrize('splits, message', [
    (('train-{0000..0003}.tar|24', 'val-{0000..0001}.tar|15'), r"lacks 2 of 4 shards: \['train-0002\.tar'"),
    (('train-{0000..0001}.tar|24', 'val-{0000..0001}.tar'), r'needs the number of its images: val-.*\.tar\|IMAGES'),
    (('train-{0000..0001}.tar|many', 'val-{0000..0001}.tar|15'), "invalid literal for int.*'many'"),
    (('train-{0000..0001}.tar|24', 'val-{0000..0001}.tar|15'), None),
])
def test_shards_by_pattern(folders, tmp_path, splits, message):
    folder = shutil.copytree(folders('wds'), tmp_path / 'copy')
    (folder / '_info.json').unlink()
    data = source('wds', folder)
    if message is None:
        assert len(create_dataset(data, splits[0], 3, is_training=True)) == TRAIN
        assert len(targets_of(evaluation(data, splits[1]).loader)) == VAL
        return
    with pytest.raises(ValueError, match=message):
        [create_dataset(data, split, 3, split == splits[0]) for split in reversed(splits)]


@pytest.mark.parametrize('name', STREAMS)
@pytest.mark.parametrize('workers, batch_size, accumulation, size, message', [
    (3, 4, 1, 1, r"split 'train' of .* has 2 shards for each rank, fewer than 3 DataLoader workers: use fewer"),
    (2, 4, 1, 2, 'has 1 shards for each rank, fewer than 2 DataLoader workers'),
    (0, 16, 2, 1, '--batch-size must not exceed the 24 training images, got 16 x 2 accumulated'),
    (0, 16, 1, 2, '--batch-size must not exceed the 24 training images, got 16 x 2 ranks'),
])
def test_a_streams_parts_are_counted_first(folders, name, workers, batch_size, accumulation, size, message):
    data = source(name, folders(name), workers=workers, batch_size=batch_size)
    with pytest.raises(ValueError, match=message):
        training(data, world=world_of(0, size), accumulation=accumulation)


def parquet(root, columns, features):
    import datasets
    for split in ('train', 'validation'):
        datasets.Dataset.from_dict(columns, features=features and datasets.Features(features)).to_parquet(
            root / f'{split}.parquet')
    return options(root / 'tables', dataset=f'hfds/{root}')


@pytest.mark.parametrize('labels, kind, message', [
    (['a', 'b', 'a'], lambda datasets: datasets.Value('string'), 'must be whole numbers, got string'),
    ([-1, -1, -1], lambda datasets: datasets.ClassLabel(names=['a', 'b']), r'must be below 2, got \[-1\]'),
    ([0, None, 1], lambda datasets: datasets.ClassLabel(names=['a', 'b']), r'must be below 2, got \[None\]'),
    ([[0], [1], []], lambda datasets: datasets.Sequence(datasets.Value('int64')), 'whole numbers, got a list'),
])
def test_hugging_faces_labels_are_looked_at_first(tmp_path, labels, kind, message):
    if IS_OLD_TIMM and 'whole numbers' in message:
        pytest.skip('timm before 1.0.31 reads the names of the classes itself, and refuses labels without them')
    import datasets
    images = [dict(bytes=made.jpeg(index, 0), path=None) for index in range(3)]
    data = parquet(tmp_path, dict(image=images, label=labels), dict(image=datasets.Image(), label=kind(datasets)))
    with pytest.raises(ValueError, match=message):
        create_dataset(data, 'validation', 3, is_training=False)


def test_hugging_faces_columns_are_named(tmp_path):
    data = parquet(tmp_path, dict(picture=['x'], kind=[0]), None)
    with pytest.raises(ValueError, match=r"expected columns image and label, found \['kind', 'picture'\]"):
        create_dataset(data, 'train', 3, is_training=True)


@pytest.mark.usefixtures('logs_of_rank_0')
def test_classes_without_training_images_are_reported(tmp_path, caplog):
    """Not refused, where the list of classes is the data set's own: it may be a part of a larger one."""
    import datasets
    images = [dict(bytes=made.jpeg(index, 0), path=None) for index in range(3)]
    features = dict(image=datasets.Image(), label=datasets.ClassLabel(names=['a', 'b', 'c']))
    data = parquet(tmp_path, dict(image=images, label=[0, 2, 0]), features)
    create_dataset(data, 'validation', 3, is_training=False)
    assert not caplog.messages
    create_dataset(data, 'train', 3, is_training=True)
    assert "has no image of 1 of 3 classes: ['b']" in caplog.text


def test_a_download_is_one_processs(tmp_path, monkeypatch):
    def create(*args, **options):
        with pytest.raises(Timeout):
            FileLock(tmp_path / 'new' / '.download.lock').acquire(timeout=0)
        return []

    monkeypatch.setattr('timm.data.create_dataset', create)
    data = options(tmp_path / 'new', dataset='torch/mnist', dataset_download=True)
    create_dataset(data, 'train', 3, is_training=True)


def test_each_rank_augments_a_stream_by_random_numbers_of_its_own():
    class Reader:
        num_samples = 4

        def __iter__(self):
            return iter([(0, 0)] * 4)

    class Numbers:
        reader = Reader()

        def set_epoch(self, number):
            pass

    def draw(rank, number):
        stream = SeededIterableDataset(Numbers(), 42, None)
        stream.rank, stream.transform = rank, lambda image: random.random()
        stream.start(number, 0)
        return [image for image, _ in stream]

    assert draw(0, 3) == draw(0, 3)
    assert len({*draw(0, 3), *draw(1, 3), *draw(0, 4)}) == 12
