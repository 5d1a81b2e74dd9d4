"""Latency: only equal outputs are timed, and the row is stored."""
import importlib
import json
import sys
from pathlib import Path

import pytest

ARGUMENTS = ['latency.py', '--model', 'smpconv_nano', '--against', 'convnext_atto', '--img-size', '32', '--rounds', '1']


@pytest.fixture
def latency(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / 'benchmarks')
    module = importlib.import_module('latency')
    monkeypatch.setattr(module.measure, 'RESULTS', tmp_path)
    monkeypatch.setattr(sys, 'argv', ARGUMENTS)
    return module


def test_row(latency, tmp_path, capsys):
    assert latency.main() == 0
    row = json.loads((tmp_path / 'latency.jsonl').read_text())
    assert row['batch_size'] == 1 and row['img_size'] == 32
    ours, theirs = row['seconds']['smpconv_nano'], row['seconds']['convnext_atto']
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith('smpconv_nano') and f'{ours / theirs:.3f} x convnext_atto' in line


def test_a_wrong_network_is_not_timed(latency, tmp_path, monkeypatch):
    monkeypatch.setattr(latency.timm.utils, 'reparameterize_model', lambda model: latency.timm.create_model(
        'smpconv_nano').eval())
    with pytest.raises(SystemExit, match='nothing is timed'):
        latency.main()
    assert not list(tmp_path.iterdir())
