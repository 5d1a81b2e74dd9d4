"""The path that training takes on a GPU alone: prefetching, half precision, compiling."""
import json

import pytest
import torch
from launch import TINY

pytest.importorskip('matplotlib', reason='the picture of a run is drawn with it')
pytest.importorskip('sklearn', reason='it has the digits')
import train
import validate

pytestmark = pytest.mark.gpu  # CI has none

COMMAND = [
    *TINY, '--dataset', 'digits', '--in-chans', '1', '--img-size', '16', '--warmup-epochs', '0', '--device', 'cuda',
    '--workers', '1', '--pin-mem', '--channels-last', '--reprob', '0.25', '--mixup', '0.2', '--model-ema']


@pytest.mark.parametrize('more', [
    ['--amp'], ['--amp', '--amp-dtype', 'bfloat16'], ['--no-prefetcher'], ['--torchcompile']], ids=' '.join)
def test_a_run_trains_stops_resumes_and_is_evaluated(tmp_path, capsys, more):
    command = [*COMMAND, *more, '--output', str(tmp_path), '--experiment', 'run']
    assert train.main([*command, '--epochs', '1']) == 0
    assert train.main([*command, '--epochs', '3']) == 0
    state = torch.load(tmp_path / 'run/last.pth.tar', weights_only=True)
    assert [row['epoch'] for row in state['progress']['rows']] == [0, 1, 2]
    assert state['progress']['rows'][-1]['train_loss'] < state['progress']['rows'][0]['train_loss']
    capsys.readouterr()
    assert validate.main(['--checkpoint', str(tmp_path / 'run/last.pth.tar'), '--device', 'cpu', '--workers', '0']) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert abs(result['top1'] - state['progress']['rows'][-1]['ema_top1']) < 2  # a few images, by rounding
