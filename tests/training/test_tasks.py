"""Tasks: timm's augmentation on the Pillow that is installed, crops of padded images, and options of sequences."""
import numpy as np
import pytest
import torch
from made import make_mnist
from PIL import Image, ImageOps
from test_data import options
from timm.data import create_transform

from smpconv_models.training import rng, tasks
from smpconv_models.training.config import AugmentationOptions


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype('uint8'))


def test_no_bits_are_black(image):
    assert not np.asarray(tasks.posterize(image, 0)).any()
    assert tasks.posterize(image, 0).size == image.size
    assert np.array_equal(np.asarray(tasks.posterize(image, 3)), np.asarray(ImageOps.posterize(image, 3)))
    assert tasks.posterize(image, 8) is image


@pytest.mark.parametrize('policy', ['rand-m9-mstd0.5-inc1', 'v0', 'original', 'augmix-m5-w4-d2'])
def test_every_severity_of_every_policy_runs(image, policy):
    """Posterize among them, whose bits reach 0 at the highest severity (of the policies that have it)."""
    transform = tasks.patch_posterize(create_transform((3, 16, 16), is_training=True, auto_augment=policy))
    part = next(part for part in transform.transforms if hasattr(part, 'ops') or hasattr(part, 'policy'))
    policies = [part.ops] if hasattr(part, 'ops') else part.policy
    found = 0
    for op in (op for ops in policies for op in ops):
        if op.name.startswith('Posterize'):
            op.prob, op.magnitude, op.magnitude_std, found = 1., 10, 0., found + 1
            op(image)
    assert found
    for index in range(20):
        rng.seed_everything(index)
        assert transform(image).shape == (3, 16, 16)


def test_other_transforms_are_left_as_they_are():
    transform = create_transform((3, 16, 16))
    assert tasks.patch_posterize(transform) is transform


def test_padded_crops():
    """Crops have the image's own size and start anywhere in it or in the black padding."""
    crop = tasks.PadAndRandomCrop((6, 8), 2)
    image = Image.new('L', (8, 6), 255)
    sums = {sum(crop(image).tobytes()) // 255 for _ in range(200)}
    assert max(sums) == 48 and min(sums) == 24 and crop(image).size == (8, 6)
    with pytest.raises(ValueError, match='of the input size, 8x6, got 10x6'):
        crop(Image.new('L', (10, 6)))


def test_padded_crops_replace_the_resized_crop():
    task = tasks.create_task(options(dataset='digits'))
    dataset = task.create_dataset('train', 3, is_training=True)
    config = dict(input_size=(3, 8, 8), interpolation='bicubic', mean=(0.5,) * 3, std=(0.5,) * 3)
    task.prepare_training(dataset, config, AugmentationOptions(random_crop_pad=2), use_prefetcher=False)
    assert isinstance(dataset.transform.transforms[0], tasks.PadAndRandomCrop)
    assert 'RandomResizedCrop' not in str(dataset.transform)
    with pytest.raises(ValueError, match='--random-crop-pad must be below the side of the images, 8, got 8'):
        task.prepare_training(dataset, config, AugmentationOptions(random_crop_pad=8), use_prefetcher=False)


def test_crops_of_sequences_are_of_the_pixels(tmp_path):
    task = tasks.create_task(options(make_mnist(tmp_path), dataset='seq/mnist'))

    def prepared(**augmentation):
        dataset = task.create_dataset('train', 1, is_training=True)
        task.prepare_training(dataset, {}, AugmentationOptions(**augmentation), use_prefetcher=False)
        return dataset

    plain = prepared()[0, 3][0]
    cropped = prepared(random_crop_pad=4, hflip=0.)
    crops = [cropped[epoch, 3][0] for epoch in range(8)]
    assert all(crop.shape == plain.shape for crop in crops) and len({crop.sum().item() for crop in crops}) > 4
    assert torch.equal(cropped[2, 3][0], crops[2]) and cropped.name(3) == cropped.source.name(3)
    assert torch.equal(prepared(random_crop_pad=4, no_aug=True)[0, 3][0], plain)
    for flip in (0., 1.):
        image = prepared(random_crop_pad=0, hflip=flip)[0, 3][0].unflatten(-1, (28, 28))
        assert torch.equal(image.flip(-1) if flip else image, plain.unflatten(-1, (28, 28)))
