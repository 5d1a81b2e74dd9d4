"""Batches: keyed and in order, each image once, and images that can't be read."""
import io
import random
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import make_folder, options

from smpconv_models.training import loader, rng
from smpconv_models.training.config import AugmentationOptions
from smpconv_models.training.datasets import ResumableBatchSampler, SeededDataset, SkippedSamples
from smpconv_models.training.distributed import DistributedContext
from smpconv_models.training.tasks import PadAndRandomCrop, create_task

CPU = torch.device('cpu')
CONFIG = dict(
    input_size=(3, 16, 16), mean=(0.3,) * 3, std=(0.4,) * 3, interpolation='bicubic', crop_pct=1., crop_mode='center')
STRONG = dict(aa='rand-m9-mstd0.5-inc1', reprob=0.5)


def training(data, split='train', world=None, skipped=None, accumulation=1, **augmentation):
    """The loader of the training samples that the options name."""
    task = create_task(data)
    options = AugmentationOptions(**{
        **dict(scale=[0.5, 1.], ratio=[1., 1.], hflip=0., color_jitter=0.), **augmentation})
    return loader.create_train_loader(
        task, task.create_dataset(split, 3, is_training=True), CONFIG, options, CPU, world or DistributedContext(),
        skipped or SkippedSamples(limit=10), grad_accum_steps=accumulation, dist_timeout=60., train_split=split)


def evaluation(data, split='val', world=None):
    """The loader of the evaluation samples that the options name."""
    task = create_task(data)
    return loader.create_eval_loader(
        task, task.create_dataset(split, 3, is_training=False), CONFIG, CPU, world or DistributedContext(),
        dist_timeout=60.)


def targets_of(batches):
    return [int(target) for _, targets in batches for target in targets]


# --- keys ---


def test_keys_are_the_same_everywhere():
    """Numbers written down, so that a run goes on under another version of Python too."""
    assert rng.derive_seed(42, 'image', 0, 1) == 5174739598509848351
    assert rng.seeded_permutation(8, 42, 'order', 0).tolist() == [1, 4, 0, 6, 7, 2, 5, 3]


def test_a_key_seeds_every_generator():
    def drawn(*key):
        rng.seed_everything(*key)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert drawn(1, 2) == drawn(1, 2)
    assert all(a != b for a, b in zip(drawn(1, 2), drawn(2, 1)))


# --- batches ---


def positions(batch_size, accumulation, world_size, epoch=0, step=0, length=53):
    """Return the samples of each step over all ranks."""
    parts = [
        ResumableBatchSampler(length, batch_size, accumulation, rank, world_size, seed=7) for rank in range(world_size)]
    for part in parts:
        part.start(epoch, step)
    batches = [list(part) for part in parts]
    assert {len(batch) for batch in batches} == {len(parts[0])}
    return [
        {item for own in batches for batch in own[at:at + accumulation] for item in batch}
        for at in range(0, len(batches[0]), accumulation)]


def test_every_image_comes_once_an_epoch():
    steps = positions(4, 1, 1)
    assert len(steps) == 13 and len(set().union(*steps)) == 52  # one of 53 fills no batch
    assert steps != positions(4, 1, 1, epoch=1)


@pytest.mark.parametrize('divided', [(2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 4, 1)])
def test_steps_hold_the_same_images_however_they_are_divided(divided):
    assert positions(*divided) == positions(4, 1, 1)


def test_what_is_done_is_left_out():
    assert positions(2, 1, 2, epoch=3, step=5) == positions(2, 1, 2, epoch=3)[5:]


@pytest.mark.parametrize('length, world_size', [(10, 3), (2, 3), (0, 2)])
def test_evaluation_has_each_image_in_one_process(length, world_size):
    class Source(list):
        classes = None
    source = Source((Image.new('RGB', (8, 8)), index) for index in range(length))
    found = []
    for rank in range(world_size):
        batches = loader.create_eval_loader(
            create_task(options()), SeededDataset(source, seed=0), CONFIG, CPU, DistributedContext(0, rank, world_size),
            dist_timeout=60.).loader
        targets = targets_of(batches)
        assert len(batches) == -(-len(targets) // 2)
        found += targets
    assert sorted(found) == list(range(length))


# --- samples ---


def test_augmentation_is_a_function_of_epoch_and_index(tmp_path):
    images = training(options(make_folder(tmp_path)), scale=[0.1, 1.], hflip=0.5, **STRONG)
    samples = images.dataset
    first, _ = samples[3, 4]
    random.random(), samples[3, 1]
    assert torch.equal(samples[3, 4][0], first)
    assert not torch.equal(samples[4, 4][0], first) and not torch.equal(samples[3, 5][0], first)
    images.start(3, 1)
    assert images.names(1) == [samples.name(index) for _, index in images.order.batch(1, 0)]
    assert samples.name(0) == str(tmp_path / 'train/cat/0.png')


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_do_not_depend_on_who_loads_them(workers):
    images = training(options(dataset='digits', batch_size=100, workers=workers), **STRONG)
    assert images.steps == 14 and images.num_images == 1437 and images.dataset.name(5) == 'image 5'
    batch, targets = next(images.start(2, 3))
    assert batch.shape == (100, 3, 16, 16)
    expected = [images.dataset[key] for key in images.order.batch(3, 0)]
    assert torch.equal(batch, torch.stack([image for image, _ in expected]))
    assert targets.tolist() == [target for _, target in expected]


def test_evaluation_is_in_order():
    loaded = evaluation(options(dataset='digits', batch_size=100))
    assert targets_of(loaded.loader) == loaded.loader.loader.loader.dataset.source.dataset.labels
    assert loaded.num_skipped(350) == 10 and loaded.skipped.count == 0


# --- images that can't be read ---


def damaged(kind):
    """Bytes that look like an image file."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype('uint8')
    image = Image.fromarray(pixels)
    if kind == 'empty':
        return b''
    if kind == 'text':
        return b'not an image'
    if kind == 'bomb':  # a header that says 60,000 x 60,000
        Image.new('1', (8, 8)).save(file, 'PNG')
        content = bytearray(file.getvalue())
        content[16:24] = (60000).to_bytes(4, 'big') * 2
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, 'big')
        return bytes(content)
    image.save(file, kind)
    return file.getvalue()[:len(file.getvalue()) * 2 // 3]


@pytest.mark.parametrize('kind, name', [
    ('JPEG', 'x.jpg'), ('PNG', 'x.png'), ('WEBP', 'x.jpg'), ('TIFF', 'x.jpg'), ('empty', 'x.jpg'), ('text', 'x.jpg'),
    ('bomb', 'x.png'),
])
def test_an_unreadable_training_image_is_skipped_and_named(tmp_path, caplog, kind, name):
    path = make_folder(tmp_path) / 'train' / 'dog' / name
    path.write_bytes(damaged(kind))
    skipped = SkippedSamples(limit=1)
    images = training(options(tmp_path, batch_size=7), skipped=skipped)
    for epoch in range(2):
        (batch, targets), = images.start(epoch, 0)
        assert len(batch) == 7 and sorted(targets.tolist())[:3] == [0, 0, 0]  # filled up with a readable one
    assert skipped.count == 2 and skipped.seen == {str(path)}
    assert sum(str(path) in message for message in caplog.messages) == 1


@pytest.mark.parametrize('workers', [0, 1])
def test_too_many_unreadable_images_are_an_error(tmp_path, workers):
    make_folder(tmp_path)
    for name in ('x.jpg', 'y.jpg'):
        (tmp_path / 'train' / 'dog' / name).write_bytes(b'')
    images = training(options(tmp_path, batch_size=8, workers=workers), skipped=SkippedSamples(limit=1))
    with pytest.raises(ValueError, match=r'2 training images cannot be read, --max-unreadable is 1.*dog/[xy]\.jpg'):
        next(images.start(0, 0))


@pytest.mark.parametrize('workers', [0, 1])
def test_an_error_of_a_worker_is_one_line(tmp_path, workers):
    with pytest.raises(ValueError, match=r'^--random-crop-pad takes images of the input size, 16x16, got 12x10$'):
        images = training(options(make_folder(tmp_path), workers=workers))
        images.dataset.transform = PadAndRandomCrop((16, 16), 1)
        next(images.start(0, 0))
