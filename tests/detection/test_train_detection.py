"""Detection training: steps, evaluation, resuming, and errors of one line."""
import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from programs import ROOT, load, refused

example = load('examples/train_detection')
TINY = ['--epochs', '2', '--batch-size', '3', '--out-channels', '32', '--returned-layers', '3', '4',
        '--min-size', '64', '--max-size', '64', '--workers', '0', '--eval-interval', '1', '--device', 'cpu']


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    """Return the folder of a data set, and the folder of a finished run on it."""
    folder = tmp_path_factory.mktemp('scenes')
    data = load('examples/digit_scenes').make(folder / 'data', train=7, val=3, size=64)
    assert example.main(finished(data, folder / 'run')) == 0
    return data, folder / 'run'


@pytest.fixture
def data(scenes, tmp_path):
    return shutil.copytree(scenes[0], tmp_path / 'data')


def finished(data, output, *more):
    """Return the arguments of a run of one epoch."""
    words = ['--data-path', data, '--output', output, *TINY, '--epochs', '1', '--warmup-epochs', '0', *more]
    return list(map(str, words))


def state(folder):
    return torch.load(folder / 'last.pth', weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return a == b if not isinstance(a, (list, tuple)) else len(a) == len(b) and all(map(same, a, b))


# --- a run ---


@pytest.mark.parametrize(('detector', 'more'), [
    ('fcos', ['--amp', '--hflip', '0.5']), ('fasterrcnn', ['--opt', 'sgd', '--lr', '0.01', '--grad-checkpointing']),
    ('retinanet', ['--extra-levels', 'p6p7', '--sched', 'multistep', '--milestones', '1'])])
def test_a_run_leaves_rows_checkpoint_and_picture(data, tmp_path, capsys, detector, more):
    output = tmp_path / 'run'
    assert example.main(
        ['--data-path', str(data), '--output', str(output), '--detector', detector, *more, *TINY]) == 0
    assert sorted(path.name for path in output.iterdir()) == ['detections.png', 'last.pth', 'metrics.json']
    rows = json.loads((output / 'metrics.json').read_text())
    assert [row['epoch'] for row in rows] == [1, 2]
    assert all(0 < row['loss'] < 100 and {'AP', 'AP50', 'AR 100'} <= set(row) for row in rows)
    assert Image.open(output / 'detections.png').size[0] > 1000
    printed = capsys.readouterr().out
    assert '7 training images, 3 validation images, 10 classes, 2 steps an epoch' in printed
    assert printed.count('AP50') == 2 and str(output / 'detections.png') in printed


def test_a_resumed_run_ends_in_the_same_bits(data, tmp_path, monkeypatch, capsys):
    straight, stopped = tmp_path / 'straight', tmp_path / 'stopped'
    argv = ['--data-path', str(data), *TINY]
    assert example.main([*argv, '--output', str(straight)]) == 0

    save = example.Run.save

    def interrupted(run):
        save(run)
        raise KeyboardInterrupt
    monkeypatch.setattr(example.Run, 'save', interrupted)
    line = refused(example.main, capsys, *argv, '--output', stopped, code=130)
    assert line == 'train_detection.py: interrupted; --resume continues after the last saved epoch'
    assert len(state(stopped)['rows']) == 1
    monkeypatch.setattr(example.Run, 'save', save)
    torch.manual_seed(123)
    assert example.main([*argv, '--output', str(stopped), '--resume']) == 0
    first, second = state(straight), state(stopped)
    for key in ('model', 'optimizer', 'settings'):
        assert same(first[key], second[key]), key
    figures = [[{**row, 'seconds': 0} for row in found['rows']] for found in (first, second)]
    assert figures[0] == figures[1]


def test_training_lowers_the_loss(data, tmp_path):
    example.main(['--data-path', str(data), '--output', str(tmp_path / 'run'), *TINY, '--epochs', '7',
                  '--eval-interval', '7'])
    rows = state(tmp_path / 'run')['rows']
    assert rows[-1]['loss'] < 0.8 * rows[0]['loss']
    assert [row['epoch'] for row in rows if 'AP' in row] == [7]


def make_run(data, tmp_path, *argv):
    args = ['--data-path', str(data), '--output', str(tmp_path / 'run'), *TINY, *argv]
    return example.Run(example.create_parser().parse_args(args), example.DistributedContext.from_environment())


def test_radii_are_in_their_range_after_a_step(data, tmp_path):
    run = make_run(data, tmp_path)
    radii = [param for name, param in run.model.named_parameters() if name.endswith('.radius')]
    with torch.no_grad():
        for radius in radii:
            radius.fill_(5.)
    run.train_step(*next(iter(run.loader)))
    assert radii and all(radius.max() <= 1 for radius in radii)


def test_every_epoch_has_an_order_of_its_own(data, tmp_path, monkeypatch):
    run = make_run(data, tmp_path)
    seen = []

    def note(images, targets):
        seen.extend(target['image_id'] for target in targets)
        return torch.zeros(())
    monkeypatch.setattr(run, 'train_step', note)
    for epoch in (0, 1, 0):
        run.train_epoch(epoch)
    first, second, again = (seen[start:start + 6] for start in (0, 6, 12))
    assert first == again != second
    assert all(len(set(order)) == 6 and set(order) <= set(range(1, 8)) for order in (first, second))


# --- what goes wrong ---


def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(example.DETECTORS, 'fcos', lambda *args, **kwargs: _Broken())
    line = refused(example.main, capsys, '--data-path', data, '--output', tmp_path / 'run', *TINY, code=1)
    assert 'error: the loss is not finite: nan for images [' in line
    assert not (tmp_path / 'run' / 'last.pth').exists()


class _Broken(torch.nn.Conv2d):
    def __init__(self):
        super().__init__(1, 1, 1)

    def forward(self, images, targets):
        return {'loss': self.weight.sum() * float('nan')}


@pytest.mark.parametrize(('argv', 'line'), [
    (['--returned-layers', '4', '5'], r'smpconv_nano lacks a stage of returned_layers=[4, 5]'),
    (['--backbone', 'smpconv_x'], "timm's name of a network"),
    (['--trainable-layers', '9'], 'trainable_layers must lie in [0, 5]'),
    (['--out-channels', '48'], 'num_channels (48) must be divisible by num_groups (32)'),
    (['--detector', 'fasterrcnn', '--returned-layers', '2', '4'], 'twice the stride of the previous one'),
    (['--batch-size', '99'], 'a step needs 99 training images, got 7'),
    (['--warmup-epochs', '2'], '--warmup-epochs must be below the 2 epochs, got 2'),
    (['--min-size', '65'], '--min-size must be at most --max-size, got 65 and 64'),
    (['--opt', 'sdg'], 'sdg'),
    (['--device', 'tpu9'], 'tpu9'),
    (['--train-split', 'train2017'], 'instances_train2017.json'),
    (['--resume'], 'cannot resume: '),
    (['--epochs', '0'], 'argument --epochs: must be at least 1'),
    (['--lr', 'nan'], 'argument --lr'),
    (['--milestones', '3'], '--sched multistep'), (['--sched', 'multistep', '--milestones', '11', '8'], 'ascending'),
    (['--pretrained'], '--backbone smpconv_nano'), (['--backbone', 'smpconv_nano.nope'], 'smpconv_nano.nope'),
])
def test_wrong_arguments_are_one_line_before_anything_is_written(data, tmp_path, capsys, argv, line):
    error = refused(example.main, capsys, '--data-path', data, '--output', tmp_path / 'run', *TINY, *argv)
    assert error.startswith('train_detection.py: error: ') and line in error
    assert not (tmp_path / 'run').exists()


def test_a_wrong_record_is_one_line_before_training(data, tmp_path, capsys):
    path = data / 'annotations' / 'instances_val.json'
    content = json.loads(path.read_text())
    content['annotations'][0]['bbox'][2] = 0
    path.write_text(json.dumps(content))
    argv = ['--data-path', data, '--output', tmp_path / 'run', *TINY]
    assert 'annotation 1: bbox must have an area' in refused(example.main, capsys, *argv)
    assert example.main([*map(str, argv), '--skip-empty-boxes']) == 0
    assert 'skipped annotations without an area: 0 and 1' in capsys.readouterr().out


@pytest.mark.parametrize('workers', ['0', '1'])
def test_an_image_that_is_cut_off_is_named(data, tmp_path, capsys, workers):
    for path in (data / 'train').iterdir():
        path.write_bytes(path.read_bytes()[:3000])  # the header, which is validated first, is complete
    argv = ['--data-path', data, '--output', tmp_path / 'run', *TINY, '--workers', workers]
    error = refused(example.main, capsys, *argv, code=1)
    assert 'image ' in error and '.png cannot be read: ' in error


def test_an_error_of_the_data_set_is_raised_as_it_is():
    class Refusing(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise OSError(5, 'the disk failed', 'a.png')

    with pytest.raises(OSError, match=r'the disk failed') as found:
        list(example.Loader(Refusing(), num_workers=1))
    assert found.value.errno == 5 and found.value.filename == 'a.png'


@pytest.mark.parametrize('argv, missing, text', [
    ([], ['pycocotools', 'matplotlib'],
     "packages are missing: matplotlib, pycocotools; pip install '.[detection]' installs them"),
    ([], ['sklearn'], 'packages are missing: sklearn;'),
    (['--backbone', 'smpconv_x'], [], 'smpconv_x'), (['--opt', 'nothing'], [], 'nothing'),
    (['--backbone', 'smpconv_nano', '--pretrained'], [], '--backbone smpconv_nano: '),
])
def test_what_is_missing_is_named_before_the_scenes_are_made(
        tmp_path, capsys, monkeypatch, argv, missing, text):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    assert text in refused(example.main, capsys, '--output', tmp_path / 'run', '--device', 'cpu', *argv)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('gone', ['val', 'annotations/instances_val.json'])
def test_a_missing_split_is_named_before_the_other_is_validated(
        data, tmp_path, capsys, monkeypatch, gone):
    monkeypatch.setattr(example, 'CocoFolder', None)
    (data / gone).rename(tmp_path / 'gone')
    error = refused(example.main, capsys, '--data-path', data, '--output', tmp_path / 'run', *TINY)
    assert error.startswith(f'train_detection.py: error: {data / gone} does not exist: ')


def test_categories_of_both_splits_must_agree(data, tmp_path, capsys):
    path = data / 'annotations' / 'instances_val.json'
    content = json.loads(path.read_text())
    content['categories'][3]['name'] = 'drei'
    path.write_text(json.dumps(content))
    error = refused(example.main, capsys, '--data-path', data, '--output', tmp_path / 'run', *TINY)
    assert 'train and val must have the same categories' in error and "(4, 'drei')" in error


def test_a_finished_run_is_left_as_it_is(scenes, capsys):
    before = (scenes[1] / 'last.pth').read_bytes()
    assert f'{scenes[1]} has a run: give --resume' in refused(example.main, capsys, *finished(*scenes))
    assert example.main(finished(*scenes, '--resume')) == 0
    assert (scenes[1] / 'last.pth').read_bytes() == before


@pytest.mark.parametrize('more, message', [
    (['--detector', 'retinanet'], 'last.pth was trained with detector fcos, got retinanet'),
    (['--trainable-layers', '1'], 'was trained with trainable_layers None, got 1'),
    (['--weight-decay', '0.5'], 'was trained with weight_decay '), (['--epochs', '5'], 'was trained with epochs '),
    (['--amp'], 'was trained with amp '), (['--lr', '1'], 'was trained with lr '),
])
def test_a_run_resumes_with_its_own_settings(scenes, capsys, more, message):
    assert message in refused(example.main, capsys, *finished(*scenes, '--resume', *more))


def cut_off(path, state):
    path.write_bytes(path.read_bytes()[:1000])


def changed(change):
    def write(path, state):
        change(state)
        torch.save(state, path)
    return write


@pytest.mark.parametrize('damage', [
    cut_off, *map(changed, (
        lambda state: state.pop('settings'), lambda state: state.pop('rows'), lambda state: state.update(optimizer={}),
        lambda state: state['model'].popitem(), lambda state: state['settings'].pop('opt'),
        lambda state: state.update(rows=3)))])
def test_a_foreign_checkpoint_is_one_line(scenes, tmp_path, capsys, damage):
    data, run = scenes
    copy = shutil.copytree(run, tmp_path / 'run')
    damage(copy / 'last.pth', state(copy))
    error = refused(example.main, capsys, *finished(data, copy, '--resume'))
    assert 'last.pth' in error and (damage is cut_off or 'is not a checkpoint of this program' in error)


def test_a_gradient_that_is_not_finite_changes_nothing(data, tmp_path):
    run = make_run(data, tmp_path)
    next(iter(run.model.parameters())).register_hook(lambda gradient: gradient * float('inf'))
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(FloatingPointError, match='the gradient is not finite'):
        run.train_step(*next(iter(run.loader)))
    parameters = dict(run.model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in parameters.items())


def test_options_reach_what_they_are_for(data, tmp_path):
    run = make_run(data, tmp_path, '--min-size', '64', '--max-size', '96', '--hflip', '0.25')
    assert run.model.transform.min_size == (64,) and run.model.transform.max_size == 96
    assert any(getattr(step, 'p', None) == 0.25 for step in run.train_data.augment.transforms)
    scales = {group.get('lr_scale', 1.) for group in run.optimizer.param_groups}
    decays = {group['weight_decay'] for group in run.optimizer.param_groups}
    assert scales == {1., 0.1} and decays == {0., 0.05}


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / 'last.pth'
    path.write_text('old')

    def write(part):
        part.write_text('half')
        raise OSError('no space')
    with pytest.raises(OSError, match='no space'):
        example.replace(path, write)
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
    with open(path) as before:
        example.replace(path, lambda part: part.write_text('new'))
        assert before.read() == 'old'  # it is another file that has taken the name
    assert path.read_text() == 'new'


# --- slow ---


def launch(*argv, processes=1):
    command = [sys.executable]
    if processes > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)]
    return subprocess.run(
        [*command, *map(str, argv)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)})


@pytest.mark.slow  # two processes start in half a minute
@pytest.mark.timeout(600)
def test_two_processes_train_one_network_and_evaluate_all_images(data, tmp_path):
    output = tmp_path / 'run'
    argv = ['--data-path', data, '--output', output, *TINY]
    done = launch(ROOT / 'examples' / 'train_detection.py', *argv, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('epoch     loss') == 1 and '1 steps an epoch' in done.stdout
    # one process finds the same in the same weights
    run = make_run(data, tmp_path, '--resume')
    assert run.evaluate() == pytest.approx({name: run.rows[-1][name] for name in example.coco_folder.METRICS})
    wrong = launch(ROOT / 'examples' / 'train_detection.py', *argv, processes=2)
    assert wrong.returncode and wrong.stderr.count('has a run') == 2 and 'Traceback' not in wrong.stdout


@pytest.mark.slow  # ten minutes, as a user would run it
@pytest.mark.timeout(3600)
def test_the_default_run_finds_the_digits(tmp_path):
    done = launch(ROOT / 'examples' / 'train_detection.py', '--output', tmp_path / 'run')
    assert done.returncode == 0, done.stderr
    row = state(tmp_path / 'run')['rows'][-1]
    assert row['AP50'] >= 0.8
    assert f'{row["AP50"]:.3f}' in done.stdout
    assert (tmp_path / 'run' / 'detections.png').exists()


@pytest.mark.slow  # four steps of 15 s, and a process of its own to be measured
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(('argv', 'steps'), [([], 1), (['--grad-checkpointing'], -1)], ids=['kept', 'computed again'])
def test_memory_of_detection_size_images(tmp_path, argv, steps):
    benchmark = 'import sys, measure, pathlib; measure.RESULTS = pathlib.Path(sys.argv.pop(1)); ' \
                'import detection_memory; detection_memory.main()'
    done = subprocess.run(
        [sys.executable, '-c', benchmark, str(tmp_path), *argv], capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': f'{ROOT}:{ROOT / "benchmarks"}'})
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / 'detection_memory.jsonl').read_text())
    assert row['peak_gib'][steps] * 2 ** 30 < 4e9
    assert row['peak_gib'][1] > row['peak_gib'][0] + 0.5  # it was a step


@pytest.mark.filterwarnings('error')  # matplotlib warns of missing glyphs
def test_a_picture_has_class_names_in_any_script(tmp_path):
    boxes = {'boxes': torch.tensor([[2., 2., 9., 9.]]), 'labels': torch.tensor([1]), 'scores': torch.ones(1)}
    sample = torch.zeros(3, 16, 16), boxes, boxes
    load('examples/detection_picture').save_detections(tmp_path / 'a.png', [sample], ['background', '\u732b'])
    assert (tmp_path / 'a.png').exists()
