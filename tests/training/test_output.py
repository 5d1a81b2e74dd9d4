"""What a run leaves behind."""
import csv
import os

import pytest
import torch

from smpconv_models.training import checkpointing
from smpconv_models.utils import atomic_io


def test_checkpoints_load_as_plain_data(tmp_path):
    state = {'state_dict': {'w': torch.arange(3)}, 'epoch': 2, 'args': {'lr': 1.}}
    checkpointing.save_checkpoint(tmp_path / 'a.pth.tar', state)
    loaded = torch.load(tmp_path / 'a.pth.tar', weights_only=True)
    assert loaded['epoch'] == 2 and loaded['state_dict']['w'].tolist() == [0, 1, 2]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'a.pth.tar'
    checkpointing.save_checkpoint(path, {'epoch': 1})
    with pytest.raises(Exception, match='pickle'):
        checkpointing.save_checkpoint(path, {'epoch': lambda: 2})
    assert torch.load(path, weights_only=True) == {'epoch': 1}
    assert os.listdir(tmp_path) == ['a.pth.tar']


def test_a_save_after_one_that_ended_halfway_leaves_nothing_else(tmp_path):
    """When both names were one file's."""
    last, previous = tmp_path / 'last', tmp_path / 'previous'
    checkpointing.save_checkpoint(last, {'epoch': 1})
    os.link(last, previous)
    checkpointing.save_checkpoint(last, {'epoch': 2}, previous)
    assert [torch.load(path, weights_only=True)['epoch'] for path in (last, previous)] == [2, 1]
    assert sorted(os.listdir(tmp_path)) == ['last', 'previous']


def test_rows_have_one_header(tmp_path):
    atomic_io.save_rows(tmp_path / 'a.csv', [{'epoch': 0, 'loss': 0.5}, {'epoch': 1, 'loss': 0.5, 'ema': 1}])
    with open(tmp_path / 'a.csv', newline='') as file:
        assert list(csv.DictReader(file)) == [
            {'epoch': '0', 'loss': '0.5', 'ema': ''}, {'epoch': '1', 'loss': '0.5', 'ema': '1'}]
