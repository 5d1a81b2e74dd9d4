"""Sums of kernels by how far back they look."""
import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from smpconv_models.figures.lags import draw_lags, half_within


@pytest.mark.parametrize('size', [1, 2, 64, 5000])
def test_curves_are_those_of_a_loop(size):
    total = np.random.default_rng(0).random(size)
    axes = Figure().add_subplot()
    bars, curve = draw_lags(axes, total)
    heights, edges, _ = bars.get_data()
    assert edges[0] == 1 and edges[-1] == size + 1 and len(heights) < 100
    means = [np.mean([total[size - back] for back in range(a, b)]) for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(heights, np.array(means) / max(means))
    steps, shares = curve.get_data()
    assert steps.tolist() == list(range(1, size + 1))
    np.testing.assert_allclose(shares, [total[size - back:].sum() / total.sum() for back in steps])
    assert axes.get_xlim() == (size + 1, 1)  # the present at the right


def test_half_of_a_sum():
    assert half_within(np.array([0., 0., 1., 0., 0.])) == 3
    assert half_within(np.array([5., 1., 1., 1., 3.])) == 4
    assert half_within(np.array([1.])) == 1
    axes = Figure().add_subplot()
    draw_lags(axes, np.array([5., 1., 1., 1., 3.]))
    assert axes.get_xlabel() == 'half within 4 steps'


def test_of_nothing_there_are_no_shares():
    assert len(draw_lags(Figure().add_subplot(), np.zeros(5))) == 1
