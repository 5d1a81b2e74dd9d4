"""Runs that were stopped and go on."""
import argparse
import functools
import json
import math
import random
import shutil
import signal
from pathlib import Path

import programs
import pytest
import torch
from common import one_line_error
from launch import EVERYTHING, TINY, differences, finish, start, stop, wait_for_step
from programs import ROOT
from test_data import make_folder

import train
import validate
from smpconv_models.training.checkpointing import RunDir, check_content
from smpconv_models.training.train_step import TrainStep

pytestmark = pytest.mark.usefixtures('no_pictures')
run = functools.partial(programs.run, train.main)
refused = functools.partial(programs.refused, train.main)


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """The folder of an unbroken run."""
    output = tmp_path_factory.mktemp('straight')
    assert run(*EVERYTHING, '--output', output, '--experiment', 'run') == 0
    return output / 'run'


def test_a_run_of_before_the_options_were_renamed_is_resumed_and_evaluated(tmp_path, capsys):
    """A checkpoint of an older version, stopped in its second epoch."""
    (tmp_path / 'run').mkdir()
    path = shutil.copy(ROOT / 'tests/golden/stopped_run.pth.tar', tmp_path / 'run/last.pth.tar')
    assert validate.main(['--checkpoint', str(path), '--workers', '0']) == 0
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (evaluated['images'], evaluated['weights'], evaluated['img_size']) == (360, 'state_dict_ema', 8)
    then = [word for word in EVERYTHING if word != '--balance-classes']  # which did not exist
    command = [*then, '--random-crop-pad', 2, '--save-interval', 5, '--max-nonfinite-steps', 7]
    assert run(*command, '--output', tmp_path, '--experiment', 'run') == 0
    printed = capsys.readouterr().out
    assert f'resuming from {path}: epoch 1, step 5' in printed and 'changed since' not in printed
    state = torch.load(path, weights_only=True)
    assert state['progress']['epoch'] == 2 and state['args']['random_crop_pad'] == 2


def resumed(path, capsys):
    return f'resuming from {path / "last.pth.tar"}' in capsys.readouterr().out


@pytest.mark.parametrize('number, code, workers, images', [
    # of 1437 images 11 steps of 128 take 1408; both weights see 360
    (signal.SIGTERM, 143, 0, 1408 + 720 + 500), (signal.SIGINT, 130, 2, 1408 + 720 + 500),
    pytest.param(signal.SIGTERM, 143, 0, 1408 + 130, marks=pytest.mark.slow),  # in an evaluation, which is repeated
])
def test_a_stopped_run_ends_in_the_same_bits(straight, tmp_path, capsys, signal_at, workers, number, code, images):
    """Stopped in the second epoch, in a step whose images come from DataLoader workers after it."""
    command = [*EVERYTHING, '--output', tmp_path, '--experiment', 'run']
    signal_at(number, images)
    assert run(*command) == code
    told = capsys.readouterr().err
    assert told == (
        f'train.py: stopped by {signal.Signals(number).name}; the same command resumes the run; '
        f'the files of the run are in {tmp_path}/run\n')
    progress = torch.load(tmp_path / 'run/last.pth.tar', weights_only=True)['progress']
    if images < 1408 + 720:
        assert (progress['epoch'], progress['step'], progress['rows']) == (0, 11, [])
    else:
        assert progress['epoch'] == 1 and 0 < progress['step'] < 11
    assert run(*command, '--workers', workers) == 0
    assert differences(straight, tmp_path / 'run') == []
    assert (tmp_path / 'run/summary.csv').read_text().count('epoch') == 1


def test_a_finished_run_is_left_as_it_is(straight, capsys):
    before = {path.name: path.read_bytes() for path in straight.iterdir()}
    assert run(*EVERYTHING, '--output', straight.parent, '--experiment', 'run') == 0
    told = capsys.readouterr().out
    assert 'the run is finished already' in told and 'best checkpoint' in told
    assert {path.name: path.read_bytes() for path in straight.iterdir()} == before


@pytest.mark.slow  # 7 s: three runs
def test_a_finished_run_is_resumed_with_more_epochs_and_is_no_other_run(straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / 'run')
    command = [*EVERYTHING, '--output', tmp_path, '--experiment', 'run']
    line = refused(capsys, *command, '--lr', 1e-3)
    assert 'is finished, and this is another one: lr 0.004 -> 0.001; choose another --experiment' in line
    assert run(*command, '--epochs', 3) == 0
    assert (tmp_path / 'run/summary.csv').read_text().splitlines()[:3] == (
        straight / 'summary.csv').read_text().splitlines()
    assert 'epochs 2 -> 3' in capsys.readouterr().out


@pytest.fixture(scope='module')
def half(tmp_path_factory):
    output = tmp_path_factory.mktemp('half')
    assert run(*EVERYTHING, '--output', output, '--experiment', 'run', '--epochs', 1) == 0
    return output / 'run'


@pytest.fixture
def begun(half, tmp_path):
    """A run that has one of its two epochs left."""
    folder = shutil.copytree(half, tmp_path / 'output' / 'run')
    return [*EVERYTHING, '--output', folder.parent, '--experiment', 'run'], folder


def test_what_may_change_is_reported_and_applied(begun, capsys):
    """A step may also be divided otherwise."""
    command, folder = begun
    assert run(*command, '--lr', 1e-3, '--weight-decay', 0.1, '--smoothing', 0.2, '--batch-size', 32) == 0
    told = capsys.readouterr().out
    assert 'global_batch_size' not in told and all(text in told for text in (
        'lr 0.004 -> 0.001', 'weight_decay 0.05 -> 0.1', 'smoothing 0.1 -> 0.2', 'epochs 1 -> 2',
        'batch_size 64 -> 32'))
    groups = torch.load(folder / 'last.pth.tar', weights_only=True)['optimizer']['param_groups']
    assert {group['initial_lr'] for group in groups} == {1e-3}
    assert {group['weight_decay'] for group in groups} == {0., 0.1}


@pytest.mark.parametrize('change, told', [
    (['--seed', 1], 'seed 42 -> 1'),
    (['--opt', 'sgd'], "opt 'adamw' -> 'sgd'"),
    (['--global-batch-size', 64], 'global_batch_size 128 -> 64'),
    (['--model', 'smpconv_mobile31', '--model-kwargs', 'depths=(1,1)', 'dims=(4,8)', 'kernel_sizes=(7,5)'],
     "model 'smpconv_nano' -> 'smpconv_mobile31'"),
])
def test_what_must_not_change_is_refused(begun, capsys, change, told):
    command, folder = begun
    before = (folder / 'last.pth.tar').read_bytes()
    line = refused(capsys, *command, *change)
    assert told in line and '--experiment' in line and '--force-resume' in line
    assert (folder / 'last.pth.tar').read_bytes() == before


@pytest.mark.slow  # 9 s each: three runs
@pytest.mark.parametrize('option, told', [
    (['--global-batch-size', 64], 'global_batch_size 128 -> 64'),
    (['--layer-decay', 0.5], 'layer_decay 0.9 -> 0.5'),  # the optimizer has other groups, and a fresh state
])
def test_a_change_can_be_forced(begun, capsys, option, told):
    command, folder = begun
    assert run(*command, *option, '--force-resume') == 0
    assert told in capsys.readouterr().out
    assert len((folder / 'summary.csv').read_text().splitlines()) == 3
    steps = torch.load(folder / 'last.pth.tar', weights_only=True)['optimizer']['state'][0]['step']
    assert steps == (11 if option[0] == '--layer-decay' else 11 + 22)


@pytest.mark.slow  # half precision has no fast path on a CPU
def test_the_scale_of_half_precision_is_resumed(tmp_path):
    command = [
        *TINY, '--dataset', 'digits', '--in-chans', 1, '--img-size', 8, '--warmup-epochs', 0, '--batch-size', 512,
        '--amp', '--output', tmp_path]
    assert run(*command, '--epochs', 1) == 0
    path = tmp_path / 'smpconv_nano/last.pth.tar'
    state = torch.load(path, weights_only=True)
    assert state['amp_scaler']['scale'] > 0
    state['amp_scaler']['scale'] = 512.
    torch.save(state, path)
    assert run(*command, '--epochs', 2) == 0
    assert torch.load(path, weights_only=True)['amp_scaler']['scale'] in (512., 256., 128.)


def test_images_are_not_mixed_from_the_epoch_asked_for(tmp_path, monkeypatch):
    seen = []
    step = TrainStep.step

    def watched(self, batches, number, stop):
        seen.append(self.mixup.mixup_enabled)
        return step(self, batches, number, stop)

    monkeypatch.setattr(TrainStep, 'step', watched)
    command = [
        *TINY, '--dataset', 'digits', '--in-chans', 1, '--img-size', 8, '--warmup-epochs', 0, '--batch-size', 512,
        '--mixup', 0.5, '--mixup-off-epoch', 1, '--epochs', 2, '--output', tmp_path]
    assert run(*command) == 0
    assert seen == [True, True, False, False]


def test_other_classes_and_other_images_are_refused(tmp_path, capsys):
    folder = make_folder(tmp_path / 'data')
    command = [
        *TINY, '--data-dir', folder, '--batch-size', 2, '--warmup-epochs', 0, '--img-size', 16, '--output', tmp_path,
        '--experiment', 'run']
    assert run(*command, '--epochs', 1) == 0
    for split in ('train', 'val'):
        (folder / split / 'dog').rename(folder / split / 'eagle')
    (folder / 'train/cat/0.png').unlink()
    line = refused(capsys, *command, '--epochs', 2)
    assert "only in the checkpoint ['dog'], only in the data set ['eagle']" in line
    assert 'training images 6 -> 5' in line


def test_runs_start_from_a_checkpoints_weights(straight, tmp_path, capsys):
    """The better ones of the model's and the EMA, as an evaluation would take."""
    first = Path(shutil.copy(straight / 'model_best.pth.tar', tmp_path / 'first.pth.tar'))
    command = [*EVERYTHING, '--output', tmp_path, '--initial-checkpoint', first]
    assert run(*command, '--lr', 1e-30, '--warmup-lr', 0, '--min-lr', 0, '--epochs', 1, '--warmup-epochs', 0) == 0
    weights = torch.load(tmp_path / 'smpconv_nano/last.pth.tar', weights_only=True)['state_dict']
    best = torch.load(straight / 'model_best.pth.tar', weights_only=True)
    expected = best[best['best_weights']]
    assert torch.equal(weights['head.fc.weight'], expected['head.fc.weight'])
    line = refused(capsys, *command, '--experiment', 'other', '--model', 'smpconv_mobile31')
    assert 'does not fit the model' in line and 'smpconv_nano' not in line  # its arguments make it no registered model
    assert not (tmp_path / 'other').exists()
    first.unlink()  # a run that resumes does not need it
    capsys.readouterr()
    assert run(*command, '--epochs', 2) == 0
    assert 'last.pth.tar: epoch 1, step 0' in capsys.readouterr().out


def test_a_checkpoint_that_is_removed_while_the_run_starts(tmp_path, capsys, monkeypatch):
    """The model was built without first weights then, as they are the checkpoint's."""
    (tmp_path / 'run').mkdir()
    path, acquire = tmp_path / 'run/last.pth.tar', RunDir.acquire
    path.write_bytes(b'a checkpoint')
    monkeypatch.setattr(RunDir, 'acquire', lambda self: (path.unlink(), acquire(self)))
    line = refused(capsys, *EVERYTHING, '--output', tmp_path, '--experiment', 'run')
    assert f'the checkpoint in {tmp_path}/run was removed while the run started; start it again' in line


def test_a_checkpoint_can_be_named(begun, tmp_path, capsys):
    command, folder = begun
    moved = shutil.copy(folder / 'last.pth.tar', tmp_path / 'elsewhere.pth.tar')
    assert run(*command, '--experiment', 'other', '--resume', moved) == 0
    assert f'resuming from {moved}: epoch 1, step 0' in capsys.readouterr().out
    Path(moved).unlink()
    assert run(*command, '--experiment', 'other', '--resume', moved) == 0  # the same command: not from there again
    assert 'other/last.pth.tar: the run is finished already' in capsys.readouterr().out
    line = refused(capsys, *command, '--experiment', 'third', '--resume', folder / 'model_best.pth.tar')
    assert 'has no run to resume; --initial-checkpoint takes its weights' in line
    state = torch.load(folder / 'last.pth.tar', weights_only=True)
    state['progress']['step'] = 10 ** 8
    torch.save(state, moved)
    line = refused(capsys, *command, '--experiment', 'third', '--resume', moved)
    assert f'{moved}: progress.step must be at most 11, got 100000000' in line
    assert not (folder.parent / 'third').exists()


# --- checkpoints that are damaged ---


@pytest.mark.parametrize('damage, told', [
    (lambda content: b'', 'is empty'),
    (lambda content: content[:len(content) // 2], 'is a truncated or damaged checkpoint'),
    (lambda content: b'<html>quota exceeded</html>', 'is an HTML or XML page'),
    (lambda content: b'version https://git-lfs.github.com/spec/v1\n', 'is a Git LFS pointer'),
])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(half, tmp_path, caplog, damage, told):
    """The run that resumes from the previous checkpoint keeps it when it saves for the first time."""
    folder = RunDir(tmp_path)
    good = (half / 'last.pth.tar').read_bytes()
    folder.previous.write_bytes(good)
    folder.last.write_bytes(damage(good))
    name, loaded = folder.load_latest()
    assert name == str(folder.previous) and loaded['progress']['epoch'] == 1 and not folder.last.exists()
    assert told in caplog.text and 'looking for an older one' in caplog.text
    folder.save(loaded)
    assert folder.previous.read_bytes() == good and folder.last.exists()


def test_results_without_a_checkpoint_are_not_overwritten(begun, capsys):
    command, folder = begun
    for name in ('last.pth.tar', 'previous.pth.tar'):
        (folder / name).unlink()
    before = (folder / 'model_best.pth.tar').read_bytes()
    assert 'has the results of a run but no last.pth.tar to resume from' in refused(capsys, *command)
    assert (folder / 'model_best.pth.tar').read_bytes() == before


def test_best_weights_that_are_lost_are_made_again_unless_the_run_is_finished(begun, capsys):
    command, folder = begun
    (folder / 'model_best.pth.tar').unlink()
    assert run(*command) == 0
    assert torch.load(folder / 'model_best.pth.tar', weights_only=True)['epoch'] == 1
    (folder / 'model_best.pth.tar').unlink()
    assert 'which was removed' not in capsys.readouterr().out
    assert run(*command) == 0
    assert f'best checkpoint: {folder / "model_best.pth.tar"}, which was removed' in capsys.readouterr().out


@pytest.mark.slow  # three runs for one optimizer
def test_state_in_the_optimizers_groups_is_resumed(tmp_path, signal_at):
    """Lookahead's counter, which is no option."""
    command = [*EVERYTHING, '--opt', 'lookahead_adamw', '--output', tmp_path]
    assert run(*command, '--experiment', 'straight') == 0
    signal_at(signal.SIGTERM, 1408 + 720 + 500)
    assert run(*command, '--experiment', 'broken') == 143
    assert run(*command, '--experiment', 'broken') == 0
    assert differences(tmp_path / 'straight', tmp_path / 'broken') == []


def test_without_a_whole_checkpoint_nothing_is_lost(begun, capsys):
    command, folder = begun
    for name in ('last.pth.tar', 'previous.pth.tar'):
        (folder / name).write_bytes(b'PK\x03\x04')
    line = refused(capsys, *command)
    assert 'last.pth.tar' in line and 'previous.pth.tar' in line and 'remove them to start from the beginning' in line
    assert (folder / 'summary.csv').exists()


@pytest.mark.slow  # 9 s: four runs
def test_a_flipped_bit_changes_nothing_unseen(straight, tmp_path):
    """It is refused, or lies where no content is."""
    path = shutil.copy(straight / 'last.pth.tar', tmp_path / 'last.pth.tar')
    content, draw = bytearray(path.read_bytes()), random.Random(0)
    expected = torch.load(path, weights_only=True)
    refused = 0
    for _ in range(150):
        position, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
        content[position] ^= bit
        path.write_bytes(content)
        content[position] ^= bit
        try:
            _, loaded = RunDir(tmp_path).load_latest()
        except ValueError:
            refused += 1
        else:
            assert loaded['progress'] == expected['progress'] and all(
                torch.equal(loaded['state_dict'][key], value) for key, value in expected['state_dict'].items())
    assert refused >= 75


# --- processes that are killed ---


@pytest.mark.slow  # those that are stopped and, of two processes, one that is killed, are in the default suite
def test_a_killed_run_ends_in_the_same_bits(straight, tmp_path):
    """SIGKILL, in whatever it did right after a step."""
    command = [*EVERYTHING, '--output', tmp_path, '--experiment', 'run', '--recovery-interval', 1]
    process, = start(command)
    wait_for_step(process, 1, 4)
    code, _, _ = stop(process)
    assert code == -signal.SIGKILL
    (code, out, error), = finish(start([*command, '--workers', 1]))
    assert code == 0, error
    assert f'resuming from {tmp_path / "run/last.pth.tar"}: epoch 1, step' in out
    assert differences(straight, tmp_path / 'run') == []


WRONG = [
    ('progress.epoch', lambda state: state['progress'].update(epoch='x')),
    ('progress.step', lambda state: state['progress'].update(step=-1)),
    ('progress.rows', lambda state: state['progress'].update(rows=[1])),
    ('progress.best_epoch', lambda state: state['progress'].update(best_epoch=10 ** 6)),
    ('progress.loss_sum', lambda state: state['progress'].update(loss_sum=torch.ones(2))),
    ('args.batch_size', lambda state: state['args'].update(batch_size=torch.ones(2))),
    ('args', lambda state: state['args'].update({5: 'x'})),
    ('args.global_batch_size', lambda state: state['args'].update(global_batch_size=0)),
    ('classes', lambda state: state.update(classes=5)),
    ('images', lambda state: state.update(images='x')),
    ('state_dict', lambda state: state['state_dict'].update({'norm.weight': [1.]})),
    ('not finite: norm.weight', lambda state: state['state_dict']['norm.weight'].fill_(math.nan)),
    ('optimizer', lambda state: state.update(optimizer=[1])),
    ('optimizer.param_groups', lambda state: state['optimizer']['param_groups'][0].update(params=[torch.ones(2)])),
    ('optimizer.state', lambda state: state['optimizer'].update(state={'a': 1})),
    ('optimizer.param_groups', lambda state: state['optimizer'].update(param_groups=[1])),
    ('amp_scaler', lambda state: state.update(amp_scaler={'scale': 'x'})),
]


def test_wrong_values_are_refused_and_the_previous_checkpoint_is_taken(begun, capsys):
    """Well-formed files with one value of another type."""
    command, folder = begun
    path = shutil.copy(folder / 'last.pth.tar', folder / 'previous.pth.tar')
    for field, change in WRONG:
        state = torch.load(path, weights_only=True)
        change(state)
        assert field in one_line_error(check_content, state, path)
    torch.save(state, folder / 'last.pth.tar')
    assert field in refused(capsys, *command, '--experiment', 'other', '--resume', folder / 'last.pth.tar')
    assert run(*command) == 0
    told = capsys.readouterr().out
    assert 'amp_scaler' in told and 'looking for an older one' in told
    assert f'resuming from {folder / "previous.pth.tar"}: epoch 1, step 0' in told
    assert torch.load(folder / 'last.pth.tar', weights_only=True)['progress']['epoch'] == 2


def test_arguments_may_be_a_namespace(straight, tmp_path, capsys):
    """As timm's script stores them."""
    shutil.copytree(straight, tmp_path / 'run')
    state = torch.load(straight / 'last.pth.tar', weights_only=True)
    state['args'] = argparse.Namespace(**state['args'])
    torch.save(state, tmp_path / 'run/last.pth.tar')
    assert run(*EVERYTHING, '--output', tmp_path, '--experiment', 'run') == 0
    assert 'the run is finished already' in capsys.readouterr().out
