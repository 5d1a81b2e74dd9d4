"""Images as sequences: pixels, orders, and damaged files."""
import hashlib
import json
import os

import made_sequences as made
import numpy as np
import pytest
import torch

from smpconv_models.data import create_sequence_dataset, images
from smpconv_models.data.images import Digits


def test_digits_equal_those_of_the_image_data_set():
    for split, count in (('train', 1437), ('validation', 360)):
        digits, found = Digits(split), create_sequence_dataset('digits', None, split)
        assert len(found) == count and found.labels == digits.labels
        pixels = np.asarray(digits.images[7], 'float32')
        expected = torch.from_numpy((pixels - 77.885591) / 95.869077).reshape(1, 64)
        torch.testing.assert_close(found[7][0], expected)


@pytest.mark.parametrize('name', ['digits', 'mnist'])
def test_permuted_steps_are_the_same_in_one_order(tmp_path, name):
    root = made.make_mnist(tmp_path)
    plain, permuted = (create_sequence_dataset(prefix + name, root, 'train') for prefix in ('', 'permuted-'))
    order = images._step_order(f'permuted-{name}', plain.shape[1])
    assert permuted.labels == plain.labels
    for index in (0, 30):
        assert not torch.equal(permuted[index][0], plain[index][0])
        for step in (0, 1, 50):
            assert permuted[index][0][0, step] == plain[index][0][0, order[step]]


def test_mnist_is_read_row_by_row(tmp_path):
    dataset = create_sequence_dataset('mnist', made.make_mnist(tmp_path), 'test')
    content = made.mnist_files()['t10k-images-idx3-ubyte'][16:]
    pixels = torch.tensor(list(content[3 * 784:4 * 784])) / 255  # the fourth image
    torch.testing.assert_close(dataset[3][0], ((pixels - 0.1307) / 0.3081).unsqueeze(0))
    assert dataset.labels == [index % 10 for index in range(20)] and dataset.classes == tuple('0123456789')


def test_cifar10_is_read_row_by_row_in_three_channels(tmp_path, monkeypatch, server):
    made.publish_cifar10(server, monkeypatch)
    dataset = create_sequence_dataset('cifar10', tmp_path / 'data', 'train', download=True)
    assert len(dataset) == 50 and dataset.classes[3] == 'class 3' and dataset.image_size == (32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for channel, row, column in ((0, 0, 1), (1, 2, 0), (2, 31, 30)):
        value = (16 * channel + 2 * row + column + 2) / 255  # of image 2
        expected = (value - mean[channel]) / std[channel]
        torch.testing.assert_close(dataset[2][0][channel, 32 * row + column], expected)


@pytest.mark.parametrize('name', ['mnist', 'permuted-mnist'])
def test_images_are_augmented_before_their_steps_are_put_in_order(tmp_path, name):
    plain, changed = (
        create_sequence_dataset(name, made.make_mnist(tmp_path / str(index)), 'train') for index in range(2))
    assert plain.image_size == (28, 28) and plain.augment is None
    shapes = []

    def flip(pixels):
        shapes.append((pixels.shape, pixels.dtype))
        return pixels.reshape(1, 28, 28).flip(-1).reshape(1, 784)

    changed.augment = flip
    order = images._step_order(name, 784) if name.startswith('permuted') else torch.arange(784)
    image = torch.empty(1, 784)
    image[:, order] = plain[7][0]
    assert torch.equal(changed[7][0], flip(image)[:, order])
    assert shapes[0] == ((1, 784), torch.uint8)


# --- damaged files ---

IMAGES, LABELS = 'train-images-idx3-ubyte', 'train-labels-idx1-ubyte'


@pytest.mark.parametrize('file, change, message', [
    (IMAGES, lambda path: os.truncate(path, 20000), 'found 20000; remove it and pass'),
    (LABELS, lambda path: os.truncate(path, 30), 'expected 48 bytes by its header, found 30'),
    (LABELS, lambda path: path.write_bytes(b''), 'expected the IDX header of bytes in 1 dimensions'),
    (IMAGES, lambda path: path.write_bytes(b'<html>no such file</html>'), 'expected the IDX header of bytes in 3'),
    (IMAGES, lambda path: path.write_bytes(made.mnist_files()[LABELS]), 'expected the IDX header of bytes in 3'),
    (IMAGES, lambda path: path.write_bytes(path.read_bytes() + b'more'), 'expected 31376 bytes .* found 31380'),
    (IMAGES, lambda path: path.write_bytes(path.read_bytes()[:8] + bytes([0, 0, 0, 14]) + path.read_bytes()[12:]),
     r'expected items of shape \(28, 28\), found \(14, 28\)'),
])
def test_damaged_files_of_mnist_are_reported(tmp_path, file, change, message):
    path = made.make_mnist(tmp_path) / 'MNIST' / 'raw' / file
    change(path)
    for download in (False, True):
        with pytest.raises(ValueError, match=f'^[^\n]*{file} is damaged: [^\n]*{message}'):
            create_sequence_dataset('mnist', tmp_path, 'train', download)
    assert len(create_sequence_dataset('mnist', tmp_path, 'test')) == 20


def test_a_file_of_the_published_size_with_another_checksum_is_reported(tmp_path, monkeypatch):
    content = made.make_mnist(tmp_path).joinpath('MNIST', 'raw', IMAGES).read_bytes()
    monkeypatch.setitem(images._MNIST_FILES, IMAGES, ((28, 28), len(content), images._MNIST_FILES[IMAGES][2]))
    with pytest.raises(ValueError, match='ubyte is damaged: its MD5 is not 6bbc9ace898e44ae57da46a324031adb; remove'):
        create_sequence_dataset('mnist', tmp_path, 'train')


@pytest.mark.parametrize('change, message', [
    (lambda content: made.mnist_files((('train', 30),))[LABELS],
     r'expected a label from 0 to 9 for each of 40 images .*found 30 from 0 to 9; remove both files and pass'),
    (lambda content: content[:-1] + b'\x0a', 'found 40 from 0 to 10'),
    (lambda content: content[:8] + bytes(value % 9 for value in content[8:]), "1 of 10 classes: .'9'.$"),
])
def test_labels_of_other_images_are_reported(tmp_path, change, message):
    path = made.make_mnist(tmp_path) / 'MNIST' / 'raw' / LABELS
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        create_sequence_dataset('mnist', tmp_path, 'train')


def test_an_interrupted_unpacking_is_repaired_by_a_download(tmp_path, monkeypatch, server):
    made.publish_mnist(server, monkeypatch)
    root = tmp_path / 'data'
    create_sequence_dataset('mnist', root, 'train', download=True)
    path = root / 'MNIST' / 'raw' / IMAGES
    os.truncate(path, 100)
    with pytest.raises(ValueError, match='remove it and pass download=True'):
        create_sequence_dataset('mnist', root, 'train', download=True)
    path.unlink()
    assert len(create_sequence_dataset('mnist', root, 'train', download=True)) == 40


def test_a_damaged_file_beside_a_missing_one_is_reported_by_name(tmp_path):
    folder = made.make_mnist(tmp_path) / 'MNIST' / 'raw'
    os.truncate(folder / IMAGES, 100)
    (folder / LABELS).unlink()
    with pytest.raises(ValueError, match='images-idx3-ubyte is damaged'):
        create_sequence_dataset('mnist', tmp_path, 'train', download=True)


def test_damaged_files_of_cifar10_are_reported_and_replaced(tmp_path, monkeypatch, server):
    made.publish_cifar10(server, monkeypatch)
    root = tmp_path / 'data'
    create_sequence_dataset('cifar10', root, 'train', download=True)
    os.truncate(root / 'cifar-10-batches-py' / 'data_batch_4', 100)
    with pytest.raises(ValueError, match=r'data_batch_4 is missing or damaged \(1 such files\): pass download=True'):
        create_sequence_dataset('cifar10', root, 'test')
    assert len(create_sequence_dataset('cifar10', root, 'test', download=True)) == 10
    (root / 'cifar-10-batches-py' / 'batches.meta').unlink()
    with pytest.raises(ValueError, match=r'batches.meta is missing or damaged'):
        create_sequence_dataset('cifar10', root, 'test')


# --- permutations ---


@pytest.mark.parametrize('name, length, sha256', [
    ('permuted-mnist', 784, 'd509911d4a067c53460ed524396abc2713ff40b7a56b7a2e3867c1513edbb96b'),
    ('permuted-digits', 64, '1ed060ba9f5580e8695ec37233e2ce83cf1306b20c6aada0a7119e71dbadb2a0')])
def test_orders_do_not_depend_on_the_version_of_numpy(name, length, sha256):
    """Checksums of the numbers as JSON, taken when they were a file of the package."""
    order = images._step_order(name, length).tolist()
    assert hashlib.sha256(json.dumps(order).encode()).hexdigest() == sha256
