"""The original release's files and ours through timm alone, and files that are not checkpoints."""
import argparse
import pickle
import zipfile

import common
import pytest
import timm
import torch
from common import load_into, one_line_error, randomize_, relative_error
from safetensors.torch import save_file

import smpconv_models
from smpconv_models import checkpoint

TINY = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), kernel_sizes=(13, 11, 9, 7))


def create(path, name='smpconv_t', num_classes=10, file_classes=10, **kwargs):
    """Create a model by timm's public function only."""
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=file_classes),
        **dict(dict(TINY, num_classes=num_classes), **kwargs)).eval()


@pytest.fixture
def outputs(golden):
    """Return an image, and the logits and stages of the release's code."""
    data = golden('imagenet_tiny')
    return data['input'], data['logits'], [data[f'stage.{i}'] for i in range(4)]


@pytest.fixture
def released(golden):
    """Return the state dict in the release's names."""
    return common.released(golden('imagenet_tiny'))


@pytest.fixture
def path(tmp_path, released):
    """Return the path of a release file."""
    return release_file(tmp_path / 'smpconv.pth.tar', released)


def prefixed(state_dict, prefix):
    return {prefix + key: value for key, value in state_dict.items()}


def zeroed(state_dict):
    return {key: torch.zeros_like(value) for key, value in state_dict.items()}


def release_file(path, state_dict, ema=None, prefix='', **kwargs):
    """Write a file as timm's CheckpointSaver did when the release was made."""
    content = {
        'epoch': 3, 'arch': 'x', 'state_dict': prefixed(state_dict, prefix), 'version': 2, 'metric': 81.2,
        'optimizer': {'state': {0: {'exp_avg': torch.ones(3)}}, 'param_groups': [{'lr': 0.1, 'params': [0]}]},
        'args': argparse.Namespace(lr=0.1, model='x', mean=None, decay_epochs=[1, 2]),
    }
    if ema is not None:
        content['state_dict_ema'] = prefixed(ema, prefix)
    torch.save(content, path, **kwargs)
    return path


# --- the release's files ---


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('has_ema', [False, True])
def test_release_file_gives_the_releases_outputs(tmp_path, released, outputs, prefix, has_ema):
    """EMA weights are preferred."""
    first, ema = (zeroed(released), released) if has_ema else (released, None)
    model = create(release_file(tmp_path / 'smpconv.pth.tar', first, ema=ema, prefix=prefix))
    assert relative_error(model(outputs[0]), outputs[1]) < 1e-5


@pytest.mark.parametrize('kind', ['legacy', 'state dict', 'safetensors', 'other values', 'other values in state_dict'])
def test_other_formats_of_the_same_weights(tmp_path, released, outputs, kind):
    """Before torch 1.6 a file was a pickle without a zip archive."""
    path = tmp_path / ('weights.safetensors' if kind == 'safetensors' else 'weights.pth')
    if kind == 'legacy':
        release_file(path, released, _use_new_zipfile_serialization=False)
    elif kind == 'safetensors':
        save_file(released, path)
    else:
        content = {**released, **({'note': 'x', 'numbers': {'a': 1}} if kind.startswith('other') else {})}
        torch.save({'state_dict': content} if kind.endswith('state_dict') else content, path)
    assert relative_error(create(path)(outputs[0]), outputs[1]) < 1e-5


def test_features_have_no_use_for_the_files_classes(path, outputs):
    """The file may have any number of classes, and the configuration another."""
    backbone = timm.create_model(
        'smpconv_t', pretrained=True, features_only=True, pretrained_cfg_overlay=dict(file=str(path)), **TINY).eval()
    for given, expected in zip(backbone(outputs[0]), outputs[2]):
        assert relative_error(given, expected) < 1e-5


def test_checkpoint_path(path, outputs):
    """timm's scripts load weights after they create the model."""
    model = timm.create_model('smpconv_t', num_classes=10, **TINY)
    timm.models.load_checkpoint(model, str(path), filter_fn=smpconv_models.models.smpconv.checkpoint_filter_fn)
    assert relative_error(model.eval()(outputs[0]), outputs[1]) < 1e-5


# --- files that are none ---


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1:]


def middle_of_largest_record(path):
    """A position among a tensor's bytes."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    return path.read_bytes().index(b'PK', largest.header_offset) + 30 + len(largest.filename) + largest.file_size // 2


DAMAGES = {
    'truncated_zip': lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    'half_zip': lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
    'flipped_byte': lambda path: path.write_bytes(flipped(path.read_bytes(), middle_of_largest_record(path))),
    'html': lambda path: path.write_text('<!DOCTYPE html>\n<html><body>Virus scan warning</body></html>\n'),
    'empty': lambda path: path.write_bytes(b''),
    'lfs_pointer': lambda path: path.write_text(
        'version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 107000000\n'),
    'text': lambda path: path.write_text('not\na checkpoint'),
    'zeros': lambda path: path.write_bytes(bytes(4096)),
    'truncated_pickle': lambda path: path.write_bytes(pickle.dumps({'state_dict': {'a': 1}}, protocol=2)[:10]),
    'other_pickle': lambda path: path.write_bytes(pickle.dumps([1, 2, 3], protocol=2)),
    'other_zip': lambda path: zipfile.ZipFile(path, 'w').writestr('readme.txt', 'hello'),
    'no_tensors': lambda path: torch.save({'epoch': 3}, path),
    'list_in_zip': lambda path: torch.save([1, 2], path),
    'missing': lambda path: path.unlink(),
    'folder': lambda path: (path.unlink(), path.mkdir()),
}


def select(path):
    return checkpoint.select_state_dict(checkpoint.load_file(path))


@pytest.mark.parametrize('load', [select, create])
@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_file_is_reported_in_one_line(path, damage, load):
    DAMAGES[damage](path)
    one_line_error(load, path)


@pytest.mark.parametrize('damage, message', {
    'html': 'HTML', 'empty': 'is empty', 'lfs_pointer': 'git lfs pull', 'missing': 'found nothing',
    'folder': 'found a folder', 'truncated_zip': 'truncated', 'flipped_byte': 'checksum',
}.items())
def test_the_error_names_what_was_found(path, damage, message):
    DAMAGES[damage](path)
    error = one_line_error(checkpoint.check_file, path)
    assert message in error and str(path) in error


@pytest.mark.parametrize('changes', [
    dict(depths=(1, 1, 3, 1)), dict(dims=(8, 16, 24, 40)), dict(small_kernel_size=0), dict(points_divisor=8),
    dict(mlp_ratio=2.)])
def test_the_file_of_another_variant(path, changes):
    message = one_line_error(create, path, **changes)
    assert 'the checkpoint does not fit the model: ' in message and 'tensors missing' in message


def test_an_undeclared_number_of_classes_is_reported(path):
    message = one_line_error(create, path, num_classes=1000, file_classes=1000)
    assert 'head.fc.weight expected (1000, 32), got (10, 32)' in message


# --- the functions ---


def test_every_name_of_the_release_is_converted(released):
    model = timm.create_model('smpconv_t', num_classes=10, **TINY)
    converted = checkpoint.convert_original(released)
    assert converted.keys() == model.state_dict().keys()
    assert checkpoint.is_original(released) and not checkpoint.is_original(converted)
    assert checkpoint.describe_mismatch(converted, model) is None
    left_out = [key for key in released if key.endswith('kernel_coord')]
    assert len(converted) == len(released) - len(left_out) and len(left_out) == 5


def test_one_point_and_one_channel_keep_their_dimensions():
    converted = checkpoint.convert_original({
        'large_kernel.smp.conv.weight_coord': torch.zeros(1, 1, 2),
        'large_kernel.smp.conv.radius': torch.zeros(1, 1, 1, 1),
        'large_kernel.smp.conv.weights': torch.zeros(1, 1, 1),
    })
    assert [tuple(value.shape) for value in converted.values()] == [(1, 2), (1,), (1, 1)]


def test_state_dict_is_selected():
    a, b, c = ({'x': torch.full((1,), float(i))} for i in range(3))
    select = checkpoint.select_state_dict
    assert select({'state_dict': a, 'state_dict_ema': b}) == (b, 'state_dict_ema')
    assert select({'model': a, 'model_ema': c}) == (c, 'model_ema')
    assert select({'state_dict': a, 'state_dict_ema': b}, use_ema=False) == (a, 'state_dict')
    assert select({'state_dict': a, 'state_dict_ema': None}) == (a, 'state_dict')
    assert select(a) == (a, '')
    assert select({'module._orig_mod.x': a['x'], 'note': 'text'}) == (a, '')


def test_mismatch_counts_and_shows():
    model = torch.nn.Linear(2, 3)
    state_dict = {'weight': torch.zeros(3, 5), 'other': torch.zeros(1)}
    assert checkpoint.describe_mismatch(state_dict, model) == (
        '1 of 2 tensors missing, 1 unexpected, 1 of another shape '
        '(weight expected (3, 2), got (3, 5); no bias; unknown other)')
    assert checkpoint.describe_mismatch(state_dict, model, ignore=('weight', 'bias', 'other')) is None


@pytest.mark.parametrize('wrap, named', [
    (lambda state: {'n_averaged': torch.tensor(3), **{f'module.{key}': value for key, value in state.items()}},
     'AveragedModel'),
    (lambda state: {'state_dict': {f'model.{key}': value for key, value in state.items()}, 'epoch': 1}, 'Lightning'),
    (lambda state: {'state_dict': {f'model._orig_mod.{key}': value for key, value in state.items()}}, 'Lightning'),
    (lambda state: {key: value.float() for key, value in state.items()}, 'num_batches_tracked'),
])
def test_weights_of_other_trainers(wrap, named, caplog):
    """torch.optim.swa_utils, Lightning, and timm's avg_checkpoints.py, which averages counts too."""
    model = timm.create_model('smpconv_nano', num_classes=2)
    state = randomize_(model).state_dict()
    other = timm.create_model('smpconv_nano', num_classes=2)
    load_into(other, wrap(state))
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    assert len(caplog.records) == 1 and named in caplog.text
