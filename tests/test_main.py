"""`python -m smpconv_models`: the counts of the model table."""
import pytest

from smpconv_models.__main__ import main

# GMACs of one 224x224 image, kernels not counted, as the release's networks have them
COUNTED = {'smpconv_t': (26_705_248, 5.71), 'smpconv_b': (79_546_520, 16.61),
           'smpconv_mobile31': (2_892_494, 1.33), 'smpconv_mobile51': (3_066_884, 2.45)}


@pytest.mark.parametrize('name', COUNTED)
def test_counts(name, capsys):
    assert main([name]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    parameters, macs = COUNTED[name]
    assert row[0] == name
    assert int(row[1].replace(',', '')) == parameters
    assert float(row[2]) == pytest.approx(macs, abs=0.006)


def test_an_unknown_name_is_told(capsys):
    assert main(['nothing']) == 2
    assert "no model matches 'nothing'" in capsys.readouterr().err
