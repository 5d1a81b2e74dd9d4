"""Data sets: the embedded digits, folders of images, and what is refused."""
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from smpconv_models import SMPConvNet
from smpconv_models.data.images import Digits
from smpconv_models.training import tasks
from smpconv_models.training.config import DataOptions
from smpconv_models.training.dataset_factory import create_dataset


def make_folder(root, splits=('train', 'val'), classes=('cat', 'dog'), count=3):
    for split in splits:
        for index, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for image in range(count):
                Image.new('RGB', (12, 10), (80 * index, 40 * image, 9)).save(folder / f'{image}.png')
    return root


def options(data_dir=None, **changes):
    return DataOptions(data_dir=data_dir and str(data_dir), **{**dict(batch_size=2, workers=0, seed=0), **changes})


def test_digits_are_scikit_learns_and_a_fifth_is_the_validation_split():
    train, validation = Digits('train'), Digits('val')
    assert (len(train), len(validation)) == (1437, 360)
    images, labels = load_digits(return_X_y=True)
    expected = {
        ((image * 255 / 16).round().astype('uint8').tobytes(), int(label)) for image, label in zip(images, labels)}
    parts = [{(image.tobytes(), label) for image, label in part} for part in (train, validation)]
    assert parts[0] | parts[1] == expected and not parts[0] & parts[1]
    shares = np.bincount(validation.labels) / (np.bincount(train.labels) + np.bincount(validation.labels))
    assert np.allclose(shares, 0.2, atol=0.01)
    gray, colour = validation[0][0], Digits('val', 'RGB')[0][0]
    assert (gray.mode, colour.mode) == ('L', 'RGB')
    assert np.array_equal(np.asarray(colour)[..., 1], np.asarray(gray))
    with pytest.raises(ValueError, match="got 'test'"):
        Digits('test')


@pytest.mark.parametrize('make, message', [
    (lambda root: options(make_folder(root, splits=('train', 'test'))),
     r"expected a folder named val or .*, found \['test', 'train'\]"),
    (lambda root: options(root, dataset='torch/cifar10'),
     r"'validation' of torch/cifar10 in .*opened: .*not found.*; --dataset-download"),
    (lambda root: options(root, dataset='torch/nothing'), 'Unknown torchvision dataset nothing$'),
    (lambda root: options(make_folder(root, count=0)), r"folders without images .*: \['cat', 'dog'\]"),
])
def test_missing_data_is_reported(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        create_dataset(make(tmp_path), 'validation', 3, is_training=False)


def test_unusual_channels_are_refused():
    task = tasks.create_task(options())
    task.check_model('net', SMPConvNet(in_chans=1, depths=(1,), dims=(4,), kernel_sizes=(5,)), None, 1)
    with pytest.raises(ValueError, match='net takes images of 3 channels: --in-chans 3'):
        task.check_model('net', SMPConvNet(depths=(1,), dims=(4,), kernel_sizes=(5,)), None, 1)


@pytest.mark.parametrize('trained, evaluated, message', [
    (['a', 'A', 'b'], ['A', 'a', 'b'], r"3 and 3 in another order: class 0 is 'a' in training and 'A' in evaluation"),
    (['Caf\u00e9', 'b'], ['Cafe\u0301', 'b'], r"only in training \['Café'\], only in evaluation \['Cafe\\u0301'\]"),
    (['a', 'caf\udce9'], ['a', 'cafe'], r"only in training \['caf\\udce9'\]"),
])
def test_differences_of_classes_are_named(trained, evaluated, message):
    with pytest.raises(ValueError, match=message):
        tasks.check_classes(trained, evaluated)


@pytest.mark.parametrize('changes, size, mean', [
    (dict(), (1, 20, 20), (pytest.approx(0.449, abs=1e-3),)),  # the model's three means, averaged
    (dict(img_size=16), (1, 16, 16), None),
    (dict(input_size=[1, 16, 24], mean=[0.25]), (1, 16, 24), (0.25,)),
])
def test_data_config_follows_the_channels(changes, size, mean):
    model = SMPConvNet(in_chans=1, depths=(1,), dims=(4,), kernel_sizes=(5,))
    model.pretrained_cfg = {'input_size': (3, 20, 20), 'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
    config = tasks.create_task(options(**changes)).resolve_data_config(model)
    assert config['input_size'] == size
    assert len(config['mean']) == len(config['std']) == 1
    assert mean is None or config['mean'] == mean
