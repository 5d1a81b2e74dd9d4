"""What a run leaves behind."""
import csv
import os

import pytest
import torch
from launch import TINY
from made import make_folder

import train
from smpconv_models.training import checkpointing
from smpconv_models.utils import atomic_io


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'a.pth.tar'
    checkpointing.save_checkpoint(path, {'epoch': 1})
    with pytest.raises(Exception, match=r'pickle|local object'):  # as Python words it
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


@pytest.mark.slow  # 5 s: a run of many epochs
def test_each_nth_epoch_is_kept(tmp_path):
    make_folder(tmp_path / 'images')
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / '.checkpoint-7.pth.tar.left').write_text('by a run that was killed')
    argv = [
        *TINY, '--data-dir', tmp_path / 'images', '--img-size', '16', '--batch-size', '8', '--warmup-epochs', '0',
        '--output', tmp_path, '--experiment', 'run', '--epochs', '3', '--save-interval', '2', '--model-ema']
    assert train.main(list(map(str, argv))) == 0
    assert {path.name for path in folder.glob('*checkpoint-*')} == {'checkpoint-0.pth.tar', 'checkpoint-2.pth.tar'}
    first, kept, last = (
        torch.load(folder / name, weights_only=True)
        for name in ('checkpoint-0.pth.tar', 'checkpoint-2.pth.tar', 'last.pth.tar'))
    assert (first['epoch'], kept['epoch'], last['epoch']) == (0, 2, 2) and 'optimizer' not in kept
    for key in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(value, last[key][name]) for name, value in kept[key].items())
        assert not all(torch.equal(value, first[key][name]) for name, value in kept[key].items())
