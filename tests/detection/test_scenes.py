"""Digit scenes: the boxes fit the digits, and no digit is in both splits."""
import json

import numpy as np
import pytest
from PIL import Image
from programs import load, refused

from smpconv_models.training import Digits

scenes = load('examples/digit_scenes')


def content(folder, split='train'):
    return json.loads((folder / 'annotations' / f'instances_{split}.json').read_text())


def test_boxes_match_the_pixels(monkeypatch):
    """Without a texture, all pixels off the background are in the boxes and touch all sides of each."""
    monkeypatch.setattr(scenes, 'texture', lambda random, size: np.full((size, size, 3), 240.))
    monkeypatch.setattr(scenes, 'INKED', 0.004)  # all that is drawn
    monkeypatch.setattr(scenes, 'OVERLAP', 0.)
    digits = Digits('train')
    for seed in range(6):
        pixels, boxes, labels = scenes.scene(np.random.default_rng(seed), digits, 128)
        inked = (pixels != 240).any(2)
        assert 1 <= len(boxes) == len(labels) and set(labels) <= set(range(10))
        left_over = inked.copy()
        for left, top, right, bottom in boxes:
            cut = inked[top:bottom, left:right]
            assert cut.shape == (bottom - top, right - left)
            assert cut[0].any() and cut[-1].any() and cut[:, 0].any() and cut[:, -1].any()
            left_over[top:bottom, left:right] = False
        assert not left_over.any()


def test_labels_are_those_of_the_digits(monkeypatch):
    """Other labels would teach a network nothing."""
    monkeypatch.setattr(scenes, 'texture', lambda random, size: np.full((size, size, 3), 240.))
    digits = Digits('train')
    drawn = []
    opacity = scenes._opacity
    monkeypatch.setattr(scenes, '_opacity', lambda digit, side: drawn.append(digit) or opacity(digit, side))
    _, boxes, labels = scenes.scene(np.random.default_rng(0), digits, 256)
    assert len(boxes) == len(drawn)
    for digit, label in zip(drawn, labels):
        assert label in {digits.labels[index] for index, image in enumerate(digits.images) if image is digit}


def test_validation_digits_are_in_no_training_image(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(scenes, 'Digits', lambda split: asked.append(split) or Digits(split))
    scenes.make(tmp_path / 'made', train=1, val=1, size=64)
    assert asked == ['train', 'validation']
    train, validation = ({image.tobytes() for image in Digits(split).images} for split in asked)
    assert not train & validation


def test_the_same_arguments_make_the_same_files(tmp_path):
    first = scenes.make(tmp_path / 'a', train=3, val=2, size=64)
    second = scenes.make(tmp_path / 'b', train=3, val=2, size=64)
    files = sorted(path.relative_to(first) for path in first.rglob('*') if path.is_file())
    assert len(files) == 7
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)
    train, validation = (np.asarray(Image.open(first / split / '00000.png')) for split in ('train', 'val'))
    assert (train != validation).mean() > 0.8  # not the same texture with other digits
    assert oct(first.stat().st_mode & 0o777) == '0o755'


def test_the_files_are_coco(tmp_path):
    folder = scenes.make(tmp_path / 'made', train=4, val=3, size=64)
    for split, count in (('train', 4), ('val', 3)):
        made = content(folder, split)
        assert [category['name'] for category in made['categories']] == list('0123456789')
        assert len(made['images']) == count
        assert {image['id'] for image in made['images']} == {note['image_id'] for note in made['annotations']}
        for image in made['images']:
            assert Image.open(folder / split / image['file_name']).size == (image['width'], image['height'])
        for note in made['annotations']:
            x, y, width, height = note['bbox']
            assert min(x, y) >= 0 and x + width <= 64 and y + height <= 64 and note['area'] == width * height > 0


def test_what_is_there_is_used_again_or_left_alone(tmp_path):
    folder = scenes.make(tmp_path / 'made', train=2, val=1, size=64)
    before = (folder / 'train/00000.png').stat().st_mtime_ns
    scenes.make(folder, train=2, val=1, size=64)
    assert (folder / 'train/00000.png').stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r'made exists, and is not the data set of .* 3 and 1 images'):
        scenes.make(folder, train=3, val=1, size=64)


def test_nothing_half_made_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, 'DIGITS', (1, -1))
    with pytest.raises(ValueError):
        scenes.make(tmp_path / 'made', train=2, val=1, size=64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(('argv', 'line'), [
    (['--size', '20'], 'argument --size: must be at least 48, got 20'),
    (['--train', '0'], 'argument --train: must be at least 1 and at most 1e+09, got 0'),
])
def test_bad_arguments_are_one_line(tmp_path, capsys, argv, line):
    assert line in refused(scenes.main, capsys, tmp_path / 'made', *argv)
    assert not (tmp_path / 'made').exists()
