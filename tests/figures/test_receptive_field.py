"""The effective receptive field of what is known, and its picture."""
import numpy as np
import pytest
import torch
from common import randomize_
from matplotlib.figure import Figure
from torch import nn

from smpconv_models import SMPConvNet, SMPDepthwiseConv2d, figures


def positive_convolution(channels, size, **options):
    conv = nn.Conv2d(channels, channels, size, padding='same', groups=channels, bias=False, **options).eval()
    nn.init.uniform_(conv.weight, 0.1, 1)
    return conv


def test_of_one_convolution_it_is_the_kernel():
    """Summed over the channels, about (H // 2, W // 2), and nothing elsewhere."""
    conv = positive_convolution(2, 5)
    field = figures.effective_receptive_field(conv, torch.ones(3, 2, 12, 15))
    expected = np.zeros((12, 15))
    expected[6 - 2:6 + 3, 7 - 2:7 + 3] = conv.weight.detach().sum((0, 1))
    np.testing.assert_allclose(field, expected, rtol=1e-6)


def test_of_a_kernel_drawn_from_points_it_is_where_they_reach():
    layer = SMPDepthwiseConv2d(1, 9, 1).eval()
    with torch.no_grad():
        layer.coords.copy_(torch.tensor([[0.5, 0.25]]))
        layer.radius.fill_(0.4)
        layer.weight.fill_(1.)
    field = figures.effective_receptive_field(layer, torch.ones(1, 1, 15, 15))
    np.testing.assert_allclose(field[3:12, 3:12], layer.kernel()[0, 0].detach(), atol=1e-6)
    rows, columns = field.nonzero()
    assert (rows.mean(), columns.mean()) == (6, 9)  # up and to the right of the middle, (7, 7)


def test_of_two_convolutions_it_reaches_as_far_as_both():
    network = nn.Sequential(positive_convolution(1, 5), positive_convolution(1, 3)).eval()
    field = figures.effective_receptive_field(network, torch.ones(1, 1, 15, 15))
    assert [len(set(axis)) for axis in field.nonzero()] == [7, 7]


def test_only_what_raises_the_features_counts():
    """Negative elements don't contribute, nor does a feature that is below zero."""
    conv = positive_convolution(2, 3)
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = -0.05
        conv.weight[1] *= -1
    field = figures.effective_receptive_field(conv, torch.ones(1, 2, 5, 5))
    expected = conv.weight[0, 0].detach().clamp(min=0)
    np.testing.assert_allclose(field[1:4, 1:4], expected, rtol=1e-6)


def test_it_is_the_mean_over_images():
    network = randomize_(SMPConvNet(depths=(1, 1), dims=(4, 8), kernel_sizes=(7, 5), num_classes=0)).eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    each = [figures.effective_receptive_field(network, image[None]) for image in images]
    together = figures.effective_receptive_field(network, images)
    np.testing.assert_allclose(together, np.mean(each, 0), rtol=1e-6)
    assert abs(each[0] - each[1]).max() > 1e-3 * each[0].max()
    assert all(parameter.grad is None for parameter in network.parameters())


class Tokens(nn.Module):
    num_features = 4

    def forward_features(self, x):
        return x.flatten(2).mT


@pytest.mark.parametrize(('network', 'images', 'message'), [
    (nn.Conv2d(1, 1, 3), torch.ones(1, 1, 5, 5), 'evaluation mode'),
    (nn.Conv2d(1, 1, 3).eval(), torch.ones(0, 1, 5, 5), 'at least one image'),
    (nn.Conv2d(1, 1, 3).eval(), torch.ones(1, 2, 5, 5), r'cannot take images of \(2, 5, 5\)'),
    (nn.Conv2d(1, 1, 3).eval(), torch.full((1, 1, 5, 5), torch.nan), 'the features are not finite'),
    (Tokens().eval(), torch.ones(1, 3, 5, 5), r'shape \(N, 4, H, W\), got \(1, 25, 3\)'),
    (nn.ReLU().eval(), -torch.ones(1, 1, 5, 5), 'nothing contributes'),
])
def test_what_has_none(network, images, message):
    with pytest.raises(ValueError, match=message):
        figures.effective_receptive_field(network, images)


def test_a_gradient_that_is_not_finite_is_told():
    class Root(nn.Module):
        def forward(self, x):
            return x.sqrt() + 1

    with pytest.raises(ValueError, match='the gradient is not finite'):
        figures.effective_receptive_field(Root().eval(), torch.zeros(1, 1, 5, 5))


def test_scaled_as_replknet_shows_it():
    np.testing.assert_allclose(figures.log_scaled(np.array([[0., 9.], [99., 999.]])), [[0, 1 / 3], [2 / 3, 1]])


def test_the_picture_outlines_the_squares(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, 'savefig', lambda self, *_, **__: drawn.append(self))
    field = np.zeros((20, 20))
    field[8:13, 8:13] = 1  # about the middle, (10, 10)
    figures.save_receptive_fields(tmp_path / 'field.png', {'box': field})
    axes = drawn[0].axes[0]
    boxes = [(*patch.get_xy(), patch.get_width()) for patch in axes.patches]
    assert boxes == [(8.5, 8.5, 3), (8.5, 8.5, 3), (7.5, 7.5, 5), (7.5, 7.5, 5)]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[-1] == '99 % of the contributions in 5x5: 6.2 % of the area'
    assert axes.images[0].get_array().max() == 1 and axes.get_title() == 'box (20x20 pixels)'
