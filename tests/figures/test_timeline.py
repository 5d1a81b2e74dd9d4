"""Kernels over time: where their points are, and what is shown of long ones."""
import copy

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from smpconv_models import figures
from smpconv_models.figures import animation, kernels_1d
from smpconv_models.figures.views import view_of
from smpconv_models.layers import SMPConv1d


def layer_of(size, steps, radius, weights=None):
    """A filter with points so many steps before the present, that reach so many steps."""
    layer = SMPConv1d(1, 1, size, len(steps))
    with torch.no_grad():
        layer.coords[0, :, 0] = 1 - 2 * torch.tensor(steps, dtype=torch.float32) / (size - 1)
        layer.radius.fill_(2 * radius / (size - 1))
        layer.weight[0, 0] = torch.ones(len(steps)) if weights is None else torch.tensor(weights)
    return layer


def drawn(draw, *args, **kwargs):
    axes = Figure().add_subplot()
    draw(axes, *args, **kwargs)
    return axes


def test_the_line_goes_through_the_points():
    axes = drawn(figures.draw_kernel, layer_of(64, [40, 10], 5, [1., -2.]), 0)
    _, line = axes.get_lines()
    steps, values = line.get_data()
    assert steps.tolist() == list(range(-63, 1))
    tent_basis = [weight * (1 - abs(steps - center) / 5).clip(0) for center, weight in ((-40, 1), (-10, -2))]
    np.testing.assert_allclose(values, sum(tent_basis), atol=1e-4)
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
    (2000, [100, 50], 3, (2000 - 256, 2000)),  # up to the present, where that shows all
    (2000, [1500, 1490, 1480, 500], 3, None),  # where most are
    (16000, [8000], 20, (8000 - 1 - 320, 8000 - 1 + 320)),  # as long as points reach far
    (2000, [500, 1500], 40, (0, 2000)),  # and far enough for all of it
])
def test_of_long_kernels_a_stretch_is_shown(size, steps, radius, expected):
    layer = layer_of(size, steps, radius)
    start, stop = kernels_1d.choose_span([view_of(layer)])
    if expected is None:
        assert stop - start == 256 and all(start <= size - 1 - step < stop for step in steps[:3])
    else:
        assert (start, stop) == pytest.approx(expected, abs=2) and stop - start == expected[1] - expected[0]
    line = drawn(figures.draw_kernel, layer, 0).get_lines()[1]
    assert line.get_xdata()[[0, -1]].tolist() == [start - (size - 1), stop - size]
    np.testing.assert_array_equal(line.get_ydata(), layer.kernel()[0, 0, start:stop].detach())


def test_all_points_are_shown_with_the_share_of_the_stretch():
    layer = layer_of(2000, [1500, 1490, 1480, 500], 3, [1., -1., 1., 1.])
    axes = drawn(figures.draw_points, layer)
    dots = axes.collections[-1].get_offsets()
    np.testing.assert_allclose(dots, [[-1500, 1], [-1490, 1], [-1480, 1], [-500, 1]], atol=1e-3)
    assert axes.get_xlim() == (-1999.5, 0.5) and axes.get_xlabel() == 'shaded: 75 % of the kernels'
    shaded, = axes.patches
    start, stop = kernels_1d.choose_span([view_of(layer)])
    assert (shaded.get_x(), shaded.get_width()) == (start - 2000 + 0.5, stop - start)
    assert not drawn(figures.draw_points, layer_of(64, [3], 3)).patches


def test_a_kernel_of_zeros_is_drawn():
    layer = layer_of(2000, [5.], 3, [0.])
    assert kernels_1d.choose_span([view_of(layer)]) == (0, 2000)
    assert drawn(figures.draw_kernel, layer, 0).get_lines()[1].get_ydata().max() == 0
    drawn(figures.draw_points, layer)


def test_points_elsewhere_do_not_flatten_the_line():
    """Points that lie outside the picture may be heavier than all inside."""
    layer = layer_of(2000, [-50, 100, 110], 3, [99., 1., 1.])
    assert drawn(figures.draw_kernel, layer, 0).get_ylim()[1] < 2


def test_all_frames_show_the_same_stretch_and_heights(tmp_path, monkeypatch):
    """Though the point leaves it."""
    figures_drawn = []
    draw = animation.draw_frame
    monkeypatch.setattr(animation, 'draw_frame', lambda *args: figures_drawn.append(draw(*args)) or figures_drawn[-1])
    layer = layer_of(2000, [20], 3)
    snapshots = [(f'epoch {epoch}', {'conv': copy.deepcopy(layer)}) for epoch in range(3)]
    with torch.no_grad():
        snapshots[2][1]['conv'].coords -= 1
        snapshots[2][1]['conv'].weight *= 3
    figures.save_animation(tmp_path / 'a.gif', snapshots)
    panels = [figure.axes[1] for figure in figures_drawn]
    assert {axes.get_xlim() for axes in panels} == {(-255.5, 0.5)} and len({axes.get_ylim() for axes in panels}) == 1
    assert [figure.axes[0].get_xlabel() for figure in figures_drawn] == [
        f'shaded: {share} % of the kernels' for share in (100, 100, 0)]
    assert figures_drawn[0].axes[0].get_ylim()[1] > 3
