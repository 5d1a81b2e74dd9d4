"""Batches: keyed and in order, each image once, and images that can't be read."""
import io
import random
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import arguments, make_folder

from smpconv_models.training import Digits, dataset_factory, loader, rng
from smpconv_models.training.datasets import Batches, InOrder, Samples
from smpconv_models.training.distributed import DistributedContext
from smpconv_models.training.skipped import SkippedInTraining

CPU = torch.device('cpu')
CONFIG = dict(
    input_size=(3, 16, 16), mean=(0.3,) * 3, std=(0.4,) * 3, interpolation='bicubic', crop_pct=1., crop_mode='center')


def training(args, dataset, left_out=None):
    return loader.train_loader(
        args, dataset, CONFIG, CPU, DistributedContext(), left_out or SkippedInTraining(args.max_unreadable))


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
    """Of each step, over all processes."""
    parts = [Batches(length, batch_size, accumulation, rank, world_size, seed=7) for rank in range(world_size)]
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
    found = [
        index for rank in range(world_size) for batch in InOrder(length, 2, rank, world_size) for _, index in batch]
    assert sorted(found) == list(range(length))


# --- samples ---


def test_augmentation_is_a_function_of_epoch_and_index(tmp_path):
    args = arguments(
        data_dir=str(make_folder(tmp_path)), aa='rand-m9-mstd0.5-inc1', reprob=0.5, scale=[0.1, 1.], hflip=0.5)
    dataset = dataset_factory.open_dataset(args, 'train', 3, is_training=True)
    samples = training(args, dataset).samples
    first, _ = samples[3, 4]
    random.random(), samples[3, 1]
    assert torch.equal(samples[3, 4][0], first)
    assert not torch.equal(samples[4, 4][0], first) and not torch.equal(samples[3, 5][0], first)


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_do_not_depend_on_who_loads_them(workers):
    args = arguments(batch_size=100, workers=workers, aa='rand-m9-mstd0.5-inc1', reprob=0.5)
    images = training(args, Digits('train', 'RGB'))
    assert images.steps == 14
    batch, targets = next(images.start(2, 3))
    assert batch.shape == (100, 3, 16, 16)
    expected = [images.samples[position] for position in images.batches.batch(3, 0)]
    assert torch.equal(batch, torch.stack([image for image, _ in expected]))
    assert targets.tolist() == [target for _, target in expected]


def test_evaluation_is_in_order():
    args = arguments(batch_size=100)
    held_out = loader.held_out(args, Digits('val', 'RGB'), CONFIG, CPU, DistributedContext())
    assert torch.cat([target for _, target in held_out.loader]).tolist() == Digits('val').labels


@pytest.mark.parametrize('changes, told', [
    (dict(batch_size=2000), '--batch-size must not exceed the 1437 training images, got 2000$'),
    (dict(batch_size=1000, grad_accum_steps=2), 'got 1000 x 2 accumulated'),
    (dict(aa='nonsense'), 'the images cannot be augmented so'),
])
def test_what_cannot_be_loaded_is_told(changes, told):
    with pytest.raises(ValueError, match=told):
        training(arguments(**changes), Digits('train', 'RGB'))


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
def test_an_unreadable_training_image_is_left_out_and_named(tmp_path, caplog, kind, name):
    root = make_folder(tmp_path)
    path = root / 'train' / 'dog' / name
    path.write_bytes(damaged(kind))
    args = arguments(data_dir=str(root), batch_size=7)
    left_out = SkippedInTraining(limit=1)
    images = training(args, dataset_factory.open_dataset(args, 'train', 3, is_training=True), left_out)
    for epoch in range(2):
        (batch, targets), = images.start(epoch, 0)
        assert len(batch) == 7 and sorted(targets.tolist())[:3] == [0, 0, 0]  # filled up with a readable one
    assert left_out.count == 2 and left_out.seen == {str(path)}
    assert sum(str(path) in message for message in caplog.messages) == 1


def test_too_many_unreadable_images_are_an_error(tmp_path):
    root = make_folder(tmp_path)
    for name in ('x.jpg', 'y.jpg'):
        (root / 'train' / 'dog' / name).write_bytes(b'')
    args = arguments(data_dir=str(root), batch_size=8, max_unreadable=1)
    images = training(args, dataset_factory.open_dataset(args, 'train', 3, is_training=True))
    with pytest.raises(ValueError, match=r'2 training images cannot be read, --max-unreadable is 1.*dog/[xy]\.jpg'):
        next(images.start(0, 0))


def test_an_unreadable_image_is_never_replaced_in_evaluation(tmp_path, caplog):
    root = make_folder(tmp_path)
    path = root / 'val' / 'cat' / '9.jpg'
    path.write_bytes(damaged('JPEG'))
    args = arguments(data_dir=str(root))

    def targets():
        dataset = dataset_factory.open_dataset(args, 'val', 3, is_training=False)
        return [int(target) for _, batch in loader.held_out(args, dataset, CONFIG, CPU, DistributedContext()).loader
                for target in batch]

    with pytest.raises(ValueError, match=r'cat/9\.jpg cannot be read .*--skip-unreadable'):
        targets()
    args.skip_unreadable = True
    assert targets() == [0, 0, 0, 1, 1, 1] and str(path) in caplog.text


def test_names_are_the_images_files(tmp_path):
    args = arguments(data_dir=str(make_folder(tmp_path)))
    dataset = dataset_factory.open_dataset(args, 'train', 3, is_training=True)
    assert Samples(dataset, 0).name(0) == str(tmp_path / 'train/cat/0.png')
    assert Samples(Digits('train'), 0).name(5) == 'image 5'
