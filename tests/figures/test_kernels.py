"""Points and kernels, drawn where and as large as they are."""
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from smpconv_models import SMPConvNet, SMPDepthwiseConv2d, figures
from smpconv_models.figures import kernels


@pytest.fixture
def layer():
    """Two points for two channels."""
    layer = SMPDepthwiseConv2d(2, 9, 2)
    with torch.no_grad():
        layer.coords.copy_(torch.tensor([[0.5, 0.75], [-0.25, 0.]]))
        layer.radius.copy_(torch.tensor([0.4, 2.]))  # the second is used as 1
        layer.weight.copy_(torch.tensor([[1., -4.], [-3., 2.]]))
    return layer


def test_points_lie_where_they_are_and_reach_as_far(layer):
    axes = Figure().add_subplot()
    figures.draw_points(axes, layer)
    reaches, dots = axes.collections
    assert dots.get_offsets().tolist() == [[0.5, 0.75], [-0.25, 0.]]
    assert dots.get_array().tolist() == [2., 3.]  # mean absolute weights
    boxes = [path.get_extents().extents.tolist() for path in reaches.get_paths()]
    assert boxes[0] == pytest.approx([0.1, 0.35, 0.9, 1.15])
    assert boxes[1] == pytest.approx([-1.25, -1., 0.75, 1.])
    assert axes.get_xlim() == axes.get_ylim() == (-1.125, 1.125)


def test_a_kernel_without_points_has_the_colours_asked_for(layer):
    axes = Figure().add_subplot()
    figures.draw_kernel(axes, layer, 1, with_points=False, limit=7.)
    picture, = axes.images
    assert picture.get_clim() == (-7, 7) and not axes.collections
    np.testing.assert_array_equal(picture.get_array(), layer.kernel()[1, 0].detach())


@pytest.fixture(scope='module')
def network():
    return SMPConvNet(depths=(1, 2), dims=(4, 8), kernel_sizes=(7, 5)).eval()


NAMES = [f'stages.{block}.mixer.large_kernel.large.conv' for block in ('0.blocks.0', '1.blocks.0', '1.blocks.1')]


def test_layers_are_chosen_by_name_or_over_the_depth(network):
    assert list(figures.choose_layers(network)) == NAMES
    assert list(figures.choose_layers(network, most=2)) == [NAMES[0], NAMES[2]]
    assert list(figures.choose_layers(network, most=1)) == NAMES[:1]
    chosen = figures.choose_layers(network, [NAMES[2], NAMES[1]], most=1)
    assert list(chosen) == [NAMES[2], NAMES[1]] and chosen[NAMES[1]] is network.get_submodule(NAMES[1])


def test_layers_that_are_not_there_are_told(network):
    with pytest.raises(ValueError, match=r"no layer is named 'stages.0'; near are \['stages.0.blocks.0.mixer.large"):
        figures.choose_layers(network, ['stages.0'])
    with pytest.raises(ValueError, match='no kernels that are drawn from points'):
        figures.choose_layers(torch.nn.Conv2d(4, 4, 3, groups=4))


def test_a_picture_of_kernels_has_a_row_for_each_layer(network, tmp_path):
    figures.save_kernels(tmp_path / 'one.png', network, NAMES[:1], columns=4)
    figures.save_kernels(tmp_path / 'all.png', network, columns=4)
    one, every = (np.asarray(Image.open(tmp_path / name).convert('RGB')) for name in ('one.png', 'all.png'))
    assert one.std() > 10 and every.shape[0] > 2 * one.shape[0] and every.shape[1] == one.shape[1]


def test_no_columns_without_channels(network, tmp_path):
    sizes = []
    for columns in (4, 10 ** 9):
        figures.save_kernels(tmp_path / 'one.png', network, NAMES[:1], columns=columns)
        with Image.open(tmp_path / 'one.png') as picture:
            sizes.append(picture.size)
    assert sizes[0] == sizes[1]  # the layer has four


def test_each_column_is_its_channel(network, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(kernels, 'draw_kernel', lambda axes, layer, channel, *args, **kwargs: drawn.append(channel))
    figures.save_kernels(tmp_path / 'one.png', network, NAMES[:1], columns=3)
    assert drawn == [0, 1, 2]
