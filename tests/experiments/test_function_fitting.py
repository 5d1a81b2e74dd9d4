"""Function fitting: the three arms, and the files with the results."""
import contextlib
import csv
import io
import math

import pytest
import torch
from PIL import Image
from programs import load, refused

from smpconv_models.layers import evaluate_points, sampling_grid

script = load('experiments/function_fitting')
TINY = ['--steps', '3', '--seeds', '2', '--points', '20']


def fit(arm, steps=3, seed=0, points=20, target='varying', **changes):
    setting = script.SETTINGS[target, arm]._replace(**changes)
    values = script.TARGETS[target](sampling_grid([51, 51]))
    return script.fit(values, script.initial_coords(points, seed), arm, setting, steps)


def rows_in(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


# --- the functions and the points ---


def test_functions_have_the_orientation_of_the_grid():
    for name, at in (('uniform', lambda t: t), ('varying', lambda t: (t + 1) ** 2 / 2 - 1)):
        values = script.TARGETS[name](sampling_grid([51, 51])).unflatten(0, (51, 51))
        for row, column in ((0, 0), (50, 0), (7, 31), (30, 12)):
            x, y = -1 + column / 25, 1 - row / 25
            expected = math.sin(3 * math.pi * at(x)) * math.sin(3 * math.pi * at(y))
            assert values[row, column].item() == pytest.approx(expected, abs=1e-5)  # sines of float32 up to 3 pi
    assert values[45:, :5].abs().max() < 0.05 < values[:5, 45:].abs().max()  # slow at the lower left


def test_points_cover_the_square():
    coords = script.initial_coords(204, seed=3)
    assert coords.shape == (204, 2) and coords.min() >= -1 and coords.max() < 1
    cells = ((coords + 1) * 3.5).long()
    counts = torch.bincount(cells[:, 0] * 7 + cells[:, 1], minlength=49)  # 4.2 in a cell
    assert counts.min() >= 2 and counts.max() <= 7
    assert torch.equal(coords, script.initial_coords(204, seed=3))
    assert not torch.equal(coords, script.initial_coords(204, seed=4))


# --- the arms ---


def test_each_arm_trains_its_parameters():
    start = script.initial_coords(20, 0)
    radius = {arm: script.SETTINGS['varying', arm].relative_radius * 2 / math.sqrt(20) for arm in script.TRAINED}
    changed = {}
    for arm in script.TRAINED:
        done = fit(arm)
        changed[arm] = [
            not torch.equal(done.coords, start), bool((done.radius != torch.tensor(radius[arm])).any()),
            bool(done.weights.any())]
    assert changed == {
        'moving': [True, True, True], 'fixed': [False, True, True], 'weights alone': [False, False, True]}


def test_arguments_are_not_modified():
    start, values = script.initial_coords(20, 0), script.uniform(sampling_grid([51, 51]))
    script.fit(values, start, 'moving', script.SETTINGS['uniform', 'moving'], 2)
    assert torch.equal(start, script.initial_coords(20, 0)) and not start.requires_grad


def test_both_arms_start_at_the_same_points_and_at_zero():
    moving, fixed = (fit(arm, relative_radius=2.) for arm in ('moving', 'fixed'))
    values = script.varying(sampling_grid([51, 51]))
    assert moving.errors[0] == fixed.errors[0] == values.square().mean()
    still = fit('moving', relative_radius=2., lr=0., position_lr=0.)
    assert torch.equal(still.coords, fixed.coords)


@pytest.mark.parametrize('arm', ['moving', 'fixed', 'weights alone'])
def test_the_last_error_belongs_to_the_returned_points(arm):
    done = fit(arm, steps=5)
    assert len(done.errors) == (1 if arm == 'weights alone' else 6)
    fitted = evaluate_points(sampling_grid([51, 51]), done.coords, done.radius, done.weights, normalize=True)[0]
    error = (fitted - script.varying(sampling_grid([51, 51]))).square().mean()
    assert done.rmse == pytest.approx(error.sqrt().item(), rel=1e-4)  # least squares are in float64


def test_radii_stay_in_their_range():
    radius = fit('fixed', steps=4, position_lr=3.).radius
    assert radius.min().item() == pytest.approx(0.04) and radius.max() == 1


def test_no_training_of_the_weights_beats_least_squares():
    trained = fit('fixed', steps=40, relative_radius=2., position_lr=0.)
    solved = fit('weights alone', relative_radius=2.)
    assert solved.rmse < trained.rmse < 1.5 * solved.rmse


@pytest.mark.parametrize('target', ['uniform', 'varying'])
def test_moving_beats_fixed(target):
    """With half the points and a tenth of the steps; the ratio was 0.40 to 0.67 over five seeds."""
    fixed, moving = (
        fit(arm, steps=60, points=100, target=target, relative_radius=2., lr=0.3, position_lr=0.03).rmse
        for arm in ('fixed', 'moving'))
    assert moving < 0.85 * fixed


def test_psnr():
    assert script.psnr(2.) == 0 and script.psnr(0.2) == pytest.approx(20)


# --- the command ---


@pytest.fixture(scope='module')
def tiny_run(tmp_path_factory):
    """Output folder and printed text of a small run."""
    out, printed = tmp_path_factory.mktemp('tiny') / 'new' / 'out', io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert script.main([*TINY, '--output', str(out)]) == 0
    return out, printed.getvalue()


def test_files_are_complete(tiny_run):
    out, printed = tiny_run
    assert sorted(path.name for path in out.iterdir()) == sorted(script.FILES)
    rows = rows_in(out / 'function_fitting.csv')
    assert [(row['target'], row['arm'], row['seed']) for row in rows] == [
        (target, arm, seed) for target in ('uniform', 'varying') for arm in ('moving', 'fixed', 'weights alone')
        for seed in '01']
    assert {(row['points'], row['steps'], row['torch']) for row in rows} == {('20', '3', torch.__version__)}
    row, other = rows[7], rows[9]
    done = fit('moving', seed=1)
    assert float(row['rmse']) == done.rmse and float(row['mse']) == done.errors[-1].item()
    assert float(other['rmse_over_moving']) == float(other['rmse']) / float(row['rmse'])
    text = (out / 'function_fitting.md').read_text()
    mean = sum(float(row['rmse']) for row in rows[6:8]) / 2
    line, = [line for line in text.splitlines() if line.startswith('| varying | moving |')]
    assert f'| {mean:.4f} ± ' in line and 'coordinates, radii, weights' in line
    assert '--steps 3 --seeds 2 --points 20 --device cpu' in text
    with Image.open(out / 'function_fitting.png') as picture:
        assert picture.format == 'PNG' and picture.width > 1000
    assert line.split('|')[1:4] == printed.splitlines()[5].split('|')[1:4]


def test_the_table_is_reproducible(tiny_run, tmp_path, monkeypatch):
    """Up to the last digits, which in least squares depend on where the memory of a matrix begins."""
    monkeypatch.setattr(script, 'save_picture', lambda *args: None)
    script.main([*TINY, '--output', str(tmp_path)])
    for got, expected in zip(rows_in(tmp_path / script.FILES[0]), rows_in(tiny_run[0] / script.FILES[0]), strict=True):
        for key in ('mse', 'rmse', 'psnr', 'rmse_over_moving'):
            assert float(got.pop(key)) == pytest.approx(float(expected.pop(key)), rel=1e-9)
        assert got == expected


def test_sweep_tries_every_setting_on_an_unreported_seed(monkeypatch, capsys, tmp_path):
    seeds, original = [], script.initial_coords
    monkeypatch.setattr(script, 'initial_coords', lambda points, seed: seeds.append(seed) or original(points, seed))
    monkeypatch.chdir(tmp_path)
    assert script.main(['--sweep', '--steps', '1', '--points', '9']) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert set(seeds) == {script.TUNING_SEED} and len(lines) == len(seeds) == 2 * (24 + 24 + 7)
    assert len(set(lines)) == len(lines) and not list(tmp_path.iterdir())


def test_settings_are_of_the_sweep():
    assert list(script.SETTINGS) == [(target, arm) for target in script.TARGETS for arm in script.TRAINED]
    for (_, arm), setting in script.SETTINGS.items():
        assert setting in script.settings_of(arm)


def test_invalid_arguments_are_one_line_and_leave_no_files(tmp_path, capsys, monkeypatch):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'taken' / 'function_fitting.md').mkdir(parents=True)
    before = sorted(tmp_path.rglob('*'))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(script, 'fit', lambda *args: pytest.fail('it worked'))
    for arguments, message in (
            (('--steps', '0'), '--steps must be 1 to 1000000, got 0'), (('--seeds', '1001'), 'got 1001'),
            (('--points', '2602'), '--points must be 1 to 2601, got 2602'), (('--steps', 'x'), "'x'"),
            (('--device', 'cuda'), 'finds no such device'), (('--device', 'tpu'), "'tpu'"), (('--step', '1'), '--step'),
            (('--output', tmp_path / 'file'), str(tmp_path / 'file')), (('--output', tmp_path / 'taken'), 'a folder')):
        line = refused(
            script.main, capsys, '--output', tmp_path / 'out', *arguments)
        assert line.startswith('function_fitting.py: error: ') and message in line
    assert sorted(tmp_path.rglob('*')) == before


def test_interrupted_in_one_line(tmp_path, capsys, monkeypatch):
    original, calls = script.fit, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(script, 'fit', interrupted)
    line = refused(script.main, capsys, *TINY, '--output', tmp_path, code=130)
    assert line == 'function_fitting.py: interrupted'
    assert not list(tmp_path.iterdir())
