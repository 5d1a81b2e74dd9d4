"""Shares of maps within central squares."""
import numpy as np
import pytest

from smpconv_models import figures


def by_hand(values, share):
    """RepLKNet's rule, one square after the other."""
    height, width = values.shape
    middle_row, middle_column = height // 2, width // 2
    for reach in range(max(height, width)):
        inside = values[max(middle_row - reach, 0):middle_row + reach + 1,
                        max(middle_column - reach, 0):middle_column + reach + 1]
        if inside.sum() >= share * values.sum():
            return 2 * reach + 1, inside.size / values.size


@pytest.mark.parametrize('shape', [(9, 9), (8, 8), (7, 12), (1, 5)])
@pytest.mark.parametrize('share', [0.2, 0.3, 0.5, 0.99])
def test_as_square_after_square(shape, share):
    values = np.random.default_rng(0).integers(0, 50, shape).astype(float)
    assert figures.central_square(values, share) == pytest.approx(by_hand(values, share))


def test_of_known_maps():
    point = np.zeros((9, 9))
    point[4, 4] = 2.
    assert figures.central_square(point, 1.) == (1, 1 / 81)
    point[0, 0] = 2.
    assert figures.central_square(point, 0.5) == (1, 1 / 81)
    assert figures.central_square(point, 0.51) == (9, 1.)
    assert figures.central_square(np.ones((9, 9)), 25 / 81) == (5, 25 / 81)
    assert figures.central_square(np.full((11, 11), 0.1), 1.) == (11, 1.)  # whose sum is rounded


@pytest.mark.parametrize(('values', 'share', 'message'), [
    (np.ones((3, 3)), 0., 'share must lie in'),
    (np.ones((3, 3)), 1.01, 'share must lie in'),
    (np.ones(3), 0.5, r'shape \(H, W\), got \(3,\)'),
    (np.zeros((3, 3)), 0.5, 'not all zero'),
    (np.full((3, 3), np.nan), 0.5, 'finite'),
    (-np.eye(3), 0.5, 'not negative'),
])
def test_what_has_no_shares(values, share, message):
    with pytest.raises(ValueError, match=message):
        figures.central_square(values, share)
