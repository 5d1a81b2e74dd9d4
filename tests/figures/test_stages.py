"""Plots of summed absolute kernels, over an image and over the steps back from the present."""
import itertools

import numpy as np
import pytest
import torch
from common import randomize_
from matplotlib.figure import Figure
from timm.utils import reparameterize_model
from torch import nn

from smpconv_models import SMPConvNet, figures
from smpconv_models.figures.stages import draw_step_sum, steps_with_half
from smpconv_models.layers import CausalConv1d, FFTConv2d, smp_layers
from smpconv_models.models import SMPResNet, create_sequence_model


@pytest.fixture(scope='module')
def network():
    return randomize_(SMPConvNet(depths=(1, 2), dims=(4, 8), kernel_sizes=(7, 5), small_kernel_size=5)).eval()


def test_sums_are_those_of_a_loop(network):
    """The small kernel of the second stage has the size of the large one, and is not counted."""
    expected = {0: np.zeros((7, 7)), 1: np.zeros((5, 5))}
    for name, layer in smp_layers(network).items():
        for kernel in layer.kernel().detach().double().numpy():
            expected[int(name.split('.')[1])] += abs(kernel[0])
    found = figures.stage_sums(network)
    assert {stage: each.layers for stage, each in found.items()} == {0: 1, 1: 2}
    for stage, total in expected.items():
        np.testing.assert_allclose(found[stage].total, total, rtol=1e-12)


def test_reparameterized_kernels_are_summed_after_merging(network):
    merged = reparameterize_model(network)
    found = figures.stage_sums(merged)
    kernels = [block.mixer.large_kernel.weight.detach() for block in merged.stages[1].blocks]
    assert found[1].layers == 2 and [kernel.shape for kernel in kernels] == [(8, 1, 5, 5)] * 2
    np.testing.assert_allclose(found[1].total, sum(kernel.double().abs().sum((0, 1)) for kernel in kernels))


def test_other_networks_have_their_largest_kernels_summed():
    network = nn.Sequential()
    network.stages = nn.ModuleList([nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 7, groups=4), nn.Conv2d(4, 4, 9, groups=2),
        nn.Conv2d(4, 4, (1, 11), groups=4))])
    found = figures.stage_sums(network)
    expected = network.stages[0][1].weight.detach().double().abs().sum((0, 1))
    assert list(found) == [0] and found[0].layers == 1
    np.testing.assert_allclose(found[0].total, expected)


def test_networks_without_stages_are_refused():
    with pytest.raises(ValueError, match=r'depthwise convolutions in modules named stages\.N, found none'):
        figures.stage_sums(nn.Conv2d(4, 4, 3, groups=4))


def test_the_plot_shows_shares_of_the_largest(network, tmp_path, saved_figures):
    smaller = SMPConvNet(depths=(1,), dims=(4,), kernel_sizes=(5,)).eval()
    figures.save_stages(tmp_path / 'stages.png', {'two': network, 'one': smaller})
    panels = saved_figures[0].axes[:4]
    assert [axes.get_title() for axes in panels] == [
        'stage 0: 7x7, 1 layer', 'stage 1: 5x5, 2 layers', 'stage 0: 5x5, 1 layer', '']
    total = figures.stage_sums(network)[0].total
    np.testing.assert_allclose(panels[0].images[0].get_array(), total / total.max())
    square, = panels[0].patches
    side = figures.central_square(total, 0.5).side
    assert (square.get_xy(), square.get_width()) == ((-side / 2, -side / 2), side)
    assert (tmp_path / 'stages.png').stat().st_size > 1000


def test_kernels_that_are_not_finite_are_refused():
    network = SMPConvNet(depths=(1,), dims=(4,), kernel_sizes=(5,))
    with torch.no_grad():
        next(iter(smp_layers(network).values())).weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match='not finite'):
        figures.stage_sums(network)


@pytest.mark.parametrize('network, pattern', [
    (SMPResNet(depths=(1, 2), dims=(3, 4), kernel_size=7, num_points=3), 'stages'),
    (create_sequence_model('smpconv_sdigits', dim=3, depth=2), 'blocks'),
], ids=['images', 'sequences'])
def test_filters_are_summed_by_stage_or_block_before_and_after_merging(network, pattern, tmp_path):
    randomize_(network.eval())
    for merged in (network, reparameterize_model(network)):
        expected, counts = {}, {}
        large = smp_layers(merged).items() or [
            (name, module) for name, module in merged.named_modules() if isinstance(module, (CausalConv1d, FFTConv2d))]
        for name, layer in large:
            if name.startswith(pattern):
                kernels = layer.kernel() if merged is network else layer.weight
                place = int(name.split('.')[1])
                summed = sum(abs(kernel) for filter in kernels.detach().double().numpy() for kernel in filter)
                expected[place] = expected.get(place, 0) + summed
                counts[place] = counts.get(place, 0) + 1
        found = figures.stage_sums(merged)
        assert {place: each.layers for place, each in found.items()} == counts and len(counts) == 2
        for place, total in expected.items():
            np.testing.assert_allclose(found[place].total, total, rtol=1e-12)
    figures.save_stages(tmp_path / 'stages.png', {'before': network, 'after': merged})


def test_images_and_sequences_in_one_plot(network, tmp_path, saved_figures):
    sequences = create_sequence_model('smpconv_sdigits', dim=3, depth=1)
    figures.save_stages(tmp_path / 'stages.png', {'images': network, 'sequences': sequences})
    assert [axes.get_title() for axes in saved_figures[0].axes[:3]] == [
        'stage 0: 7x7, 1 layer', 'stage 1: 5x5, 2 layers', 'block 0: 64 steps, 2 layers']
    assert saved_figures[0].get_supxlabel() == 'steps back (1: the present)'
    assert len(saved_figures[0].legends[0].get_texts()) == 2


# --- sums over time ---


@pytest.mark.parametrize('size', [1, 2, 64, 5000])
def test_curves_are_those_of_a_loop(size):
    total = np.random.default_rng(0).random(size)
    axes = Figure().add_subplot()
    bars, curve = draw_step_sum(axes, total)
    heights, edges, _ = bars.get_data()
    assert edges[0] == 1 and edges[-1] == size + 1 and len(heights) < 100
    means = [np.mean([total[size - back] for back in range(a, b)]) for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(heights, np.array(means) / max(means))
    steps, shares = curve.get_data()
    assert steps.tolist() == list(range(1, size + 1))
    np.testing.assert_allclose(shares, [total[size - back:].sum() / total.sum() for back in steps])
    assert axes.get_xlim() == (size + 1, 1)  # the present at the right


@pytest.mark.parametrize('total, half', [([0., 0., 1., 0., 0.], 3), ([5., 1., 1., 1., 3.], 4), ([1.], 1)])
def test_half_of_a_sum(total, half):
    assert steps_with_half(np.array(total)) == half
    axes = Figure().add_subplot()
    draw_step_sum(axes, np.array(total))
    assert axes.get_xlabel() == f'half within {half} step{"s" if half > 1 else ""}'


def test_a_sum_of_zero_has_no_shares():
    assert len(draw_step_sum(Figure().add_subplot(), np.zeros(5))) == 1
