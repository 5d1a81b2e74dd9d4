"""Names of classes, files and checkpoints in scripts that the default font lacks."""
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from smpconv_models import SMPConvNet, figures
from smpconv_models.layers import SMPConv1d

pytestmark = pytest.mark.filterwarnings('error')  # matplotlib warns of missing glyphs
NAMES = ['猫', '犬', 'きつね', '\N{FOX FACE}', 'قطة', 'ant']


@pytest.fixture
def fonts(monkeypatch):
    """Only the fonts that come with matplotlib."""
    known = [entry for entry in font_manager.fontManager.ttflist if 'mpl-data' in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, 'ttflist', known)
    figures._text._fallbacks.cache_clear()
    yield known
    figures._text._fallbacks.cache_clear()


def add_font(folder, family, characters, weight=400):
    """Install a font of black squares with these characters."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000)
    names = ['.notdef', *(f'u{ord(character):X}' for character in characters)]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(character): name for character, name in zip(characters, names[1:])})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({'familyName': family, 'styleName': 'Regular'})
    builder.setupOS2(usWeightClass=weight)
    builder.setupPost()
    builder.save(folder / f'{family}.ttf')
    font_manager.fontManager.addfont(folder / f'{family}.ttf')


def class_labels(saved_figures, path, names):
    figures.save_confusion_matrix(path / 'confusion.png', torch.eye(len(names), dtype=torch.int64), names)
    return saved_figures[-1].axes[0].get_yticklabels()


def test_a_font_of_the_system_is_used(fonts, saved_figures, tmp_path, caplog):
    add_font(tmp_path, 'Light', '猫犬きつね', 300)  # matplotlib warns of weights that it has to replace
    add_font(tmp_path, 'Some', '猫')
    add_font(tmp_path, 'More', '猫犬')
    add_font(tmp_path, 'Kana', 'きつね')
    labels = class_labels(saved_figures, tmp_path, NAMES)
    assert [label.get_text() for label in labels] == ['猫', '犬', 'きつね', r'\U0001f98a', 'قطة', 'ant']
    assert labels[0].get_fontfamily() == ['sans-serif', 'Kana', 'More']
    assert not [record for record in caplog.records if record.name.startswith('matplotlib')]


def test_classes_are_told_apart_without_a_font(fonts, saved_figures, tmp_path):
    texts = [label.get_text() for label in class_labels(saved_figures, tmp_path, NAMES)]
    assert texts[:2] == [r'\u732b', r'\u72ac'] and len(set(texts)) == len(NAMES)
    alike = [label.get_text() for label in class_labels(saved_figures, tmp_path, ['犬' * 9 + 'a', '犬' * 9 + 'b'])]
    assert [text[:8] for text in alike] == [r'0: \u72a', r'1: \u72a'] and all(len(text) <= 35 for text in alike)


@pytest.mark.parametrize('name', ['猫\t$x', '\udcff\n'])
def test_titles_with_names_from_outside_are_drawn(fonts, tmp_path, name):
    figures.save_receptive_fields(tmp_path / 'field.png', {name: np.ones((5, 5))})
    figures.save_heat_maps(tmp_path / 'heat.png', torch.zeros(1, 1, 4, 4), np.zeros((1, 4, 4)), [name])
    network = SMPConvNet(depths=(1,), dims=(4,), kernel_sizes=(7,)).eval()
    figures.save_stages(tmp_path / 'stages.png', {name: network})
    layers = figures.choose_layers(network)
    figures.save_animation(tmp_path / 'points.gif', [(name, layers), (f'{name} 2', layers)])
    figures.save_kernels(tmp_path / 'kernels.png', torch.nn.ModuleDict({name: SMPConv1d(1, 1, 9)}))
