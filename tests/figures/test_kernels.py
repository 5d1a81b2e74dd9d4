"""Plots of kernels and points over images and over time."""
import copy

import numpy as np
import pytest
import torch
from common import randomize_
from matplotlib.figure import Figure
from PIL import Image

from smpconv_models import SMPConvNet, SMPDepthwiseConv2d, figures
from smpconv_models.figures import kernels, training
from smpconv_models.figures.kernels import kernel_view, layer_label, visible_range
from smpconv_models.layers import SMPConv1d, SMPConv2d
from smpconv_models.models import SMPResNet, create_sequence_model


def drawn(draw, *args, **kwargs):
    axes = Figure().add_subplot()
    draw(axes, *args, **kwargs)
    return axes


@pytest.fixture
def layer():
    """Two points for two channels."""
    layer = SMPDepthwiseConv2d(2, 9, 2)
    with torch.no_grad():
        layer.coords.copy_(torch.tensor([[0.5, 0.75], [-0.25, 0.]]))
        layer.radius.copy_(torch.tensor([0.4, 2.]))  # the second is clipped to 1
        layer.weight.copy_(torch.tensor([[1., -4.], [-3., 2.]]))
    return layer


# --- views ---


@pytest.mark.parametrize('layer, size', [
    (SMPConv1d(3, 4, 20, 5), (20,)), (SMPConv1d(3, 4, 20, 5, radius_range=(0.2, 0.3)), (20,)),
    (SMPConv2d(3, 4, 9, 5, bias=False), (9, 9)), (SMPConv2d(3, 4, 9, 5).to(torch.bfloat16), (9, 9))],
    ids=['1d', 'clipped', '2d', 'bfloat16'])
def test_a_view_is_one_filter(layer, size):
    randomize_(layer)
    view = kernel_view(layer, 2)
    assert view.kernels.shape == (3, *size) and (view.ndim, view.size) == (len(size), size[0])
    atol = 0.01 if layer.weight.dtype == torch.bfloat16 else 1e-6
    np.testing.assert_allclose(view.kernels, layer.kernel()[2].detach().float(), atol=atol)
    np.testing.assert_array_equal(view.coords, layer.coords[2].detach().float())
    np.testing.assert_array_equal(view.weights, layer.weight[2].detach().float())
    np.testing.assert_allclose(view.radius, layer.radius[2].detach().float().clamp(*layer.radius_range))
    assert kernel_view(view) is view


@pytest.mark.parametrize('layer, size', [(SMPConv1d(2, 3, 20, 5), 33), (SMPConv2d(2, 3, 9, 5), 15)], ids=['1d', '2d'])
def test_resized_kernels_are_sampled_at_their_size(layer, size):
    randomize_(layer).resize(size)
    np.testing.assert_allclose(kernel_view(layer, 1).kernels, layer.kernel()[1].detach(), atol=1e-6)


def test_channels_of_a_depthwise_layer_share_their_points():
    layer = randomize_(SMPDepthwiseConv2d(4, 9, 5))
    view = kernel_view(layer)
    np.testing.assert_array_equal(view.kernels, layer.kernel()[:, 0].detach())
    assert view.coords.shape == (5, 2) and view.weights.shape == (4, 5) and view.filter is None
    with pytest.raises(ValueError, match=r'filter must be 0 for a depthwise layer, .* got 1'):
        kernel_view(layer, 1)


def test_a_missing_filter_is_refused():
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
def test_labels_have_layer_filter_and_size(name, layer, label):
    assert layer_label(name, kernel_view(layer, 3)) == label


# --- choice of layers ---


@pytest.fixture(scope='module')
def network():
    return SMPConvNet(depths=(1, 2), dims=(4, 8), kernel_sizes=(7, 5)).eval()


NAMES = [f'stages.{block}.mixer.large_kernel.large.conv' for block in ('0.blocks.0', '1.blocks.0', '1.blocks.1')]


def test_layers_are_chosen_by_name_or_over_the_depth(network):
    assert kernels.evenly_spaced(list(range(14)), 6) == [0, 3, 5, 8, 10, 13]
    assert kernels.evenly_spaced([1, 2], 6) == [1, 2]
    assert list(figures.choose_layers(network)) == NAMES
    assert list(figures.choose_layers(network, most=2)) == [NAMES[0], NAMES[2]]
    assert list(figures.choose_layers(network, most=1)) == NAMES[:1]
    chosen = figures.choose_layers(network, [NAMES[2], NAMES[1]], most=1)
    assert list(chosen) == [NAMES[2], NAMES[1]] and chosen[NAMES[1]] is network.get_submodule(NAMES[1])


# --- over an image ---


def test_points_have_their_positions_weights_and_radii(layer):
    axes = drawn(figures.draw_points, layer)
    diamonds, dots = axes.collections
    assert dots.get_offsets().tolist() == [[0.5, 0.75], [-0.25, 0.]]
    assert dots.get_array().tolist() == [2., 3.]  # mean absolute weights
    boxes = [path.get_extents().extents.tolist() for path in diamonds.get_paths()]
    assert boxes[0] == pytest.approx([0.1, 0.35, 0.9, 1.15])
    assert boxes[1] == pytest.approx([-1.25, -1., 0.75, 1.])
    assert axes.get_xlim() == axes.get_ylim() == (-1.125, 1.125)


def test_a_kernel_without_points_has_the_given_limit(layer):
    axes = drawn(figures.draw_kernel, layer, 1, with_points=False, limit=7.)
    picture, = axes.images
    assert picture.get_clim() == (-7, 7) and not axes.collections
    np.testing.assert_array_equal(picture.get_array(), layer.kernel()[1, 0].detach())


def test_the_smallest_kernel_is_drawn():
    axes = drawn(figures.draw_kernel, SMPDepthwiseConv2d(1, 1, 1), 0)
    assert axes.images[0].get_array().shape == (1, 1)


@pytest.mark.parametrize('layer, filter', [(SMPDepthwiseConv2d(1, 9, 1), 0), (SMPConv2d(1, 2, 9, 1), 1)],
                         ids=['depthwise', 'filter'])
def test_kernel_and_points_have_one_orientation(layer, filter):
    """One point up and to the right: the kernel is red there, and the dot is in the middle of the red."""
    with torch.no_grad():
        layer.coords[..., :] = torch.tensor([0.5, 0.75])
        layer.radius.fill_(0.4)
        layer.weight.fill_(1.)
    axes = drawn(figures.draw_kernel, layer, 0, filter=filter)
    image, = axes.images
    row, column = np.unravel_index(np.argmax(image.get_array()), (9, 9))
    assert (row, column) == (1, 6)  # of 9 elements over [-1, 1]
    left, right, bottom, top = image.get_extent()
    x, y = left + (column + 0.5) * (right - left) / 9, top - (row + 0.5) * (top - bottom) / 9
    assert (x, y) == pytest.approx((0.5, 0.75))
    assert axes.collections[-1].get_offsets().tolist() == [[0.5, 0.75]]
    diamond, = axes.collections[0].get_paths()
    assert diamond.get_extents().extents.tolist() == pytest.approx([0.1, 0.35, 0.9, 1.15])


# --- over time ---


def layer_of(size, steps, radius, weights=None):
    """Return a filter with points at these steps before the present, with a radius in steps."""
    layer = SMPConv1d(1, 1, size, len(steps))
    with torch.no_grad():
        layer.coords[0, :, 0] = 1 - 2 * torch.tensor(steps, dtype=torch.float32) / (size - 1)
        layer.radius.fill_(2 * radius / (size - 1))
        layer.weight[0, 0] = torch.ones(len(steps)) if weights is None else torch.tensor(weights)
    return layer


def test_the_line_goes_through_the_points():
    axes = drawn(figures.draw_kernel, layer_of(64, [40, 10], 5, [1., -2.]), 0)
    _, line = axes.get_lines()
    steps, values = line.get_data()
    assert steps.tolist() == list(range(-63, 1))
    tents = [weight * (1 - abs(steps - center) / 5).clip(0) for center, weight in ((-40, 1), (-10, -2))]
    np.testing.assert_allclose(values, sum(tents), atol=1e-4)
    dots = axes.collections[-1].get_offsets()
    np.testing.assert_allclose(dots, [[-40, 1], [-10, -2]], atol=1e-4)
    bars = [bar.tolist() for bar in axes.collections[-2].get_segments()]
    np.testing.assert_allclose(bars, [[[-45, 1], [-35, 1]], [[-15, -2], [-5, -2]]], atol=1e-4)
    assert axes.get_xlim() == (-63.5, 0.5) and axes.get_ylim()[0] < -2 < 1 < axes.get_ylim()[1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ['\N{MINUS SIGN}63', '\N{MINUS SIGN}32', '0']


def test_a_kernel_of_one_step():
    axes = drawn(figures.draw_kernel, SMPConv1d(1, 1, 1, 1), 0)
    assert axes.get_lines()[1].get_xdata().tolist() == [0] and axes.get_xlim() == (-0.5, 0.5)


@pytest.mark.parametrize('size, steps, radius, expected', [
    (400, [399, 300, 0], 1, (0, 400)),  # short
    (2000, [1000], 3, (1000 - 1 - 128, 1000 - 1 + 128)),  # about a single point
    (2000, [100, 50], 3, (2000 - 256, 2000)),  # up to the present, if that shows all
    (2000, [1500, 1490, 1480, 500], 3, None),  # about most of the points
    (16000, [8000], 20, (8000 - 1 - 320, 8000 - 1 + 320)),  # longer for larger radii
    (2000, [500, 1500], 40, (0, 2000)),  # and everything for large ones
])
def test_a_range_of_long_kernels_is_shown(size, steps, radius, expected):
    layer = layer_of(size, steps, radius)
    start, stop = visible_range([kernel_view(layer)])
    if expected is None:
        assert stop - start == 256 and all(start <= size - 1 - step < stop for step in steps[:3])
    else:
        assert (start, stop) == pytest.approx(expected, abs=2) and stop - start == expected[1] - expected[0]
    line = drawn(figures.draw_kernel, layer, 0).get_lines()[1]
    assert line.get_xdata()[[0, -1]].tolist() == [start - (size - 1), stop - size]
    np.testing.assert_array_equal(line.get_ydata(), layer.kernel()[0, 0, start:stop].detach())


def test_all_points_are_shown_with_the_share_of_the_range():
    layer = layer_of(2000, [1500, 1490, 1480, 500], 3, [1., -1., 1., 1.])
    axes = drawn(figures.draw_points, layer)
    dots = axes.collections[-1].get_offsets()
    np.testing.assert_allclose(dots, [[-1500, 1], [-1490, 1], [-1480, 1], [-500, 1]], atol=1e-3)
    assert axes.get_xlim() == (-1999.5, 0.5) and axes.get_xlabel() == 'shaded: 75 % of the kernels'
    shaded, = axes.patches
    start, stop = visible_range([kernel_view(layer)])
    assert (shaded.get_x(), shaded.get_width()) == (start - 2000 + 0.5, stop - start)
    assert not drawn(figures.draw_points, layer_of(64, [3], 3)).patches


def test_a_kernel_of_zeros_is_drawn():
    layer = layer_of(2000, [5.], 3, [0.])
    assert visible_range([kernel_view(layer)]) == (0, 2000)
    assert drawn(figures.draw_kernel, layer, 0).get_lines()[1].get_ydata().max() == 0
    drawn(figures.draw_points, layer)


def test_points_outside_the_range_do_not_flatten_the_line():
    layer = layer_of(2000, [-50, 100, 110], 3, [99., 1., 1.])
    assert drawn(figures.draw_kernel, layer, 0).get_ylim()[1] < 2


def test_all_frames_show_the_same_range_and_heights(tmp_path, monkeypatch):
    """The point leaves the range in the last frame."""
    frames = []
    draw = training.draw_frame
    monkeypatch.setattr(training, 'draw_frame', lambda *args: frames.append(draw(*args)) or frames[-1])
    layer = layer_of(2000, [20], 3)
    snapshots = [(f'epoch {epoch}', {'conv': copy.deepcopy(layer)}) for epoch in range(3)]
    with torch.no_grad():
        snapshots[2][1]['conv'].coords -= 1
        snapshots[2][1]['conv'].weight *= 3
    figures.save_animation(tmp_path / 'a.gif', snapshots)
    panels = [figure.axes[1] for figure in frames]
    assert {axes.get_xlim() for axes in panels} == {(-255.5, 0.5)} and len({axes.get_ylim() for axes in panels}) == 1
    assert [figure.axes[0].get_xlabel() for figure in frames] == [
        f'shaded: {share} % of the kernels' for share in (100, 100, 0)]
    assert frames[0].axes[0].get_ylim()[1] > 3


# --- rows ---


def test_a_plot_has_a_row_per_layer_and_no_empty_columns(network, tmp_path):
    for name, layers, columns in (('one', NAMES[:1], 4), ('all', None, 4), ('wide', NAMES[:1], 10 ** 9)):
        figures.save_kernels(tmp_path / f'{name}.png', network, layers, columns=columns)
    one, every, wide = (
        np.asarray(Image.open(tmp_path / f'{name}.png').convert('RGB')) for name in ('one', 'all', 'wide'))
    assert one.std() > 10 and every.shape[0] > 2 * one.shape[0] and every.shape[1] == one.shape[1]
    assert wide.shape == one.shape  # the layer has four channels


@pytest.mark.parametrize('network, filter', [
    (SMPConvNet(depths=(1, 2), dims=(4, 8), kernel_sizes=(7, 5)), None),
    (SMPResNet(depths=(1, 1), dims=(2, 4), kernel_size=5, num_points=3), 1),
    (create_sequence_model('smpconv_sdigits', depth=1, dim=3, num_points=4), 1),
], ids=['depthwise', 'images', 'sequences'])
def test_a_row_is_a_layer_or_filter_and_a_column_a_channel(network, filter, tmp_path, monkeypatch, saved_figures):
    calls = []
    draw = kernels.draw_kernel
    monkeypatch.setattr(kernels, 'draw_kernel', lambda axes, view, channel, *args: calls.append(
        (view.filter, channel)) or draw(axes, view, channel, *args))
    figures.save_kernels(tmp_path / 'k.png', network, max_layers=2, columns=2, filter=filter or 0)
    layers = figures.choose_layers(network, most=2).values()
    counts = [layer.weight.shape[0] if filter is None else layer.in_channels for layer in layers]
    assert calls == [(filter, channel) for count in counts for channel in range(min(count, 2))]
    channel = 'channel' if filter is None else 'input channel'
    titles = [axes.get_title() for axes in saved_figures[0].axes]
    assert titles[:3] == ['points', f'{channel} 0', f'{channel} 1']
    calls.clear()
    rows = [{'epoch': 0, 'train_loss': 1., 'eval_loss': 1., 'eval_top1': 9.}]
    figures.save_run(tmp_path / 'run.png', rows, network, max_layers=2)
    assert (tmp_path / 'run.png').stat().st_size > (tmp_path / 'k.png').stat().st_size > 1000
    assert {found for found, _ in calls} == {None if filter is None else 0}
