"""Summed absolute kernels."""
import numpy as np
import pytest
import torch
from common import randomize_
from matplotlib.figure import Figure
from timm.utils import reparameterize_model
from torch import nn

from smpconv_models import SMPConvNet, figures
from smpconv_models.layers import CausalConv1d, FFTConv2d, smp_layers
from smpconv_models.models import SMPResNet, create_sequence_model


@pytest.fixture(scope='module')
def network():
    return randomize_(SMPConvNet(depths=(1, 2), dims=(4, 8), kernel_sizes=(7, 5), small_kernel_size=5)).eval()


def test_sums_are_those_of_a_loop(network):
    """The small kernel of the second stage is as large as the large one, and isn't counted."""
    expected = {0: np.zeros((7, 7)), 1: np.zeros((5, 5))}
    for name, layer in smp_layers(network).items():
        for kernel in layer.kernel().detach().double().numpy():
            expected[int(name.split('.')[1])] += abs(kernel[0])
    found = figures.stage_sums(network)
    assert {stage: each.layers for stage, each in found.items()} == {0: 1, 1: 2}
    for stage, total in expected.items():
        np.testing.assert_allclose(found[stage].total, total, rtol=1e-12)


def test_reparameterized_kernels_are_summed_as_they_are(network):
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


def test_networks_without_stages_are_refused(network):
    with pytest.raises(ValueError, match=r'depthwise convolutions in modules named stages\.N, found none'):
        figures.stage_sums(nn.Conv2d(4, 4, 3, groups=4))
    with pytest.raises(ValueError, match='mine: expected depthwise'):
        figures.save_stages('never.png', {'yours': network, 'mine': nn.Linear(1, 1)})


def test_the_picture_shows_shares_of_the_largest(network, tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **kwargs: drawn.append(self) or save(
        self, *args, **kwargs))
    smaller = SMPConvNet(depths=(1,), dims=(4,), kernel_sizes=(5,)).eval()
    figures.save_stages(tmp_path / 'stages.png', {'two': network, 'one': smaller})
    panels = drawn[0].axes[:4]
    assert [axes.get_title() for axes in panels] == [
        'stage 0: 7x7, 1 layer', 'stage 1: 5x5, 2 layers', 'stage 0: 5x5, 1 layer', '']
    total = figures.stage_sums(network)[0].total
    np.testing.assert_allclose(panels[0].images[0].get_array(), total / total.max())
    square, = panels[0].patches
    side = figures.central_square(total, 0.5).side
    assert (square.get_xy(), square.get_width()) == ((-side / 2, -side / 2), side)
    assert (tmp_path / 'stages.png').stat().st_size > 1000


def test_kernels_that_are_not_finite_are_told():
    network = SMPConvNet(depths=(1,), dims=(4,), kernel_sizes=(5,))
    with torch.no_grad():
        next(iter(smp_layers(network).values())).weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match='not finite'):
        figures.stage_sums(network)


@pytest.mark.parametrize('network, pattern', [
    (SMPResNet(depths=(1, 2), dims=(3, 4), kernel_size=7, num_points=3), 'stages'),
    (create_sequence_model('smpconv_sdigits', dim=3, depth=2), 'blocks'),
], ids=['images', 'sequences'])
def test_filters_are_summed_by_stage_or_block(network, pattern, tmp_path):
    """And, re-parameterized, as they are."""
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


def test_images_and_sequences_in_one_picture(network, tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **kwargs: drawn.append(self) or save(
        self, *args, **kwargs))
    sequences = create_sequence_model('smpconv_sdigits', dim=3, depth=1)
    figures.save_stages(tmp_path / 'stages.png', {'images': network, 'sequences': sequences})
    assert [axes.get_title() for axes in drawn[0].axes[:3]] == [
        'stage 0: 7x7, 1 layer', 'stage 1: 5x5, 2 layers', 'block 0: 64 steps, 2 layers']
    assert drawn[0].get_supxlabel() == 'steps back (1: the present)' and len(drawn[0].legends[0].get_texts()) == 2
