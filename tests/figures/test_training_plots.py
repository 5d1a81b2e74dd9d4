"""Plots of training runs and confusion matrices."""
import numpy as np
import pytest
import torch
from PIL import Image

from smpconv_models import SMPConvNet, figures

ROWS = [
    {'epoch': epoch, 'train_loss': 2. / (epoch + 1), 'eval_loss': 2.5 / (epoch + 1), 'eval_top1': 30. * epoch}
    for epoch in range(3)
]


def pixels(path):
    return np.asarray(Image.open(path).convert('RGB'))


@pytest.mark.parametrize('model', [
    SMPConvNet(depths=(1, 2), dims=(4, 8), kernel_sizes=(7, 5)),
    torch.nn.Linear(1, 1),  # no kernels: the curves alone
], ids=['kernels', 'curves'])
def test_a_run_is_drawn(tmp_path, model):
    figures.save_run(tmp_path / 'run.png', ROWS, model)
    picture = pixels(tmp_path / 'run.png')
    assert picture.shape[1] == 1300 and picture.std() > 10


def curves(saved_figures, path, top1, ema_top1=None):
    """Draw the curves of a run with these accuracies; return both axes."""
    rows = [
        {'epoch': epoch, 'train_loss': 2., 'eval_loss': 1., 'eval_top1': value} for epoch, value in enumerate(top1)]
    for row, value in zip(rows, ema_top1 or []):
        row.update(ema_loss=1.5, ema_top1=value)
    figures.save_curves(path / 'curves.png', rows)
    return saved_figures[-1].axes


def test_a_series_has_one_color_in_both_plots(saved_figures, tmp_path):
    losses, top1s = ({line.get_label(): line.get_color() for line in axes.get_lines()} for axes in curves(
        saved_figures, tmp_path, [10., 20.], [10., 15.]))
    assert list(losses) == ['training', 'validation', 'validation, EMA weights']
    assert len(set(losses.values())) == 3 and top1s == {label: losses[label] for label in list(losses)[1:]}


@pytest.mark.parametrize('epochs', [1, 2, 3, 300])
def test_epochs_are_whole_numbers(saved_figures, tmp_path, epochs):
    for axes in curves(saved_figures, tmp_path, [50.] * epochs):
        shown = [tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
        assert shown and all(tick == int(tick) for tick in shown)
        assert all((line.get_marker() == 'o') == (epochs == 1) for line in axes.get_lines())


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('top1', [
    [10., 82., 95., 99.2, 99.7], [10., 30., 45., 55., 60.], [0., 100.], [71.3, 71.45, 71.62], [99.9, 100., 100.],
    [0.], [100.], [99.72], [0., 0., 0.]])
def test_accuracies_are_apart_on_a_labelled_axis(saved_figures, tmp_path, top1):
    axes = curves(saved_figures, tmp_path, top1)[1]
    low, high = axes.get_ylim()
    assert np.isfinite([low, high]).all() and low < min(top1) <= max(top1) < high
    heights = [axes.transAxes.inverted().transform(axes.transData.transform((0, value)))[1] for value in top1]
    assert all(abs(np.subtract.outer(heights, heights))[np.subtract.outer(top1, top1) != 0] > 0.04)
    ticks = axes.get_yticks()
    assert all(low <= tick <= high and 0 <= tick <= 100 for tick in ticks)
    assert [float(label.get_text()) for label in axes.get_yticklabels()] == pytest.approx(ticks)
    assert len(ticks) >= (3 if len(set(top1)) > 1 else 1)


def confusion_of(classes):
    """Return counts of 50 images per class; half of the second's go to the first, and the third has no images."""
    confusion = 50 * torch.eye(classes, dtype=torch.int64)
    confusion[1, 1], confusion[1, 0], confusion[2] = 25, 25, 0
    return confusion


@pytest.fixture
def draw(saved_figures, tmp_path):
    """Draw a confusion matrix; returns the axes and the path."""
    def draw(*args):
        path = tmp_path / f'{len(saved_figures)}.png'
        figures.save_confusion_matrix(path, *args)
        return saved_figures[-1].axes[0], path
    return draw


def test_confusion_is_by_row_and_counted(draw):
    axes, path = draw(confusion_of(4), ['ant', r'$\bee$', 'cow', 'd' * 40])
    shares = axes.images[0].get_array()
    assert shares[1].tolist() == [50, 50, 0, 0] and shares[2].mask.all() and shares[3, 3] == 100
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): '50', (0, 1): '25', (1, 1): '25', (3, 3): '50'}  # x the prediction, y the class
    labels = [[label.get_text() for label in ticks] for ticks in (axes.get_xticklabels(), axes.get_yticklabels())]
    assert labels == [['ant', r'$\bee$', 'cow', 'd' * 31 + '…']] * 2
    assert axes.get_title() == 'top-1 83.33 % of 150 images' and pixels(path).std() > 10


@pytest.mark.parametrize('classes, are_named, are_counted', [
    (20, True, True), (21, True, False), (40, True, False), (41, False, False)])
def test_names_and_counts_are_shown_if_they_fit(draw, classes, are_named, are_counted):
    names = [f'class {index}' for index in range(classes)]
    axes, _ = draw(confusion_of(classes), names)
    assert ([label.get_text() for label in axes.get_yticklabels()] == names) == are_named
    assert bool(axes.texts) == are_counted


def test_a_mistake_is_visible_among_a_thousand_classes(draw):
    """Its cell alone is about a pixel."""
    confusion = confusion_of(1000)
    _, without = draw(confusion)
    confusion[700, 700], confusion[700, 100] = 25, 25
    axes, path = draw(confusion)
    changed = abs(pixels(path).astype(int) - pixels(without)).max(2) > 60
    x, y = axes.transData.transform((100, 700)) / axes.figure.dpi * 130
    row, column = round(len(changed) - y), round(x)
    assert changed[row - 10:row + 10, column - 10:column + 10].sum() >= 25
