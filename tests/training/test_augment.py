"""timm's augmentation on the Pillow that is installed."""
import random
from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageOps
from timm.data import create_transform

from smpconv_models.training import augment, rng


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype('uint8'))


def test_no_bits_are_black(image):
    assert not np.asarray(augment.posterize(image, 0)).any()
    assert augment.posterize(image, 0).size == image.size
    assert np.array_equal(np.asarray(augment.posterize(image, 3)), np.asarray(ImageOps.posterize(image, 3)))
    assert augment.posterize(image, 8) is image


@pytest.mark.parametrize('policy', ['rand-m9-mstd0.5-inc1', 'v0', 'original', 'augmix-m5-w4-d2'])
def test_every_severity_of_every_policy_runs(image, policy):
    """Posterize among them, whose bits reach 0 at the highest severity (of the policies that have it)."""
    transform = augment.repair(create_transform((3, 16, 16), is_training=True, auto_augment=policy))
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


def test_the_papers_policy_survives_many_images(image):
    """One in about 550 meets a posterization to no bits."""
    transform = augment.repair(create_transform((3, 16, 16), is_training=True, auto_augment='rand-m9-mstd0.5-inc1'))
    part = next(part for part in transform.transforms if hasattr(part, 'ops'))
    bits = []

    def counting(image, kept, original, **kwargs):
        bits.append(kept)
        return original(image, kept, **kwargs)

    for op in part.ops:
        if op.name == 'PosterizeIncreasing':
            op.aug_fn = partial(counting, original=op.aug_fn)
    random.seed(0)
    np.random.seed(0)
    for _ in range(2000):
        part(image)
    assert 0 in bits


def test_other_transforms_are_left_as_they_are():
    transform = create_transform((3, 16, 16))
    assert augment.repair(transform) is transform


def test_padded_crops():
    """Of the image's own size, from anywhere in it and the black around it."""
    crop = augment.PaddedCrop((6, 8), 2)
    image = Image.new('L', (8, 6), 255)
    sums = {sum(crop(image).tobytes()) // 255 for _ in range(200)}
    assert max(sums) == 48 and min(sums) == 24 and crop(image).size == (8, 6)
    with pytest.raises(ValueError, match='of the input size, 8x6, got 10x6'):
        crop(Image.new('L', (10, 6)))


def test_crops_take_the_place_of_timms():
    transform = create_transform((3, 32, 32), is_training=True)
    augment.crop_padded(transform, (3, 32, 32), 4)
    assert isinstance(transform.transforms[0], augment.PaddedCrop)
    assert 'RandomResizedCrop' not in str(transform)
