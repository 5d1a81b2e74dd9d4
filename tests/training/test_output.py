"""What a run leaves behind."""
import csv
import os
import stat

import pytest
import torch

from smpconv_models.training import output


def test_checkpoints_load_as_plain_data(tmp_path):
    state = {'state_dict': {'w': torch.arange(3)}, 'epoch': 2, 'args': {'lr': 1.}}
    output.save_checkpoint(tmp_path / 'a.pth.tar', state)
    loaded = torch.load(tmp_path / 'a.pth.tar', weights_only=True)
    assert loaded['epoch'] == 2 and loaded['state_dict']['w'].tolist() == [0, 1, 2]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'a.pth.tar'
    output.save_checkpoint(path, {'epoch': 1})
    with pytest.raises(Exception, match='pickle'):
        output.save_checkpoint(path, {'epoch': lambda: 2})
    assert torch.load(path, weights_only=True) == {'epoch': 1}
    assert os.listdir(tmp_path) == ['a.pth.tar']


def test_the_umask_is_respected(tmp_path):
    old = os.umask(0o027)
    try:
        output.save_checkpoint(tmp_path / 'a.pth.tar', {})
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / 'a.pth.tar').stat().st_mode) == 0o640


def test_rows_have_one_header(tmp_path):
    output.save_rows(tmp_path / 'a.csv', [{'epoch': 0, 'loss': 0.5}, {'epoch': 1, 'loss': 0.5, 'ema': 1}])
    with open(tmp_path / 'a.csv', newline='') as file:
        assert list(csv.DictReader(file)) == [
            {'epoch': '0', 'loss': '0.5', 'ema': ''}, {'epoch': '1', 'loss': '0.5', 'ema': '1'}]
