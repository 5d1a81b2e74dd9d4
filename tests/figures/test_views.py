"""One set of points with its kernels, of every kind of layer."""
import numpy as np
import pytest
import torch
from common import randomize_
from matplotlib.figure import Figure

from smpconv_models import SMPDepthwiseConv2d, figures
from smpconv_models.figures import kernels
from smpconv_models.figures.views import label_of, view_of
from smpconv_models.layers import SMPConv1d, SMPConv2d
from smpconv_models.models import SMPResNet, create_sequence_model


@pytest.mark.parametrize('layer, size', [
    (SMPConv1d(3, 4, 20, 5), (20,)), (SMPConv1d(3, 4, 20, 5, radius_range=(0.2, 0.3)), (20,)),
    (SMPConv2d(3, 4, 9, 5, bias=False), (9, 9)), (SMPConv2d(3, 4, 9, 5).to(torch.bfloat16), (9, 9))],
    ids=['1d', 'clipped', '2d', 'bfloat16'])
def test_a_view_is_one_filter(layer, size):
    randomize_(layer)
    view = view_of(layer, 2)
    assert view.kernels.shape == (3, *size) and (view.ndim, view.size) == (len(size), size[0])
    atol = 0.01 if layer.weight.dtype == torch.bfloat16 else 1e-6
    np.testing.assert_allclose(view.kernels, layer.kernel()[2].detach().float(), atol=atol)
    np.testing.assert_array_equal(view.coords, layer.coords[2].detach().float())
    np.testing.assert_array_equal(view.weights, layer.weight[2].detach().float())
    np.testing.assert_allclose(view.radius, layer.radius[2].detach().float().clamp(*layer.radius_range))
    assert view_of(view) is view


@pytest.mark.parametrize('layer, size', [(SMPConv1d(2, 3, 20, 5), 33), (SMPConv2d(2, 3, 9, 5), 15)], ids=['1d', '2d'])
def test_kernels_drawn_at_another_size(layer, size):
    randomize_(layer).resize(size)
    np.testing.assert_allclose(view_of(layer, 1).kernels, layer.kernel()[1].detach(), atol=1e-6)


def test_channels_of_a_depthwise_layer_share_their_points():
    layer = randomize_(SMPDepthwiseConv2d(4, 9, 5))
    view = view_of(layer)
    np.testing.assert_array_equal(view.kernels, layer.kernel()[:, 0].detach())
    assert view.coords.shape == (5, 2) and view.weights.shape == (4, 5) and view.filter is None
    with pytest.raises(ValueError, match=r'filter must be 0 in a depthwise layer, .* got 1'):
        view_of(layer, 1)


def test_a_filter_that_is_not_there_is_told():
    for filter in (-1, 4):
        with pytest.raises(ValueError, match=rf'filter must lie in \[0, 3\], got {filter}'):
            figures.draw_points(Figure().add_subplot(), SMPConv2d(3, 4, 9), filter=filter)
    network = SMPResNet(depths=(1, 1), dims=(2, 4), kernel_size=5)
    with pytest.raises(ValueError, match=r'stem.large.conv: filter must lie in \[0, 1\], got 3'):
        figures.save_kernels('never.png', network, filter=3)


@pytest.mark.parametrize('name, layer, label', [
    ('stem.large.conv', SMPConv2d(3, 4, 9), 'stem\nfilter 3, 9x9'),
    ('stages.1.0.conv2.large.conv', SMPConv2d(3, 4, 9), 'stage 1 block 0 conv2\nfilter 3, 9x9'),
    ('blocks.5.conv1.large.conv', SMPConv1d(3, 4, 64), 'block 5 conv1\nfilter 3, 64 steps'),
    ('', SMPConv1d(3, 4, 64), 'filter 3, 64 steps'),
    ('mine', SMPConv1d(3, 4, 64), 'mine\nfilter 3, 64 steps'),
])
def test_margins_tell_layer_filter_and_size(name, layer, label):
    assert label_of(name, view_of(layer, 3)) == label


def test_points_of_a_filter_lie_on_its_kernel():
    """As those of depthwise layers: up and to the right, where the kernel is red."""
    layer = SMPConv2d(1, 2, 9, 1)
    with torch.no_grad():
        layer.coords[1] = torch.tensor([0.5, 0.75])
        layer.radius[1] = 0.4
        layer.weight[1] = 1.
    axes = Figure().add_subplot()
    figures.draw_kernel(axes, layer, 0, filter=1)
    row, column = np.unravel_index(np.argmax(axes.images[0].get_array()), (9, 9))
    assert (row, column) == (1, 6)  # of 9 elements over [-1, 1]
    assert axes.collections[-1].get_offsets().tolist() == [[0.5, 0.75]]
    reach, = axes.collections[0].get_paths()
    assert reach.get_extents().extents.tolist() == pytest.approx([0.1, 0.35, 0.9, 1.15])


@pytest.mark.parametrize('network', [
    SMPResNet(depths=(1, 1), dims=(2, 4), kernel_size=5, num_points=3),
    create_sequence_model('smpconv_sdigits', depth=1, dim=3, num_points=4),
], ids=['images', 'sequences'])
def test_a_row_is_one_filter_and_a_column_an_input_channel(network, tmp_path, monkeypatch):
    drawn, saved = [], []
    draw, save = kernels.draw_kernel, Figure.savefig
    monkeypatch.setattr(kernels, 'draw_kernel', lambda axes, view, channel, *args: drawn.append(
        (view.filter, channel)) or draw(axes, view, channel, *args))
    monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **kwargs: saved.append(self) or save(
        self, *args, **kwargs))
    figures.save_kernels(tmp_path / 'k.png', network, max_layers=2, columns=2, filter=1)
    in_channels = [layer.in_channels for layer in figures.choose_layers(network, most=2).values()]
    assert drawn == [(1, channel) for channels in in_channels for channel in range(min(channels, 2))]
    titles = [axes.get_title() for axes in saved[0].axes]
    assert titles[:3] == ['points', 'input channel 0', 'input channel 1']
    rows = [{'epoch': 0, 'train_loss': 1., 'eval_loss': 1., 'eval_top1': 9.}]
    figures.save_run(tmp_path / 'run.png', rows, network, max_layers=2)
    assert (tmp_path / 'run.png').stat().st_size > (tmp_path / 'k.png').stat().st_size > 1000
    assert all(filter == 0 for filter, _ in drawn[len(saved[0].axes):])
