"""Pictures: not empty, and in the right orientation."""
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from smpconv_models import SMPConvNet, SMPDepthwiseConv2d, figures
from smpconv_models.figures import kernels

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


def test_the_smallest_kernel_is_drawn():
    axes = Figure().add_subplot()
    figures.draw_kernel(axes, SMPDepthwiseConv2d(1, 1, 1), 0)
    assert axes.images[0].get_array().shape == (1, 1)


def test_layers_are_picked_over_the_whole_depth():
    assert kernels.evenly(list(range(14)), 6) == [0, 3, 5, 8, 10, 13]
    assert kernels.evenly([1, 2], 6) == [1, 2]


def test_kernel_and_points_lie_on_each_other():
    """One point up and to the right: the kernel's picture is red there, and the dot is in its middle."""
    layer = SMPDepthwiseConv2d(1, 9, 1)
    with torch.no_grad():
        layer.coords.copy_(torch.tensor([[0.5, 0.75]]))
        layer.radius.fill_(0.4)
        layer.weight.fill_(1.)
    axes = Figure().add_subplot()
    figures.draw_kernel(axes, layer, 0)
    image, = axes.images
    rows, columns = np.unravel_index(np.argmax(image.get_array()), (9, 9))
    left, right, bottom, top = image.get_extent()
    x = left + (columns + 0.5) * (right - left) / 9
    y = top - (rows + 0.5) * (top - bottom) / 9
    assert (x, y) == pytest.approx((0.5, 0.75))
    dots = axes.collections[-1].get_offsets()
    assert dots[0].tolist() == pytest.approx([0.5, 0.75])


def confusion_of(classes):
    """Each class has 50 images; the first takes a half of the second's, and the third has none."""
    confusion = 50 * torch.eye(classes, dtype=torch.int64)
    confusion[1, 1], confusion[1, 0], confusion[2] = 25, 25, 0
    return confusion


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a confusion matrix, and gives the axes with the path."""
    def draw(*args):
        path = tmp_path / f'{len(saved)}.png'
        figures.save_confusion_matrix(path, *args)
        return saved[-1].axes[0], path

    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **kwargs: saved.append(self) or save(
        self, *args, **kwargs))
    return draw


def test_confusion_is_by_row_and_counted(drawn):
    axes, path = drawn(confusion_of(4), ['ant', r'$\bee$', 'cow', 'd' * 40])
    shares = axes.images[0].get_array()
    assert shares[1].tolist() == [50, 50, 0, 0] and shares[2].mask.all() and shares[3, 3] == 100
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): '50', (0, 1): '25', (1, 1): '25', (3, 3): '50'}  # x the prediction, y the class
    labels = [[label.get_text() for label in ticks] for ticks in (axes.get_xticklabels(), axes.get_yticklabels())]
    assert labels == [['ant', r'$\bee$', 'cow', 'd' * 31 + '…']] * 2
    assert axes.get_title() == 'top-1 83.33 % of 150 images' and pixels(path).std() > 10


@pytest.mark.parametrize('classes, are_named, are_numbered', [
    (20, True, True), (21, True, False), (40, True, False), (41, False, False)])
def test_confusion_says_what_can_be_read(drawn, classes, are_named, are_numbered):
    names = [f'class {index}' for index in range(classes)]
    axes, _ = drawn(confusion_of(classes), names)
    assert ([label.get_text() for label in axes.get_yticklabels()] == names) == are_named
    assert bool(axes.texts) == are_numbered


def test_a_mistake_is_seen_among_a_thousand_classes(drawn):
    """Its cell alone is about a pixel."""
    confusion = confusion_of(1000)
    _, without = drawn(confusion)
    confusion[700, 700], confusion[700, 100] = 25, 25
    axes, path = drawn(confusion)
    changed = abs(pixels(path).astype(int) - pixels(without)).max(2) > 60
    x, y = axes.transData.transform((100, 700)) / axes.figure.dpi * 130
    row, column = round(len(changed) - y), round(x)
    assert changed[row - 10:row + 10, column - 10:column + 10].sum() >= 25
