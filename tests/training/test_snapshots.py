"""Weights that a run keeps of its epochs."""
import pytest
import torch
from launch import TINY
from made import make_folder

import train


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
