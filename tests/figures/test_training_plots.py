"""Plots of training runs and confusion matrices."""
import numpy as np
import pytest
import torch
from PIL import Image

from smpconv_models import SMPConvNet, figures

ROWS = [
    {'epoch': epoch, 'train_loss': 2. / (epoch + 1), 'eval_loss': 2.5 / (epoch + 1), 'eval_top1': 30. * epoch}
    for epoch in range(3)
]


def pixels(path):
    return np.asarray(Image.open(path).convert('RGB'))


@pytest.mark.parametrize('model', [
    SMPConvNet(depths=(1, 2), dims=(4, 8), kernel_sizes=(7, 5)),
    torch.nn.Linear(1, 1),  # no kernels: the curves alone
], ids=['kernels', 'curves'])
def test_a_run_is_drawn(tmp_path, model):
    figures.save_run(tmp_path / 'run.png', ROWS, model)
    picture = pixels(tmp_path / 'run.png')
    assert picture.shape[1] == 1300 and picture.std() > 10


def confusion_of(classes):
    """Return counts of 50 images per class; half of the second's go to the first, and the third has no images."""
    confusion = 50 * torch.eye(classes, dtype=torch.int64)
    confusion[1, 1], confusion[1, 0], confusion[2] = 25, 25, 0
    return confusion


@pytest.fixture
def draw(saved_figures, tmp_path):
    """Draw a confusion matrix; returns the axes and the path."""
    def draw(*args):
        path = tmp_path / f'{len(saved_figures)}.png'
        figures.save_confusion_matrix(path, *args)
        return saved_figures[-1].axes[0], path
    return draw


def test_confusion_is_by_row_and_counted(draw):
    axes, path = draw(confusion_of(4), ['ant', r'$\bee$', 'cow', 'd' * 40])
    shares = axes.images[0].get_array()
    assert shares[1].tolist() == [50, 50, 0, 0] and shares[2].mask.all() and shares[3, 3] == 100
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): '50', (0, 1): '25', (1, 1): '25', (3, 3): '50'}  # x the prediction, y the class
    labels = [[label.get_text() for label in ticks] for ticks in (axes.get_xticklabels(), axes.get_yticklabels())]
    assert labels == [['ant', r'$\bee$', 'cow', 'd' * 31 + '…']] * 2
    assert axes.get_title() == 'top-1 83.33 % of 150 images' and pixels(path).std() > 10


@pytest.mark.parametrize('classes, are_named, are_counted', [
    (20, True, True), (21, True, False), (40, True, False), (41, False, False)])
def test_names_and_counts_are_shown_if_they_fit(draw, classes, are_named, are_counted):
    names = [f'class {index}' for index in range(classes)]
    axes, _ = draw(confusion_of(classes), names)
    assert ([label.get_text() for label in axes.get_yticklabels()] == names) == are_named
    assert bool(axes.texts) == are_counted


def test_a_mistake_is_visible_among_a_thousand_classes(draw):
    """Its cell alone is about a pixel."""
    confusion = confusion_of(1000)
    _, without = draw(confusion)
    confusion[700, 700], confusion[700, 100] = 25, 25
    axes, path = draw(confusion)
    changed = abs(pixels(path).astype(int) - pixels(without)).max(2) > 60
    x, y = axes.transData.transform((100, 700)) / axes.figure.dpi * 130
    row, column = round(len(changed) - y), round(x)
    assert changed[row - 10:row + 10, column - 10:column + 10].sum() >= 25
