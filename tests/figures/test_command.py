"""Command line of `python -m smpconv_models.figures`."""
from pathlib import Path

import numpy as np
import programs
import pytest
import timm
import torch
from common import randomize_
from PIL import Image
from safetensors.torch import load_file

from smpconv_models import checkpoint, figures
from smpconv_models.figures.__main__ import main
from smpconv_models.models import create_sequence_model
from smpconv_models.prediction import inputs
from smpconv_models.training import Digits
from smpconv_models.training.batch_norm import recalibrate_bn_

TINY = dict(depths=(1, 1), dims=(4, 8), kernel_sizes=(7, 5), in_chans=1, num_classes=10)
LAYER = 'stages.1.blocks.0.mixer.large_kernel.large.conv'


def tiny(seed):
    return randomize_(timm.create_model('smpconv_nano', **TINY), seed).eval()


def save(path, seed, **more):
    """Save a checkpoint like those of train.py, of a network trained on the digits."""
    weights = tiny(seed).state_dict()
    torch.save({
        'state_dict': {name: torch.zeros_like(value) for name, value in weights.items()}, 'state_dict_ema': weights,
        'model_kwargs': TINY, 'classes': [f'class-{index}' for index in range(10)],
        'args': {'model': 'smpconv_nano', 'dataset': 'digits', 'mean': [0.3], 'std': [0.4], 'img_size': 16, 'seed': 3},
        **more,
    }, path)
    return path


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Folder of a run."""
    path = tmp_path_factory.mktemp('run')
    save(path / 'model_best.pth.tar', 0, epoch=9)
    for epoch in (10, 9, 0):
        save(path / f'checkpoint-{epoch}.pth.tar', epoch, epoch=epoch)
    return path


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command that must succeed; return the arguments of its plots, and the path of the file."""
    def call(command, *argv, name='out.png'):
        path = tmp_path / name
        assert main([command, '--output', str(path), *map(str, argv)]) == 0
        with Image.open(path) as picture:
            assert np.asarray(picture.convert('RGB')).std() > 5
        assert {file.name for file in tmp_path.iterdir() if not file.name.startswith('in')} == {name}
        return calls, path

    calls = []
    for name in figures.__all__:
        if name.startswith('save_'):
            function = getattr(figures, name)
            monkeypatch.setattr(figures, name, lambda *args, function=function: calls.append(args) or function(*args))
    return call


def test_kernels(run, folder):
    (call,), _ = run('kernels', '--checkpoint', folder, '--layer', LAYER, '--columns', 2)
    _, model, layers, _, columns, _ = call
    assert layers == [LAYER] and columns == 2
    expected = tiny(0).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())  # the EMA weights


def test_stages_before_and_after(run, folder):
    (call,), _ = run('stages', '--checkpoint', folder, '--untrained')
    before, after = call[1].items()
    assert (before[0], after[0]) == ('untrained', 'epoch 9')
    torch.manual_seed(3)  # the seed of the run
    expected = timm.create_model('smpconv_nano', **TINY)
    assert torch.equal(before[1].get_submodule(LAYER).coords, expected.get_submodule(LAYER).coords)


def test_receptive_field_of_the_runs_digits(run, folder, capsys):
    (call,), _ = run('receptive-field', '--checkpoint', folder, '--num-images', 4)
    (label, field), = call[1].items()
    assert label == 'epoch 9' and field.shape == (16, 16)
    digits = Digits('validation')
    chosen = [np.asarray(digits[index][0].resize((16, 16), Image.Resampling.BICUBIC)) for index in (0, 120, 239, 359)]
    images = (torch.tensor(np.stack(chosen))[:, None] / 255 - 0.3) / 0.4
    np.testing.assert_allclose(field, figures.effective_receptive_field(tiny(0), images), rtol=1e-4)
    rows = capsys.readouterr().out.splitlines()
    areas = [100 * figures.central_square(field, share).area for share in (0.2, 0.3, 0.5, 0.99)]
    assert rows[2].split() == ['epoch', '9', 'the', 'gradient', *(word for x in areas for word in (f'{x:.1f}', '%'))]


def test_heat_maps_of_files(run, folder, tmp_path):
    inside = tmp_path / 'in' / 'sub'
    inside.mkdir(parents=True)
    Image.new('RGB', (30, 20), 'red').save(inside / 'red.png')
    Image.new('L', (16, 16), 99).save(tmp_path / 'in.jpg')
    (call,), _ = run(
        'heat-map', '--checkpoint', folder, '--images', tmp_path / 'in', tmp_path / 'in.jpg', '--img-size', 24,
        '--class', 7)
    _, pixels, maps, titles = call
    assert pixels.shape == (2, 1, 24, 24) and maps.shape == (2, 24, 24)
    torch.testing.assert_close(pixels[1], torch.full((1, 24, 24), 99 / 255), atol=1e-5, rtol=0)
    assert [title.split(' (')[0] for title in titles] == ['red: class-7', 'in: class-7']


@pytest.mark.parametrize('given', ['in.png', 'in'])
def test_an_image_is_not_replaced_by_its_figure(folder, tmp_path, capsys, given):
    (tmp_path / 'in').mkdir()
    path = tmp_path / ('in/a.png' if given == 'in' else given)
    Image.new('RGB', (30, 20), 'red').save(path)
    before = path.read_bytes()
    argv = ('heat-map', '--checkpoint', folder, '--images', tmp_path / given, '--output', path)
    assert 'is one of --images' in programs.refused(main, capsys, *argv)
    assert path.read_bytes() == before


def test_animation_of_a_run_is_sorted_by_epoch(run, folder):
    (call,), path = run('animation', '--checkpoint', folder, '--fps', 10, '--max-layers', 1, name='out.gif')
    assert [title for title, _ in call[1]] == ['epoch 0', 'epoch 9', 'epoch 10']
    for (_, layers), seed in zip(call[1], (0, 9, 10)):
        (name, layer), = layers.items()
        assert torch.equal(layer.coords, tiny(seed).get_submodule(name).coords)
    with Image.open(path) as picture:
        assert picture.n_frames == 3 and picture.info['duration'] == 100


def test_the_model_of_an_original_release_file_is_identified(run, tmp_path):
    model = randomize_(timm.create_model('smpconv_nano', num_classes=10, in_chans=1))
    torch.save(model.state_dict(), tmp_path / 'in.pth')  # a state dict alone
    (call,), _ = run('stages', '--checkpoint', tmp_path / 'in.pth')
    (label, found), = call[1].items()
    assert label == 'in' and found.get_classifier().out_features == 10


def refused(capsys, tmp_path, *argv):
    """Return the one line of error output of a command that must fail and leave no file."""
    before = set(tmp_path.iterdir())
    line = programs.refused(main, capsys, *argv)
    assert set(tmp_path.iterdir()) == before
    return line


@pytest.mark.parametrize(('command', 'argv', 'message'), [
    ('kernels', ['--checkpoint', 'RUN', '--layer', 'stages.1'],
     f"no layer is named 'stages.1'; the nearest names are ['{LAYER}']"),
    ('kernels', ['--model', 'resnet18'], 'no kernels that are sampled from points'),
    ('kernels', ['--checkpoint', 'RUN', '--reparam'], 'no kernels that are sampled from points'),
    ('kernels', ['--checkpoint', 'GONE'], 'expected a checkpoint file, found nothing at GONE'),
    ('kernels', ['--checkpoint', 'RUN', '--model', 'smpconv_t'], 'the checkpoint does not fit the model'),
    ('kernels', ['--checkpoint', 'RUN', '--pretrained'], 'both select weights'),
    ('kernels', [], 'expected --checkpoint or --model'),
    ('kernels', ['--model', 'smpconv_x'], "no model is named 'smpconv_x'"),
    ('stages', ['--model', 'resnet18'], 'resnet18, untrained: expected depthwise convolutions'),
    ('receptive-field', ['--model', 'smpconv_nano'], "expected --images: files, folders, or 'digits'"),
    ('receptive-field', ['--checkpoint', 'RUN', '--images', 'GONE'], '--images: no such file or folder: GONE'),
    ('heat-map', ['--checkpoint', 'RUN', '--images', 'BROKEN'], 'broken.png cannot be read: cannot identify'),
    ('heat-map', ['--checkpoint', 'RUN', '--images', 'RUN'], 'has the extension of an image'),
    ('heat-map', ['--checkpoint', 'RUN', '--layer', 'stages.5'], "no layer is named 'stages.5'"),
    ('heat-map', ['--checkpoint', 'RUN', '--class', '10'], 'must lie in [0, 9], got 10'),
    ('animation', ['--model', 'smpconv_nano'], 'expected --checkpoint: two or more'),
    ('animation', ['--checkpoint', 'RUN/model_best.pth.tar'], 'at least 2 checkpoints, got 1'),
    ('animation', ['--checkpoint', 'EMPTY'], 'has no checkpoint-EPOCH.pth.tar'),
    ('animation', ['--checkpoint', 'RUN', '--reparam'], 'no kernels that are sampled from points'),
    ('stages', ['--model', 'smpconv_nano', '--untrained'], '--untrained needs --checkpoint'),
    ('animation', ['--checkpoint', 'RUN', '--pretrained'], 'both select weights'),
    ('animation', ['--checkpoint', 'RUN/model_best.pth.tar', 'RUN/model_best.pth.tar'], 'one of them twice'),
    ('animation', ['--checkpoint', 'RUN', '--fps', '0.001'], '--fps'),
    ('heat-map', ['--checkpoint', 'RUN', '--layer', ''], "''"),
    # an invalid output is reported first
    ('kernels', ['--checkpoint', 'GONE', '--output', 'out.jpg'], 'takes the name of a .png file'),
    ('animation', ['--checkpoint', 'GONE', '--output', 'out.mp4'], 'takes the name of a .gif or .png or .apng file'),
    ('kernels', ['--checkpoint', 'GONE', '--output', 'gone/out.png'], 'cannot be written: No such file or directory'),
    ('kernels', ['--checkpoint', 'GONE', '--output', 'EMPTY'], 'is not a file'),
])
def test_errors_are_one_line(folder, tmp_path, tmp_path_factory, capsys, command, argv, message):
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    (elsewhere / 'broken.png').write_bytes(b'no image')
    (elsewhere / 'empty.png').mkdir()
    places = {'RUN': folder, 'BROKEN': elsewhere / 'broken.png', 'EMPTY': elsewhere / 'empty.png'}
    words = argv
    for place, path in places.items():
        words = [word.replace(place, str(path)) if word.split('/')[0] == place else word for word in words]
    output = tmp_path / ('out.gif' if command == 'animation' else 'out.png')
    line = refused(capsys, tmp_path, command, '--output', output, *words)
    assert line.startswith('python -m smpconv_models.figures') and ': error: ' in line and message in line


def test_weights_that_are_not_finite_are_reported(tmp_path, capsys):
    weights = tiny(0).state_dict()
    weights['head.fc.bias'][0] = torch.nan
    torch.save({'state_dict': weights, 'model_kwargs': TINY, 'args': {'model': 'smpconv_nano'}}, tmp_path / 'in.pth')
    line = refused(
        capsys, tmp_path, 'stages', '--checkpoint', tmp_path / 'in.pth', '--output', tmp_path / 'out.png')
    assert 'in.pth: the checkpoint has weights that are not finite: head.fc.bias' in line


def test_wrong_values_are_reported_with_the_file(folder, tmp_path, tmp_path_factory, capsys):
    loaded = checkpoint.load_file(folder / 'model_best.pth.tar')
    path = tmp_path_factory.mktemp('elsewhere') / 'a.pth'
    for wrong, message in (({'mean': 'x'}, 'args.mean must be'), ({'img_size': 2048}, '--img-size overrides a size')):
        torch.save({**loaded, 'args': {**loaded['args'], **wrong}}, path)
        line = refused(capsys, tmp_path, 'receptive-field', '--output', tmp_path / 'out.png', '--checkpoint', path)
        assert f'{path}: ' in line and message in line


def test_norms_of_a_random_network_have_statistics_of_the_images(run, folder):
    """Otherwise its large kernels would contribute nothing visible."""
    (call,), _ = run('receptive-field', '--checkpoint', folder, '--untrained', '--num-images', 4)
    _, fields = call
    network = timm.create_model('smpconv_nano', **TINY)
    sequences = create_sequence_model('smpconv_sdigits', depth=1, dim=3, input_drop_rate=0.)
    for model, first, shape in (
            (sequences, sequences.blocks[0].conv1.small, (6, 1, 64)), (network, network.stem[0], (6, 1, 16, 16))):
        images, momentum = torch.randn(shape), first.norm.momentum
        recalibrate_bn_([model], [images])
        assert not model.training and first.norm.momentum == momentum
        x = first.conv(images).detach()
        dims = [0, *range(2, x.ndim)]
        torch.testing.assert_close(first.norm.running_mean, x.mean(dims))
        torch.testing.assert_close(first.norm.running_var, x.var(dims))
    random = inputs.ModelSource(checkpoints=[str(folder)], untrained=True).load()[0]
    assert random.is_random
    assert not np.allclose(fields['untrained'], figures.effective_receptive_field(random.model, images))


SMALL = {
    'smpconv_cifar': dict(depths=(1, 1), dims=(3, 4), kernel_size=7, num_points=4),
    'smpconv_sdigits': dict(depth=2, dim=3, num_points=4),
}


def small(name, seed=0):
    create = create_sequence_model if name == 'smpconv_sdigits' else timm.create_model
    return randomize_(create(name, **SMALL[name]), seed).eval()


@pytest.fixture(params=SMALL)
def points_per_filter(request, tmp_path_factory):
    """Name of a network with points per filter, and the folder of its run."""
    name, path = request.param, tmp_path_factory.mktemp(request.param)
    for file, epoch in (('model_best', 3), ('checkpoint-0', 0), ('checkpoint-3', 3)):
        torch.save({
            'state_dict': small(name, epoch).state_dict(), 'model_kwargs': SMALL[name], 'epoch': epoch,
            'args': {'model': name, 'seed': 3},
        }, path / f'{file}.pth.tar')
    return name, path


def test_networks_with_points_per_filter(run, points_per_filter):
    name, folder = points_per_filter
    kernels, _ = run('kernels', '--checkpoint', folder, '--filter', 2, '--max-layers', 2)
    run('stages', '--checkpoint', folder, '--untrained')
    _, path = run('animation', '--checkpoint', folder, '--max-layers', 2, '--filter', 1, name='out.png')
    with Image.open(path) as picture:
        assert picture.n_frames == 2
    (_, model, *_, filter), (_, sums), (_, snapshots, *_, filter_of_frames) = kernels
    expected = small(name, 3).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert (filter, filter_of_frames) == (2, 1) and list(sums) == ['untrained', 'epoch 3']
    assert [title for title, _ in snapshots] == ['epoch 0', 'epoch 3']


def test_plots_of_images_need_a_network_for_images(run, points_per_filter, tmp_path, capsys):
    name, folder = points_per_filter
    for command in ('receptive-field', 'heat-map'):
        argv = command, '--checkpoint', folder, '--images', 'digits', '--num-images', 2, '--img-size', 16
        if name == 'smpconv_cifar':
            run(*argv)
            (tmp_path / 'out.png').unlink()
        else:
            line = refused(capsys, tmp_path, *argv, '--output', tmp_path / 'out.png')
            assert 'expected a network for images, and epoch 3 takes sequences of 64 steps' in line


@pytest.mark.parametrize('name, file, options', [
    ('smpconv_cifar', 'cifar_tiny', ['depths=[1,1]', 'dims=[6,12]', 'num_points=8', 'kernel_size=9']),
    ('smpconv_smnist', 'sequence_tiny', [
        'sequence_length=60', 'depth=2', 'dim=6', 'num_points=8', 'conv_bias=True', 'in_chans=2', 'num_classes=5']),
])
def test_small_networks_of_the_original_release(run, tmp_path, name, file, options):
    data = load_file(Path(__file__).parents[1] / 'golden' / f'{file}.safetensors')
    weights = {key.removeprefix('state_dict.'): value for key, value in data.items() if key.startswith('state_dict.')}
    torch.save({'model': weights, 'epoch': 5}, tmp_path / 'in.pth')
    argv = '--checkpoint', tmp_path / 'in.pth', '--model', name, '--model-kwargs', *options
    run('kernels', *argv, '--max-layers', 1)
    calls, _ = run('stages', *argv)
    model = calls[0][1]
    for layer in figures.choose_layers(model).values():
        assert any(torch.equal(layer.coords, value) for value in weights.values())
    assert list(calls[1][1]) == ['epoch 5']


def test_a_missing_filter_is_one_line(folder, points_per_filter, tmp_path, capsys):
    _, other = points_per_filter
    for place, message in ((folder, 'filter must be 0 for a depthwise layer'), (other, 'filter must lie in [0, 2]')):
        line = refused(
            capsys, tmp_path, 'kernels', '--checkpoint', place, '--filter', 9, '--output', tmp_path / 'out.png')
        assert message in line and line.endswith('got 9')
