"""Data sets: the embedded digits, folders of images, and what is refused."""
from argparse import Namespace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from smpconv_models import SMPConvNet
from smpconv_models.training import Digits, data_config, dataset_factory


def make_folder(root, splits=('train', 'val'), classes=('cat', 'dog'), count=3):
    for split in splits:
        for index, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for image in range(count):
                Image.new('RGB', (12, 10), (80 * index, 40 * image, 9)).save(folder / f'{image}.png')
    return root


def arguments(**changes):
    values = dict(
        dataset='', data_dir=None, dataset_download=False, batch_size=2, validation_batch_size=None, seed=0, workers=0,
        pin_mem=False, no_prefetcher=False, in_chans=None, input_size=None, img_size=None, crop_pct=None, mean=None,
        std=None, interpolation=None, train_interpolation=None, no_aug=False, reprob=0., remode='pixel', recount=1,
        scale=[0.5, 1.], ratio=[1., 1.], hflip=0., vflip=0., color_jitter=0., aa=None, crop_padding=None,
        grad_accum_steps=1, exif_orientation=None,
        max_unreadable=10, skip_unreadable=False, dist_timeout=60.,
    )
    return Namespace(**{**values, **changes})


def test_digits_are_scikit_learns_and_a_fifth_is_held_out():
    train, validation = Digits('train'), Digits('validation')
    assert (len(train), len(validation)) == (1437, 360)
    pixels = {(np.asarray(image).tobytes(), label) for part in (train, validation) for image, label in part}
    images, labels = load_digits(return_X_y=True)
    expected = {
        ((image * 255 / 16).round().astype('uint8').tobytes(), int(label)) for image, label in zip(images, labels)}
    assert pixels == expected


def test_digits_splits_share_no_image_and_hold_every_class_alike():
    train, validation = Digits('train'), Digits('val')
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in validation.images}
    shares = np.bincount(validation.labels) / (np.bincount(train.labels) + np.bincount(validation.labels))
    assert np.allclose(shares, 0.2, atol=0.01)


def test_digits_come_in_colour_for_models_that_want_it():
    gray, colour = Digits('val'), Digits('val', 'RGB')
    assert (gray[0][0].mode, colour[0][0].mode) == ('L', 'RGB')
    assert np.array_equal(np.asarray(colour[0][0])[..., 1], np.asarray(gray[0][0]))


def test_digits_know_their_splits():
    with pytest.raises(ValueError, match="got 'test'"):
        Digits('test')


def test_folders_are_read_through_timm(tmp_path):
    args = arguments(data_dir=str(make_folder(tmp_path)))
    train = dataset_factory.open_dataset(args, 'train', 3, is_training=True)
    validation = dataset_factory.open_dataset(args, 'validation', 3, is_training=False)
    assert len(train) == len(validation) == 6
    assert data_config.class_names(train) == data_config.class_names(validation) == ['cat', 'dog']
    assert train[0][0].mode == 'RGB'
    assert dataset_factory.open_dataset(args, 'train', 1, is_training=True)[0][0].mode == 'L'


def test_torchvision_datasets_are_read_through_timm(tmp_path):
    with pytest.raises(ValueError, match=r"split 'train' of torch/cifar10 in .*cannot be opened: .*not found"):
        dataset_factory.open_dataset(
            arguments(dataset='torch/cifar10', data_dir=str(tmp_path)), 'train', 3, is_training=True)


@pytest.mark.parametrize('make, told', [
    (lambda root: arguments(), '--data-dir is needed'),
    (lambda root: arguments(data_dir=str(root / 'nowhere')), 'nowhere: no such folder'),
    (lambda root: arguments(data_dir=str(make_folder(root, splits=('train', 'test')))),
     r"expected a folder named val or .*, found \['test', 'train'\]"),
    (lambda root: arguments(dataset='torch/nothing', data_dir=str(root)), 'Unknown torchvision dataset nothing'),
    (lambda root: arguments(data_dir=str(make_folder(root, count=0))), r"folders without images .*: \['cat', 'dog'\]"),
])
def test_missing_data_is_told(tmp_path, make, told):
    with pytest.raises(ValueError, match=told):
        dataset_factory.open_dataset(make(tmp_path), 'validation', 3, is_training=False)


def test_classes_must_agree(tmp_path):
    make_folder(tmp_path, splits=('train',))
    make_folder(tmp_path, splits=('val',), classes=('cat', 'dgo'))
    args = arguments(data_dir=str(tmp_path))
    train, validation = (dataset_factory.open_dataset(args, split, 3, False) for split in ('train', 'val'))
    with pytest.raises(ValueError, match=r"2 and 2, only in training \['dog'\], only in evaluation \['dgo'\]"):
        data_config.check_classes(data_config.class_names(train), data_config.class_names(validation))
    with pytest.raises(ValueError, match='the data set has 2 classes, the model 3'):
        data_config.check_num_classes(data_config.class_names(train), 3)


def test_unusual_channels_are_told():
    with pytest.raises(ValueError, match='got in_chans 4'):
        dataset_factory.open_dataset(arguments(data_dir='.'), 'train', 4, is_training=True)


@pytest.mark.parametrize('changes, size, mean', [
    (dict(), (1, 20, 20), (pytest.approx(0.449, abs=1e-3),)),  # the model's three means, averaged
    (dict(img_size=16), (1, 16, 16), None),
    (dict(input_size=[1, 16, 24], mean=[0.25]), (1, 16, 24), (0.25,)),
])
def test_data_config_follows_the_channels(changes, size, mean):
    model = SMPConvNet(in_chans=1, depths=(1,), dims=(4,), kernel_sizes=(5,))
    model.pretrained_cfg = {'input_size': (3, 20, 20), 'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
    config = data_config.data_config(arguments(**changes), model)
    assert config['input_size'] == size
    assert len(config['mean']) == len(config['std']) == 1
    assert mean is None or config['mean'] == mean
