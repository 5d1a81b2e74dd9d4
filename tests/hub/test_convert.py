"""Conversion of checkpoints to folders, their publication on the Hub, and models from them."""
import argparse
import importlib.util
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import common
import pytest
import timm
import torch
from common import one_line_error, randomize_, relative_error
from loopback import LoopbackHub, set_client
from safetensors.torch import load_file, save_file
from test_original import Drive

import validate
from smpconv_models import checkpoint, hub
from smpconv_models.checkpoint import original
from smpconv_models.hub import _convert, _repository
from smpconv_models.utils.download import file_sha256

ROOT = Path(__file__).parents[2]
TINY = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), kernel_sizes=(13, 11, 9, 7))
REPO = 'tester/model'


def program(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'hub' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


convert, publish = program('convert'), program('publish')


def run(module, *argv):
    return module.main([str(argument) for argument in argv])


def refused(capsys, module, *argv):
    with pytest.raises(SystemExit, match='2'):
        run(module, *argv)
    text = capsys.readouterr().err
    assert 'Traceback' not in text
    line = text.strip().splitlines()[-1]  # after the Hub client's bars and retries
    assert line.startswith(f'{module.__name__}.py: error: ')
    return line


def namespace(**changes):
    return argparse.Namespace(**{**dict(model='smpconv_t', model_kwargs=TINY, num_classes=10, lr=0.1), **changes})


@pytest.fixture(scope='module')
def released(golden):
    """A state dict in the release's names, an image and its logits."""
    data = golden('imagenet_tiny')
    return common.released(data), data['input'], data['logits']


@pytest.fixture
def file(tmp_path, released):
    zeros = {key: torch.zeros_like(value) for key, value in released[0].items()}
    path = tmp_path / 'release.pth.tar'
    torch.save({'state_dict': zeros, 'state_dict_ema': released[0], 'epoch': 3, 'args': namespace()}, path)
    return path


@pytest.fixture(scope='module')
def converted(tmp_path_factory, released):
    path = tmp_path_factory.mktemp('converted') / 'release.pth.tar'
    torch.save({'state_dict': released[0], 'args': namespace()}, path)
    return hub.convert(path, path.with_name('folder'), card=(ROOT / 'hub/model_card.md').read_text()).folder


@pytest.fixture
def folder(tmp_path, converted):
    return Path(shutil.copytree(converted, tmp_path / 'folder'))


def load(folder, **kwargs):
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()


def convert_saved(tmp_path, content):
    """Save a checkpoint and convert it; return the result and the model that timm loads from the folder."""
    torch.save(content, tmp_path / 'saved.pth.tar')
    return hub.convert(tmp_path / 'saved.pth.tar', tmp_path / 'folder'), load(tmp_path / 'folder')


# --- convert ---


def test_a_release_file_becomes_a_folder_that_timm_loads(tmp_path, file, released, capsys):
    _, image, logits = released
    assert run(convert, file, tmp_path / 'folder', '--source', 'somewhere') == 0
    text = capsys.readouterr().out
    assert "smpconv_t, the weights under 'state_dict_ema'" in text
    assert relative_error(load(tmp_path / 'folder')(image), logits) < 1e-5
    assert sorted(os.listdir(tmp_path / 'folder')) == ['README.md', 'config.json', 'model.safetensors']
    config = json.loads((tmp_path / 'folder/config.json').read_text())
    sha256 = file_sha256(tmp_path / 'folder/model.safetensors')
    assert config['architecture'] == 'smpconv_t' and config['source'] == 'somewhere'
    assert config['sha256'] == sha256 and sha256 in text and config['model_args']['depths'] == [1, 1, 2, 1]
    card = (tmp_path / 'folder/README.md').read_text()
    assert sha256 in card and 'license: unknown' in card and not re.search(r'\{\w+\}', card)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith('.')] == []


def test_the_weights_that_are_not_averaged(tmp_path, file, capsys):
    assert run(convert, file, tmp_path / 'folder', '--no-use-ema') == 0
    assert "the weights under 'state_dict'" in capsys.readouterr().out
    assert not load(tmp_path / 'folder')(torch.randn(1, 3, 32, 32)).any()


def test_our_own_checkpoint_keeps_its_data_and_classes(tmp_path):
    model = randomize_(timm.create_model('smpconv_nano', num_classes=2, in_chans=1)).eval()
    done, loaded = convert_saved(tmp_path, {
        'state_dict': model.state_dict(), 'model_kwargs': {'num_classes': 2, 'in_chans': 1}, 'classes': ['cat', 'dog'],
        'args': {'model': 'smpconv_nano', 'img_size': 16, 'mean': [0.3], 'std': [0.4], 'crop_pct': 0.9}})
    assert (done.architecture, done.key) == ('smpconv_nano', 'state_dict')
    image = torch.randn(2, 1, 16, 16)
    assert torch.equal(loaded(image), model(image))
    data = timm.data.resolve_model_data_config(loaded)
    assert tuple(data['input_size']) == (1, 16, 16) and list(data['mean']) == [0.3] and data['crop_pct'] == 0.9
    assert loaded.pretrained_cfg['label_names'] == ['cat', 'dog']


def test_weights_of_a_run_in_channels_last(tmp_path):
    model = randomize_(timm.create_model('smpconv_nano', num_classes=2)).to(memory_format=torch.channels_last)
    assert not model.state_dict()['stem.0.conv.weight'].is_contiguous(), 'which safetensors cannot store'
    _, loaded = convert_saved(tmp_path, {'state_dict': model.state_dict(), 'args': {'model': 'smpconv_nano'}})
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize('name', ['smpconv_t', 'smpconv_nano'])
def test_own_weights_are_not_the_original_authors(tmp_path, name):
    kwargs = dict(TINY, num_classes=2)
    done, _ = convert_saved(tmp_path, {
        'args': {'model': name}, 'state_dict': timm.create_model(name, **kwargs).state_dict(), 'model_kwargs': kwargs})
    config = json.loads((done.folder / 'config.json').read_text())
    assert not {'tag', 'origin_url'} & config['pretrained_cfg'].keys()
    assert config['license'] == config['pretrained_cfg']['license'] == 'unknown'
    assert config['source'] == 'saved.pth.tar'


def test_the_code_in_an_unpublished_card_runs(folder, monkeypatch):
    card = (folder / 'README.md').read_text()
    assert not re.search('OWNER|NAME|FOLDER|pip install', card)
    code, = re.findall('```python\n(.*?)```', card, re.DOTALL)
    monkeypatch.chdir(folder)
    names = {}
    exec(code, names)
    assert names['model'].num_classes == 10


@pytest.mark.parametrize('prefix, dtype', [('module.', torch.float32), ('_orig_mod.', torch.float16)])
def test_state_dicts_are_identified_by_their_shapes(tmp_path, prefix, dtype):
    model = randomize_(timm.create_model('smpconv_nano', num_classes=4)).eval()
    state = {prefix + key: value.to(dtype) if value.is_floating_point() else value
             for key, value in model.state_dict().items()}
    save_file(state, tmp_path / 'weights.safetensors')
    done = hub.convert(tmp_path / 'weights.safetensors', tmp_path / 'folder')
    assert (done.architecture, done.key) == ('smpconv_nano', '')
    image = torch.randn(1, 3, 32, 32)
    assert relative_error(load(tmp_path / 'folder')(image), model(image)) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_files_have_the_users_permissions(tmp_path, file):
    old = os.umask(0o027)
    try:
        hub.convert(file, tmp_path / 'folder', card='{architecture}')
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / 'folder').iterdir()}
    assert set(modes.values()) == {0o640}, modes


def save_with_nan(path):
    content = torch.load(path, weights_only=False)
    content['state_dict_ema']['norm.weight'][0] = torch.nan
    torch.save(content, path)


@pytest.mark.parametrize('change, text', [
    (lambda path: path.write_bytes(b'<html>'), 'HTML'),
    (lambda path: path.write_bytes(path.read_bytes()[:-500]), 'truncated or damaged'),
    (lambda path: torch.save(timm.create_model('test_resnet').state_dict(), path), 'the weights fit none of'),
    (lambda path: torch.save({'state_dict': {'a': torch.zeros(1)}, 'args': namespace(model='resnet18')}, path),
     "got 'resnet18'"),
    (lambda path: torch.save({'state_dict': {'a': torch.zeros(1)}, 'args': namespace(model_kwargs={'x': 1})}, path),
     "got ['x']"),
    (lambda path: torch.save({'state_dict': {'a': torch.zeros(1)}, 'args': namespace()}, path), 'does not fit'),
    (save_with_nan, 'not finite: norm.weight'),
    (lambda path: path.unlink(), 'found nothing'),
])
def test_a_failed_conversion_is_one_line_and_leaves_nothing(tmp_path, file, capsys, change, text):
    change(file)
    assert text in refused(capsys, convert, file, tmp_path / 'folder')
    assert {path.name for path in tmp_path.iterdir()} <= {'release.pth.tar'}


def test_a_folder_with_files_is_left_alone(tmp_path, file, capsys):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder/mine').write_text('x')
    assert 'expected a new or an empty folder' in refused(capsys, convert, file, tmp_path / 'folder')
    assert os.listdir(tmp_path / 'folder') == ['mine']


def test_the_originals_file_is_downloaded_first(tmp_path, file, monkeypatch, capsys):
    argv = ('--download', 'smpconv_t', '--download-dir', tmp_path / 'files', tmp_path / 'folder')
    with Drive() as drive:
        drive.files[original.GDRIVE_IDS['smpconv_t']] = file.read_bytes()
        monkeypatch.setattr(original, '_ADDRESS', drive.url)
        monkeypatch.setenv('no_proxy', '127.0.0.1')
        assert run(convert, *argv) == 0
        config = json.loads((tmp_path / 'folder/config.json').read_text())
        release = 'https://github.com/sangnekim/SMPConv'
        assert config['source'] == config['pretrained_cfg']['origin_url'] == release
        assert config['license'] == config['pretrained_cfg']['license'] == 'mit'
        assert config['pretrained_cfg']['tag'] == 'in1k'
        shutil.rmtree(tmp_path / 'folder')
        asked = len(drive.asked)
        assert run(convert, *argv) == 0 and len(drive.asked) == asked  # it is there
    path = tmp_path / 'files/smpconv_t.pth.tar'
    text = f'{path}: {file.stat().st_size} bytes, sha256 {file_sha256(file)}'
    assert capsys.readouterr().out.count(text) == 2


@pytest.mark.parametrize('argv', [[], ['a', '--download', 'smpconv_t', 'b'], ['a', 'b', '--download-dir', 'c']])
def test_arguments_that_contradict_each_other(capsys, argv):
    assert refused(capsys, convert, *argv)


def test_a_checkpoint_of_gray_images_without_a_size(tmp_path):
    """train.py saves such a checkpoint if --img-size is not given."""
    kwargs = dict(num_classes=2, in_chans=1)
    _, loaded = convert_saved(tmp_path, {
        'state_dict': timm.create_model('smpconv_nano', **kwargs).state_dict(), 'model_kwargs': kwargs,
        'args': {'model': 'smpconv_nano', 'img_size': None, 'mean': [0.3], 'std': None}})
    data = timm.data.resolve_model_data_config(loaded)
    assert tuple(data['input_size']) == (1, 32, 32) and list(data['mean']) == [0.3]
    assert list(data['std']) == pytest.approx([sum(timm.data.IMAGENET_DEFAULT_STD) / 3])


def test_arguments_of_timms_script_are_the_models(tmp_path):
    """Arguments that no shape shows are used as well."""
    kwargs = dict(act_layer='silu', output_stride=16)
    model = randomize_(timm.create_model('smpconv_nano', num_classes=3, global_pool='max', **kwargs)).eval()
    _, loaded = convert_saved(tmp_path, {'state_dict': model.state_dict(), 'args': namespace(
        model='smpconv_nano', num_classes=None, gp='max', model_kwargs=kwargs)})
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(image), model(image))


def test_a_model_of_large_images_is_converted_and_evaluated_on_request(tmp_path, capsys):
    """A description may have images of 4096 pixels; only the user's option evaluates such large ones."""
    kwargs = dict(TINY, num_classes=10)
    model = timm.create_model('smpconv_nano', **kwargs)
    torch.save({'state_dict': model.state_dict(), 'model_kwargs': kwargs, 'args': {
        'model': 'smpconv_nano', 'img_size': 1280, 'dataset': 'digits'}}, tmp_path / 'a.pth')
    hub.convert(tmp_path / 'a.pth', tmp_path / 'folder')
    input_size = hub.load(tmp_path / 'folder').pretrained_cfg['input_size']  # a list before timm 1.0.31
    assert tuple(input_size[1:]) == (1280, 1280)
    named = ('--model', f'local-dir:{tmp_path}/folder', '--dataset', 'digits')
    for source in ('--checkpoint', tmp_path / 'a.pth'), named:
        line = refused(capsys, validate, *source)
        assert '1280' in line and '1024' in line


def test_another_model_than_the_weights_is_refused(tmp_path, capsys):
    torch.save(timm.create_model('smpconv_nano').state_dict(), tmp_path / 'nano.pth')
    for name, text in (('smpconv_b', 'does not fit the model'), ('resnet18', "got 'resnet18'")):
        assert text in refused(capsys, convert, tmp_path / 'nano.pth', tmp_path / 'folder', '--model', name)


@pytest.mark.parametrize('content, text', [
    (dict(model_kwargs={'dims': [10 ** 4] * 4}), 'at most 2e+09 numbers'),
    (dict(model_kwargs={'checkpoint_path': 'x.pth'}), 'got checkpoint_path'),
    (dict(model_kwargs={'nothing': 1}), "got ['nothing']"),
    (dict(model_kwargs={'points_divisor': -1}), 'a number as points_divisor'),
    (dict(model_kwargs={'kernel_scale': float('inf')}), 'model_kwargs.kernel_scale must be'),
    (dict(args={'model': 'smpconv_nano', 'img_size': 10 ** 6}), 'args.img_size must be'),
    (dict(classes=['a']), 'expected 2 names of classes'),
])
def test_the_description_in_a_checkpoint_is_validated(tmp_path, capsys, content, text):
    state = timm.create_model('smpconv_nano', num_classes=2).state_dict()
    torch.save({'state_dict': state, **content}, tmp_path / 'bad.pth')
    assert text in refused(capsys, convert, tmp_path / 'bad.pth', tmp_path / 'folder')
    assert os.listdir(tmp_path) == ['bad.pth']


def test_a_conversion_with_other_outputs_fails(tmp_path, file, monkeypatch, capsys):
    """The saved model is loaded and compared."""
    save_for_hf = _convert.save_for_hf

    def damaged(network, *args, **kwargs):
        network.norm.weight.data[0] += 1
        save_for_hf(network, *args, **kwargs)

    monkeypatch.setattr(_convert, 'save_for_hf', damaged)
    assert 'the outputs after the conversion differ' in refused(capsys, convert, file, tmp_path / 'folder')
    assert os.listdir(tmp_path) == ['release.pth.tar']


@pytest.mark.slow  # 8 s: several programs
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, file):
    script = (
        'import resource, runpy, sys\n'
        'resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n'
        f'runpy.run_path({str(ROOT / "hub/convert.py")!r}, run_name="__main__")')
    done = subprocess.run(
        [sys.executable, '-c', script, file, tmp_path / 'folder'], capture_output=True, text=True, timeout=120,
        env={**os.environ, 'PYTHONPATH': str(ROOT)})
    line, = done.stderr.splitlines()
    assert done.returncode == 2 and 'cannot be written' in line and str(tmp_path) in line
    assert os.listdir(tmp_path) == ['release.pth.tar']


def test_an_empty_folder_is_filled(tmp_path, file, monkeypatch):
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    assert run(convert, file, '.') == 0
    assert sorted(os.listdir()) == ['README.md', 'config.json', 'model.safetensors']


def test_license_and_source_are_written(tmp_path, file, capsys):
    assert run(convert, file, '--license', 'cc-by-nc-4.0', tmp_path / 'folder', '--source', 'mine') == 0
    config = json.loads((tmp_path / 'folder/config.json').read_text())
    assert config['license'] == config['pretrained_cfg']['license'] == 'cc-by-nc-4.0' and config['source'] == 'mine'
    card = (tmp_path / 'folder/README.md').read_text()
    assert 'license: cc-by-nc-4.0' in card and 'Converted from mine' in card
    assert 'one line each' in refused(capsys, convert, file, tmp_path / 'other', '--license', 'mit\nevil: yes')


# --- load ---


def merged(own, changes):
    """Return nested dictionaries with changed values; None removes a key."""
    changed = {key: merged(own[key], value) if isinstance(value, dict) else value for key, value in changes.items()}
    return {key: value for key, value in {**own, **changed}.items() if value is not None}


@pytest.mark.parametrize('changes, message', [
    *[(dict(model_args=model_args), message) for model_args, message in [
        (dict(depths=[10 ** 6] * 4), 'at most 1000 blocks'), (dict(dims=[10 ** 9] * 4), 'model_args.dims must be'),
        (dict(num_classes=10 ** 12), 'model_args.num_classes'), (dict(num_classes=-10 ** 12), 'model_args.num_classes'),
        (dict(kernel_sizes=[40001] * 4), '4095 elements|2e.09'), (dict(kernel_scale=1000), 'to 4095 elements'),
        (dict(depths='abcd'), 'expected depths of a number'), (dict(points_divisor=0), 'points_divisor'),
        (dict(nothing=1), r"got \['nothing'\]"), (dict(device='meta'), r"got \['device'\]"),
        (dict(depths=[0, 0, 0, 1], dims=[10 ** 5] * 3 + [8], kernel_sizes=None), '2e.09'),
        (dict(depths=[9] * 4, dims=[200] * 4, kernel_sizes=[511] * 4, points_divisor=1), 'of side 511 take'),
        (dict(mlp_ratio=-10), 'no network of'), (dict(global_pool='x'), 'no network of'),
        (dict(drop_path_rate='x'), 'no network of')]],
    (dict(architecture='resnet18'), "got 'resnet18'"), (dict(architecture=None), "it has no 'architecture'"),
    (dict(num_classes=10 ** 12), 'at most 2e.09 numbers'), (dict(model_args=[1]), 'cannot be loaded'),
    (dict(pretrained_cfg=[1]), 'cannot be loaded'),
    (dict(pretrained_cfg=dict(input_size=[])), 'expected the input_size'),
    (dict(pretrained_cfg=dict(nothing=1)), "unexpected keyword argument 'nothing'"),
    (dict(pretrained_cfg={'\x1b[31m': 1}), r"argument '\\x1b\[31m'$"),
    (dict(sha256='a' * 5000), r"json, 'a{5,80}\.\.\.a{5,80}'$"),
    ('[1, 2]', 'cannot be loaded'), ('nonsense', 'cannot be loaded'),
])
def test_a_hostile_configuration_is_one_line(folder, changes, message):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(changes if isinstance(changes, str) else json.dumps(merged(config, changes)))
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = one_line_error(hub.load, folder)
    assert re.search(message, error) and str(folder) in error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert time.perf_counter() - start < 20


# --- publish ---


@pytest.fixture
def remote(monkeypatch, tmp_path):
    """A Hub to publish to, and the client of this process pointed there."""
    with LoopbackHub(token='hf_test') as server:
        set_client(monkeypatch, tmp_path, server.url)
        monkeypatch.setenv('HF_TOKEN', 'hf_test')
        monkeypatch.setattr(time, 'sleep', lambda seconds: None)
        yield server


def test_a_dry_run_sends_nothing(remote, folder, capsys):
    assert run(publish, folder, REPO) == 0
    text = capsys.readouterr().out
    assert f'{REPO}: a new repository' in text and text.count('new ') == 4 and 'nothing was sent' in text
    assert {request.method for request in remote.requests} <= {'GET', 'HEAD'}


def test_a_dry_run_needs_no_token(remote, folder, capsys, monkeypatch):
    assert run(publish, folder, REPO, '--publish') == 0
    change_weight(folder, 1)
    capsys.readouterr()
    monkeypatch.delenv('HF_TOKEN')
    assert run(publish, folder, REPO, '--force') == 0
    assert capsys.readouterr().out.splitlines() == [
        'changed  model.safetensors', 'changed  config.json', 'same     README.md',
        'nothing was sent; --publish makes these changes and needs a token']
    assert run(publish, folder, 'tester/other') == 0
    assert capsys.readouterr().out.startswith(
        'tester/other: a new repository, unless it is private: without a token only public ones are visible\nnew ')
    assert run(publish, folder, 'tester/other', '--private') == 0
    assert 'publishing needs a token' in refused(capsys, publish, folder, REPO, '--publish', '--force')


def test_publishing_sends_what_changed_and_never_the_token(remote, folder, capsys):
    assert run(publish, folder, REPO, '--publish') == 0
    assert 'published: ' in capsys.readouterr().out
    assert f"create_model('hf-hub:{REPO}'" in remote.files(REPO)['README.md'].read_text()
    assert {name: path.read_bytes() for name, path in remote.files(REPO).items() if name != '.gitattributes'} == {
        path.name: path.read_bytes().replace(b'local-dir:.', b'hf-hub:' + REPO.encode()) for path in folder.iterdir()}
    remote.forget()
    assert run(publish, folder, REPO, '--publish') == 0
    assert 'is up to date' in capsys.readouterr().out
    assert {request.method for request in remote.requests} <= {'GET', 'HEAD'}
    (folder / 'README.md').write_text('another card')
    assert run(publish, folder, REPO, '--publish') == 0
    text = capsys.readouterr().out
    assert 'changed  README.md' in text and 'same     model.safetensors' in text
    assert not any('hf_test' in request.path + request.query for request in remote.requests)


def test_other_weights_need_force(remote, folder, capsys):
    assert run(publish, folder, REPO, '--publish') == 0
    before = remote.files(REPO)['model.safetensors'].read_bytes()
    change_weight(folder, 1)
    assert 'has other weights: --force replaces them' in refused(capsys, publish, folder, REPO, '--publish')
    assert remote.files(REPO)['model.safetensors'].read_bytes() == before
    assert run(publish, folder, REPO, '--publish', '--force') == 0
    assert remote.files(REPO)['model.safetensors'].read_bytes() == (folder / 'model.safetensors').read_bytes()


def change_weight(folder, change):
    weights = load_file(folder / 'model.safetensors')
    weights['norm.weight'][0] += change
    save_file(weights, folder / 'model.safetensors')
    change_config(folder, sha256=file_sha256(folder / 'model.safetensors'))


def change_config(folder, **changes):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize('change, text', [
    (lambda folder: change_weight(folder, float('nan')), 'not finite: norm.weight'),
    (lambda folder: (folder / 'model.safetensors').write_bytes(b''), 'is damaged: its checksum'),
    (lambda folder: (folder / 'README.md').unlink(), "missing ['README.md']"),
    (lambda folder: (folder / 'pytorch_model.bin').write_bytes(b'x'), "unexpected ['pytorch_model.bin']"),
    (lambda folder: (folder / 'config.json').write_text('{}'), "it has no 'architecture'"),
    (lambda folder: (folder / 'config.json').write_text('[]'), 'cannot be loaded'),
    (lambda folder: (folder / 'config.json').write_text(''), 'cannot be loaded'),
    (lambda folder: change_config(folder, sha256=None), 'is not the file whose checksum is in config.json'),
    (lambda folder: change_config(folder, architecture='resnet18'), "got 'resnet18'"),
    (lambda folder: change_config(folder, architecture='smpconv_mobile31', model_args={}), 'does not fit the model'),
])
def test_an_incomplete_folder_is_not_sent(remote, folder, capsys, change, text):
    change(folder)
    assert text in refused(capsys, publish, folder, REPO, '--publish')
    assert remote.requests == []


@pytest.mark.parametrize('token, fault, text', [
    ('', None, 'publishing needs a token: set HF_TOKEN, or run hf auth login'),
    ('hf_secret_wrong', None, 'status 401: set HF_TOKEN to a valid token'),
    ('hf_test', dict(pattern='*/commit/*', status=403), 'status 403: the token in HF_TOKEN has no access to it'),
    ('hf_test', dict(pattern='*', drop='close'), 'cannot be published'),
    ('hf_test', dict(pattern='*', body=b'<html>'), 'cannot be published'),
    ('hf_test', dict(pattern='/upload/*', status=500), 'cannot be published'),
])
def test_a_hub_that_refuses_is_one_line_without_the_token(
        remote, folder, capsys, monkeypatch, token, fault, text):
    monkeypatch.setenv('HF_TOKEN', token)
    if fault is not None:
        remote.fail(**fault, times=None)
    line = refused(capsys, publish, folder, REPO, '--publish')
    assert text in line and 'hf_' not in line.replace(REPO, '')


@pytest.mark.parametrize('name, text', [
    ('a/b/c', 'expected OWNER/NAME'), ('model', 'expected OWNER/NAME'), ('a/b c', 'is no name for a repository')])
def test_an_invalid_repository_name(remote, folder, capsys, name, text):
    assert text in refused(capsys, publish, folder, name, '--publish')
    assert not remote.repos


def test_weights_of_another_kind_are_other_weights(remote, folder, capsys):
    remote.add_repo(REPO, {'pytorch_model.bin': b'x', 'notes.txt': b'y'})
    assert '(pytorch_model.bin): --force replaces them' in refused(capsys, publish, folder, REPO, '--publish')
    assert run(publish, folder, REPO, '--publish', '--force') == 0
    assert 'removed  pytorch_model.bin' in capsys.readouterr().out
    assert {*remote.files(REPO)} - {'.gitattributes'} == {'README.md', 'config.json', 'model.safetensors', 'notes.txt'}


def test_a_commit_of_another_client_is_kept(remote, folder, capsys, monkeypatch):
    assert run(publish, folder, REPO, '--publish') == 0
    create_commit = _repository.HfApi.create_commit

    def late(self, *args, **kwargs):
        remote.commit(REPO, {'model.safetensors': b'theirs'})
        return create_commit(self, *args, **kwargs)

    monkeypatch.setattr(_repository.HfApi, 'create_commit', late)
    (folder / 'README.md').write_text('another card')
    assert 'status 412' in refused(capsys, publish, folder, REPO, '--publish')
    assert remote.files(REPO)['model.safetensors'].read_bytes() == b'theirs'


def test_a_public_repository_stays_public(remote, folder, capsys):
    assert run(publish, folder, REPO, '--publish', '--private') == 0
    remote.repos[REPO].private = False
    assert '--private cannot change that' in refused(capsys, publish, folder, REPO, '--publish', '--private')


def test_a_repository_that_stays_empty_is_named(remote, folder, capsys):
    remote.fail('*/commit/*', status=403, times=None)
    assert f'({REPO} was created, and is empty)' in refused(capsys, publish, folder, REPO, '--publish')


def test_a_server_that_is_no_hub(remote, folder, capsys):
    remote.fail('/api/models/*', body=b'[]', headers={'Content-Type': 'application/json'}, times=None)
    assert 'does not answer as the Hub does' in refused(capsys, publish, folder, REPO, '--publish')


# --- the whole way ---


LOAD = """
import sys, torch, smpconv_models, timm
model = timm.create_model('smpconv_t', pretrained=True, **eval(sys.argv[1])).eval()
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
"""


def to_release(state_dict):
    """Return a state dict under the original release's names and in its shapes."""
    converted = {}
    for key, value in state_dict.items():
        key = re.sub(r'^stages\.(\d+)\.downsample\.(\d+)', lambda m: f'transitions.{int(m[1]) - 1}.{m[2]}', key)
        key = re.sub(r'^(stages\.\d+\.blocks\.)(\d+)\.(mixer|ffn)\.(norm\.)?', lambda m: (
            f'{m[1]}{2 * int(m[2]) + (m[3] == "ffn")}.'
            + ({'mixer': 'prelkb_bn.', 'ffn': 'preffn_bn.'}[m[3]] if m[4] else '')), key)
        key = re.sub(r'\.large_kernel\.(large|small)\.', lambda m: (
            f'.large_kernel.{ {"large": "smp", "small": "small_conv"}[m[1]]}.'), key)
        key = re.sub(r'(?<=.)\.norm\.', '.bn.', key).replace('head.fc.', 'head.')
        for ours, theirs, shape in (
                ('coords', 'weight_coord', (1, -1, 2)), ('radius', 'radius', (1, -1, 1, 1)),
                ('weight', 'weights', (1, *value.shape))):
            if key.endswith(f'.smp.conv.{ours}'):
                key, value = key.removesuffix(ours) + theirs, value.reshape(shape)
                break
        converted[key] = value
    return converted


@pytest.mark.slow  # files of 0.4 and 1.3 GB
@pytest.mark.parametrize('name', ['smpconv_t', 'smpconv_b'])
def test_from_the_releases_file_through_the_hub_to_a_model_in_a_fresh_process(tmp_path, name):
    model = timm.create_model(name).eval()
    for key, value in model.named_buffers():
        if key.endswith('running_var'):
            value.uniform_(0.5, 1.5)
    state = to_release(model.state_dict())
    assert checkpoint.convert_original(state).keys() == model.state_dict().keys()
    parameters = enumerate(model.parameters())
    path = tmp_path / 'release.pth.tar'
    torch.save({
        'state_dict': {key: torch.zeros_like(value) for key, value in state.items()}, 'state_dict_ema': state,
        'optimizer': {'state': {i: {'exp_avg': p.data, 'exp_avg_sq': p.data.clone()} for i, p in parameters}},
        'epoch': 299, 'arch': 'x', 'version': 2, 'metric': 82.5, 'args': argparse.Namespace(lr=4e-3, mean=None)}, path)
    image = torch.randn(1, 3, 64, 64)
    torch.save(image, tmp_path / 'image.pt')
    expected = model(image)
    script = (
        'import runpy, sys, smpconv_models.hub\n'
        f'before = {common.PEAK_KIB}\n'
        f'try: runpy.run_path({str(ROOT / "hub/convert.py")!r}, run_name="__main__")\n'
        f'finally: open(sys.argv[-1] + ".peak", "w").write(str({common.PEAK_KIB} - before))')
    peak = Path(f'{tmp_path / "folder"}.peak')
    with LoopbackHub(token='hf_test') as server:
        environment = {
            **os.environ, **server.environment(tmp_path / 'home', HF_TOKEN='hf_test'),
            'SMPCONV_HUB_NAMESPACE': 'tester', 'PYTHONPATH': str(ROOT)}
        for command in (
                ['-c', script, path, tmp_path / 'folder'],
                [ROOT / 'hub/publish.py', tmp_path / 'folder', f'tester/{name}.in1k', '--publish'],
                ['-c', LOAD.replace('smpconv_t', name), '{}', tmp_path / 'image.pt', tmp_path / 'logits.pt'],
                ['-c', LOAD.replace('smpconv_t', name), '{"num_classes": 10, "features_only": True}',
                 tmp_path / 'image.pt', tmp_path / 'features.pt']):
            subprocess.run([sys.executable, *map(str, command)], env=environment, check=True, timeout=300)
    assert relative_error(torch.load(tmp_path / 'logits.pt'), expected) < 1e-6
    for got, wanted in zip(torch.load(tmp_path / 'features.pt'), model.forward_intermediates(
            image, intermediates_only=True)):
        assert relative_error(got, wanted) < 1e-6
    assert int(peak.read_text()) * 1024 <= 2.2 * path.stat().st_size
