"""Animations of points over a training run."""
import copy
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from smpconv_models import SMPConvNet, figures
from smpconv_models.figures import training


@pytest.fixture
def snapshots():
    """A layer whose points move to the right and gain weight."""
    network = SMPConvNet(depths=(1,), dims=(2,), kernel_sizes=(5,))
    found = []
    for epoch in range(3):
        found.append((f'epoch {epoch}', copy.deepcopy(figures.choose_layers(network))))
        with torch.no_grad():
            for layer in figures.choose_layers(network).values():
                layer.coords[:, 0] += 0.1
                layer.weight *= 2
    return found


@pytest.mark.parametrize(('name', 'format'), [('points.gif', 'GIF'), ('points.png', 'PNG'), ('points.APNG', 'PNG')])
def test_each_snapshot_has_a_frame(snapshots, tmp_path, name, format):
    figures.save_animation(tmp_path / name, snapshots, columns=1, fps=10)
    with Image.open(tmp_path / name) as picture:
        assert (picture.format, picture.n_frames) == (format, 3)
        frames, durations = [], []
        for index in range(3):
            picture.seek(index)
            frames.append(np.asarray(picture.convert('RGB')).astype(int))
            durations.append(picture.info['duration'])
    assert durations == [100, 100, 2000]
    assert all(abs(a - b).max() > 100 for a, b in itertools.pairwise(frames))


def test_frames_share_their_color_scales(snapshots, tmp_path, monkeypatch):
    frames = []
    draw = training.draw_frame
    monkeypatch.setattr(training, 'draw_frame', lambda *args: frames.append(draw(*args)) or frames[-1])
    figures.save_animation(tmp_path / 'points.gif', snapshots, columns=2)
    assert [figure.get_suptitle() for figure in frames] == ['epoch 0', 'epoch 1', 'epoch 2']
    (_, last_layers), = snapshots[2:]
    last, = last_layers.values()
    for figure, (_, layers) in zip(frames, snapshots):
        layer, = layers.values()
        points, *kernels = figure.axes
        np.testing.assert_array_equal(points.collections[-1].get_offsets(), layer.coords.detach())
        assert points.collections[-1].get_clim() == (0, pytest.approx(last.weight.abs().mean(0).max().item()))
        for channel, axes in enumerate(kernels):
            np.testing.assert_array_equal(axes.images[0].get_array(), layer.kernel()[channel, 0].detach())
            every = [each.kernel()[channel] for _, found in snapshots for each in found.values()]
            largest = max(kernel.abs().max().item() for kernel in every)
            assert axes.images[0].get_clim() == pytest.approx((-largest, largest))


def test_snapshots_of_other_layers_are_refused(snapshots, tmp_path):
    path = tmp_path / 'points.gif'
    other = SMPConvNet(depths=(1,), dims=(2,), kernel_sizes=(7,))
    with pytest.raises(ValueError, match=r'the layers must be the same in all snapshots: epoch 0 has .*5x5.*other has'):
        figures.save_animation(path, [*snapshots, ('other', figures.choose_layers(other))])
    assert not path.exists()
