"""Effective receptive fields of known networks, central squares and their plot."""
import numpy as np
import pytest
import torch
from common import randomize_
from torch import nn

from smpconv_models import SMPConvNet, SMPDepthwiseConv2d, figures


def positive_convolution(channels, size, **options):
    conv = nn.Conv2d(channels, channels, size, padding='same', groups=channels, bias=False, **options).eval()
    nn.init.uniform_(conv.weight, 0.1, 1)
    return conv


def test_one_convolution_has_its_kernel():
    """Summed over the channels, about (H // 2, W // 2), and zero outside."""
    conv = positive_convolution(2, 5)
    field = figures.effective_receptive_field(conv, torch.ones(3, 2, 12, 15))
    expected = np.zeros((12, 15))
    expected[6 - 2:6 + 3, 7 - 2:7 + 3] = conv.weight.detach().sum((0, 1))
    np.testing.assert_allclose(field, expected, rtol=1e-6)


def test_an_smp_layer_has_the_support_of_its_points():
    layer = SMPDepthwiseConv2d(1, 9, 1).eval()
    with torch.no_grad():
        layer.coords.copy_(torch.tensor([[0.5, 0.25]]))
        layer.radius.fill_(0.4)
        layer.weight.fill_(1.)
    field = figures.effective_receptive_field(layer, torch.ones(1, 1, 15, 15))
    np.testing.assert_allclose(field[3:12, 3:12], layer.kernel()[0, 0].detach(), atol=1e-6)
    rows, columns = field.nonzero()
    assert (rows.mean(), columns.mean()) == (6, 9)  # up and to the right of the middle, (7, 7)


def test_two_convolutions_have_the_size_of_both():
    network = nn.Sequential(positive_convolution(1, 5), positive_convolution(1, 3)).eval()
    field = figures.effective_receptive_field(network, torch.ones(1, 1, 15, 15))
    assert [len(set(axis)) for axis in field.nonzero()] == [7, 7]


def test_only_positive_contributions_count():
    """Neither negative elements nor features below zero contribute."""
    conv = positive_convolution(2, 3)
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = -0.05
        conv.weight[1] *= -1
    field = figures.effective_receptive_field(conv, torch.ones(1, 2, 5, 5))
    expected = conv.weight[0, 0].detach().clamp(min=0)
    np.testing.assert_allclose(field[1:4, 1:4], expected, rtol=1e-6)


def test_the_field_is_the_mean_over_images():
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
def test_networks_without_a_field_are_refused(network, images, message):
    with pytest.raises(ValueError, match=message):
        figures.effective_receptive_field(network, images)


def test_a_gradient_that_is_not_finite_is_refused():
    class Root(nn.Module):
        def forward(self, x):
            return x.sqrt() + 1

    with pytest.raises(ValueError, match='the gradient is not finite'):
        figures.effective_receptive_field(Root().eval(), torch.zeros(1, 1, 5, 5))


def test_log_scale_of_replknet():
    np.testing.assert_allclose(figures.log_scaled(np.array([[0., 9.], [99., 999.]])), [[0, 1 / 3], [2 / 3, 1]])


def test_the_plot_outlines_the_squares(tmp_path, saved_figures):
    field = np.zeros((20, 20))
    field[8:13, 8:13] = 1  # about the middle, (10, 10)
    figures.save_receptive_fields(tmp_path / 'field.png', {'box': field})
    axes = saved_figures[0].axes[0]
    boxes = [(*patch.get_xy(), patch.get_width()) for patch in axes.patches]
    assert boxes == [(8.5, 8.5, 3), (8.5, 8.5, 3), (7.5, 7.5, 5), (7.5, 7.5, 5)]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[-1] == '99 % of the contributions in 5x5: 6.2 % of the area'
    assert axes.images[0].get_array().max() == 1 and axes.get_title() == 'box (20x20 pixels)'


# --- central squares ---


def central_square_by_loop(values, share):
    """RepLKNet's rule, one square after the other."""
    height, width = values.shape
    middle_row, middle_column = height // 2, width // 2
    for half_side in range(max(height, width)):
        inside = values[max(middle_row - half_side, 0):middle_row + half_side + 1,
                        max(middle_column - half_side, 0):middle_column + half_side + 1]
        if inside.sum() >= share * values.sum():
            return 2 * half_side + 1, inside.size / values.size


@pytest.mark.parametrize('shape', [(9, 9), (8, 8), (7, 12), (1, 5)])
@pytest.mark.parametrize('share', [0.2, 0.3, 0.5, 0.99])
def test_central_squares_are_those_of_a_loop(shape, share):
    values = np.random.default_rng(0).integers(0, 50, shape).astype(float)
    assert figures.central_square(values, share) == pytest.approx(central_square_by_loop(values, share))


def test_central_squares_of_known_maps():
    point = np.zeros((9, 9))
    point[4, 4] = 2.
    assert figures.central_square(point, 1.) == (1, 1 / 81)
    point[0, 0] = 2.
    assert figures.central_square(point, 0.5) == (1, 1 / 81)
    assert figures.central_square(point, 0.51) == (9, 1.)
    assert figures.central_square(np.ones((9, 9)), 25 / 81) == (5, 25 / 81)
    assert figures.central_square(np.full((11, 11), 0.1), 1.) == (11, 1.)  # the sum is rounded


@pytest.mark.parametrize(('values', 'share', 'message'), [
    (np.ones((3, 3)), 0., 'share must lie in'),
    (np.ones((3, 3)), 1.01, 'share must lie in'),
    (np.ones(3), 0.5, r'shape \(H, W\), got \(3,\)'),
    (np.zeros((3, 3)), 0.5, 'not all zero'),
    (np.full((3, 3), np.nan), 0.5, 'finite'),
    (-np.eye(3), 0.5, 'not negative'),
])
def test_invalid_maps_and_shares_are_refused(values, share, message):
    with pytest.raises(ValueError, match=message):
        figures.central_square(values, share)
