"""Pictures: not empty, and in the right orientation."""
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from smpconv_models import SMPConvNet, SMPDepthwiseConv2d, figures

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
    assert figures._evenly(list(range(14)), 6) == [0, 3, 5, 8, 10, 13]
    assert figures._evenly([1, 2], 6) == [1, 2]


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
