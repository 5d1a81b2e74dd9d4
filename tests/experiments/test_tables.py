"""experiments/tables.py: what is written, and that it is whole."""
import csv
import math
import os

import pytest
import torch
from programs import load

tables = load('experiments/tables')


def test_csv_has_all_columns_of_all_rows(tmp_path):
    path = tmp_path / 'rows.csv'
    tables.write_csv(path, [{'a': 1, 'b': 'x, "y"'}, {'a': None, 'c': 0.1}])
    with open(path, newline='') as file:
        assert list(csv.DictReader(file)) == [{'a': '1', 'b': 'x, "y"', 'c': ''}, {'a': '', 'b': '', 'c': '0.1'}]
    assert b'\r' not in path.read_bytes()


def test_text_is_utf_8(tmp_path):
    tables.write_text(tmp_path / 'file', 'é')
    assert (tmp_path / 'file').read_bytes() == b'\xc3\xa9'


def test_writable_is_known_beforehand(tmp_path):
    tables.check_writable([tmp_path / 'new' / 'folder' / 'file'])
    assert list((tmp_path / 'new').iterdir()) == [tmp_path / 'new' / 'folder']
    assert not list((tmp_path / 'new' / 'folder').iterdir())
    with pytest.raises(IsADirectoryError, match='folder is a folder'):
        tables.check_writable([tmp_path / 'new' / 'folder'])
    (tmp_path / 'plain').write_text('')
    with pytest.raises(OSError, match='plain'):
        tables.check_writable([tmp_path / 'plain' / 'file'])


def test_mean_and_standard_deviation_of_a_sample():
    assert tables.mean_std([1, 2, 3, 6]) == (3, pytest.approx(math.sqrt(14 / 3)))
    mean, std = tables.mean_std([5.])
    assert mean == 5 and math.isnan(std)
    with pytest.raises(ValueError, match='at least one'):
        tables.mean_std([])


def test_spread():
    assert tables.spread([1, 2, 3, 6], 2) == '3.00 ± 2.16'
    assert tables.spread([0.126], 1) == '0.1'


def test_summary_keeps_groups_apart_and_in_order():
    rows = [{'arm': 'b', 'seed': 0, 'x': 1.}, {'arm': 'a', 'seed': 0, 'x': 5.}, {'arm': 'b', 'seed': 1, 'x': 3.}]
    assert tables.summarize(rows, ['arm'], {'x': 1}) == [
        {'arm': 'b', 'x': '2.0 ± 1.4', 'seeds': 2}, {'arm': 'a', 'x': '5.0', 'seeds': 1}]


def test_markdown():
    assert tables.markdown([{'a': 1, 'b': 'x|y', 'no': 0}, {'b': '2 ± 1'}], {'b': 'B', 'a': 'A'}) == (
        '| B | A |\n'
        '| --- | --- |\n'
        '| x\\|y | 1 |\n'
        '| 2 ± 1 |  |\n')


def test_environment_says_on_what_and_when():
    found = tables.environment()
    assert list(found) == ['torch', 'device', 'threads', 'date']
    assert found['torch'] == torch.__version__ and found['threads'] == torch.get_num_threads()
    assert f'{os.cpu_count()} cores' in found['device']
