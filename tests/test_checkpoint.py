"""The original release's files and ours through timm alone, and files that are not checkpoints."""
import argparse
import os
import pickle
import zipfile

import common
import pytest
import timm
import torch
from common import Call, load_into, one_line_error, randomize_, relative_error
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
def released(golden):
    """State dict in the release's names, an image, and the outputs of the release's code."""
    data = golden('imagenet_tiny')
    state_dict = common.released(data)
    return state_dict, data['input'], data['logits'], [data[f'stage.{i}'] for i in range(4)]


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
def test_release_file_gives_the_releases_outputs(tmp_path, released, prefix):
    state_dict, image, logits, _ = released
    model = create(release_file(tmp_path / 'smpconv.pth.tar', state_dict, prefix=prefix))
    assert relative_error(model(image), logits) < 1e-5


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_averaged_weights_are_preferred(tmp_path, released, prefix):
    state_dict, image, logits, _ = released
    model = create(release_file(tmp_path / 'smpconv.pth.tar', zeroed(state_dict), ema=state_dict, prefix=prefix))
    assert relative_error(model(image), logits) < 1e-5


def test_release_file_of_the_legacy_format(tmp_path, released):
    """Before torch 1.6 a file was a bare pickle, not a zip."""
    state_dict, image, logits, _ = released
    path = release_file(tmp_path / 'smpconv.pth.tar', state_dict, _use_new_zipfile_serialization=False)
    assert relative_error(create(path)(image), logits) < 1e-5


def test_bare_state_dict_and_safetensors(tmp_path, released):
    state_dict, image, logits, _ = released
    torch.save(state_dict, tmp_path / 'bare.pth')
    save_file(state_dict, tmp_path / 'bare.safetensors')
    for name in ('bare.pth', 'bare.safetensors'):
        assert relative_error(create(tmp_path / name)(image), logits) < 1e-5


def test_our_own_file(tmp_path, released):
    _, image, _, _ = released
    model = randomize_(timm.create_model('smpconv_t', num_classes=10, **TINY)).eval()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'ours.pth')
    save_file(model.state_dict(), tmp_path / 'ours.safetensors')
    for name in ('ours.pth', 'ours.safetensors'):
        assert torch.equal(create(tmp_path / name)(image), model(image))


def test_one_input_channel(tmp_path, released):
    """timm sums the first kernel over the colors: the outputs for gray images stay the same."""
    state_dict, image, _, _ = released
    path = release_file(tmp_path / 'smpconv.pth.tar', state_dict)
    grey = image.mean(1, keepdim=True)
    expected = create(path)(grey.expand(-1, 3, -1, -1))
    assert relative_error(create(path, in_chans=1)(grey), expected) < 1e-5


def test_other_classes(tmp_path, released):
    """The classifier is initialized, all other weights are the file's."""
    state_dict, image, _, stages = released
    model = create(release_file(tmp_path / 'smpconv.pth.tar', state_dict), num_classes=7)
    assert model(image).shape == (2, 7)
    assert relative_error(model.forward_intermediates(image, intermediates_only=True)[-1], stages[-1]) < 1e-5
    assert torch.equal(model.norm.weight, state_dict['norm.weight'])


def test_no_classes(tmp_path, released):
    state_dict, image, _, _ = released
    path = release_file(tmp_path / 'smpconv.pth.tar', state_dict)
    model, whole = create(path, num_classes=0), create(path)
    assert torch.equal(model(image), whole.forward_head(whole.forward_features(image), pre_logits=True))


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'getter'])
def test_features(tmp_path, released, feature_cls):
    state_dict, image, _, stages = released
    path = release_file(tmp_path / 'smpconv.pth.tar', state_dict)
    model = create(path, features_only=True, out_indices=(0, 3), feature_cls=feature_cls)
    outputs = model(image)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    assert len(outputs) == 2
    for got, expected in zip(outputs, (stages[0], stages[3])):
        assert relative_error(got, expected) < 1e-5


def test_checkpoint_path(tmp_path, released):
    """timm's scripts load weights after they create the model."""
    state_dict, image, logits, _ = released
    path = release_file(tmp_path / 'smpconv.pth.tar', state_dict)
    model = timm.create_model('smpconv_t', num_classes=10, **TINY)
    timm.models.load_checkpoint(model, str(path), filter_fn=smpconv_models.models.smpconv.checkpoint_filter_fn)
    assert relative_error(model.eval()(image), logits) < 1e-5


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


def assert_one_line(error, path=None):
    message = str(error.value)
    assert message and '\n' not in message
    if path is not None:
        assert str(path) in message


def select(path):
    return checkpoint.select_state_dict(checkpoint.load_file(path))


@pytest.mark.parametrize('load', [select, create])
@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_file_is_reported_in_one_line(tmp_path, released, damage, load):
    path = release_file(tmp_path / 'smpconv.pth.tar', released[0])
    DAMAGES[damage](path)
    one_line_error(load, path)


SAID = {
    'html': 'HTML', 'empty': 'is empty', 'lfs_pointer': 'git lfs pull', 'missing': 'found nothing',
    'folder': 'found a folder', 'truncated_zip': 'truncated', 'flipped_byte': 'checksum',
}


@pytest.mark.parametrize('damage', SAID)
def test_the_error_says_what_was_found(tmp_path, released, damage):
    path = release_file(tmp_path / 'smpconv.pth.tar', released[0])
    DAMAGES[damage](path)
    with pytest.raises(ValueError, match=SAID[damage]) as error:
        checkpoint.check_file(path)
    assert_one_line(error, path)


@pytest.mark.parametrize('keep', [0, 5, 100, -1])
def test_truncated_safetensors(tmp_path, released, keep):
    path = tmp_path / 'model.safetensors'
    save_file(released[0], path)
    path.write_bytes(path.read_bytes()[:keep])
    for load in (checkpoint.load_file, create):
        assert str(path) in one_line_error(load, path)


@pytest.mark.parametrize('new_format', [True, False])
def test_forbidden_global_is_not_executed(tmp_path, released, new_format):
    trap, path = tmp_path / 'trap', tmp_path / 'model.pth'
    torch.save(
        {'state_dict': released[0], 'args': Call(os.mkdir, str(trap))}, path, _use_new_zipfile_serialization=new_format)
    for load in (checkpoint.load_file, create):
        assert str(path) in one_line_error(load, path)
        assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # the trap itself works


def test_another_variants_file(tmp_path, released):
    path = release_file(tmp_path / 'smpconv.pth.tar', released[0])
    for changes in (
            dict(depths=(1, 1, 3, 1)), dict(dims=(8, 16, 24, 40)),
            dict(small_kernel_size=0), dict(points_divisor=8), dict(mlp_ratio=2.)):
        with pytest.raises(ValueError, match=r'the checkpoint does not fit the model: .*tensors missing') as error:
            create(path, **changes)
        assert_one_line(error)


def test_another_networks_file(tmp_path):
    torch.save(timm.create_model('resnet10t').state_dict(), tmp_path / 'resnet.pth')
    with pytest.raises(ValueError, match='does not fit') as error:
        create(tmp_path / 'resnet.pth')
    assert_one_line(error)


# --- the functions ---


def test_every_name_of_the_release_is_converted(released):
    state_dict = released[0]
    model = timm.create_model('smpconv_t', num_classes=10, **TINY)
    converted = checkpoint.convert_original(state_dict)
    assert converted.keys() == model.state_dict().keys()
    assert checkpoint.is_original(state_dict) and not checkpoint.is_original(converted)
    assert checkpoint.describe_mismatch(converted, model) is None
    left_out = [key for key in state_dict if key.endswith('kernel_coord')]
    assert len(converted) == len(state_dict) - len(left_out) and len(left_out) == 5


@pytest.mark.parametrize(('release_name', 'name', 'shape', 'our_shape'), [
    ('stem.2.conv.weight', 'stem.2.conv.weight', (8, 8, 1, 1), (8, 8, 1, 1)),
    ('stem.3.bn.running_var', 'stem.3.norm.running_var', (8,), (8,)),
    ('stages.2.blocks.2.prelkb_bn.bias', 'stages.2.blocks.1.mixer.norm.bias', (24,), (24,)),
    ('stages.2.blocks.3.preffn_bn.bias', 'stages.2.blocks.1.ffn.norm.bias', (24,), (24,)),
    ('stages.0.blocks.1.pw1.bn.weight', 'stages.0.blocks.0.ffn.pw1.norm.weight', (32,), (32,)),
    ('stages.0.blocks.0.large_kernel.smp.conv.weight_coord', 'stages.0.blocks.0.mixer.large_kernel.large.conv.coords',
     (1, 42, 2), (42, 2)),
    ('stages.0.blocks.0.large_kernel.smp.conv.radius', 'stages.0.blocks.0.mixer.large_kernel.large.conv.radius',
     (1, 42, 1, 1), (42,)),
    ('stages.0.blocks.0.large_kernel.smp.conv.weights', 'stages.0.blocks.0.mixer.large_kernel.large.conv.weight',
     (1, 8, 42), (8, 42)),
    ('stages.0.blocks.0.large_kernel.small_conv.conv.weight',
     'stages.0.blocks.0.mixer.large_kernel.small.conv.weight', (8, 1, 5, 5), (8, 1, 5, 5)),
    ('transitions.1.0.conv.weight', 'stages.2.downsample.0.conv.weight', (24, 16, 1, 1), (24, 16, 1, 1)),
    ('transitions.2.1.bn.bias', 'stages.3.downsample.1.norm.bias', (32,), (32,)),
    ('norm.weight', 'norm.weight', (32,), (32,)),
    ('head.bias', 'head.fc.bias', (10,), (10,)),
])
def test_names_and_shapes(release_name, name, shape, our_shape):
    tensor = torch.randn(shape)
    (converted_name, converted), = checkpoint.convert_original({release_name: tensor}).items()
    assert converted_name == name
    assert torch.equal(converted, tensor.reshape(our_shape)) and converted.shape == our_shape


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


@pytest.mark.parametrize(('content', 'message'), [
    ([1, 2], 'expected a checkpoint to be a dict, got list'),
    ({'epoch': 3, 'args': None}, "expected a state dict in the checkpoint, found the keys ['args', 'epoch']"),
])
def test_nothing_to_select(content, message):
    with pytest.raises(ValueError) as error:
        checkpoint.select_state_dict(content)
    assert str(error.value) == message


def test_mismatch_counts_and_shows():
    model = torch.nn.Linear(2, 3)
    state_dict = {'weight': torch.zeros(3, 5), 'other': torch.zeros(1)}
    assert checkpoint.describe_mismatch(state_dict, model) == (
        '1 of 2 tensors missing, 1 unexpected, 1 of another shape '
        '(weight expected (3, 2), got (3, 5); no bias; unknown other)')
    assert checkpoint.describe_mismatch(state_dict, model, ignore=('weight', 'bias', 'other')) is None


def test_load_into(tmp_path, released):
    state_dict, image, logits, _ = released
    path = release_file(tmp_path / 'smpconv.pth.tar', zeroed(state_dict), ema=state_dict)
    model = timm.create_model('smpconv_t', num_classes=10, **TINY).eval()
    assert load_into(model, checkpoint.load_file(path)) == 'state_dict_ema'
    assert relative_error(model(image), logits) < 1e-5
    assert load_into(model, checkpoint.load_file(path), use_ema=False) == 'state_dict'
    assert not model(image).any()


def test_load_into_another_model_changes_nothing(released):
    model = timm.create_model('smpconv_t', num_classes=7, **TINY)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match='does not fit') as error:
        load_into(model, released[0])
    assert_one_line(error)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_features_have_no_use_for_the_files_classes(tmp_path, released):
    """The file may have any number of classes, and the configuration another."""
    state_dict, image, _, stages = released
    backbone = timm.create_model(
        'smpconv_t', pretrained=True, features_only=True,
        pretrained_cfg_overlay=dict(file=str(release_file(tmp_path / 'smpconv.pth.tar', state_dict))), **TINY).eval()
    for given, expected in zip(backbone(image), stages):
        assert relative_error(given, expected) < 1e-5


@pytest.mark.parametrize('key', ['state_dict', ''])
def test_values_beside_the_weights_are_left_out(tmp_path, released, key):
    state_dict, image, logits, _ = released
    content = {**state_dict, 'note': 'x', 'numbers': {'a': 1}}
    torch.save({key: content} if key else content, tmp_path / 'weights.pth')
    assert relative_error(create(tmp_path / 'weights.pth')(image), logits) < 1e-5


@pytest.mark.parametrize('content', [{'state_dict_ema': 1, 'state_dict': {}}, {'state_dict': {1: torch.ones(1)}}])
def test_weights_without_names_are_refused(tmp_path, content):
    torch.save(content, tmp_path / 'weights.pth')
    with pytest.raises(ValueError, match=r'expected state_dict(_ema)? to be a dictionary of tensors by name') as error:
        create(tmp_path / 'weights.pth')
    assert_one_line(error)


def test_classes_that_nobody_declared_are_told(tmp_path, released):
    path = release_file(tmp_path / 'smpconv.pth.tar', released[0])
    with pytest.raises(ValueError) as error:
        create(path, num_classes=1000, file_classes=1000)
    assert 'head.fc.weight expected (1000, 32), got (10, 32)' in str(error.value) and '\n' not in str(error.value)


def test_a_new_classifier_is_drawn_though_nothing_else_is(tmp_path, released):
    path = release_file(tmp_path / 'smpconv.pth.tar', released[0])
    weight = torch.cat([create(path, num_classes=500).head.fc.weight for _ in range(4)])
    assert 0.019 < weight.std().item() < 0.021 and not create(path, num_classes=500).head.fc.bias.any()
    with pytest.raises(ValueError, match="weight_init must be '' or 'skip', got 'none'"):
        create(path, weight_init='none')


@pytest.mark.parametrize('wrap, named', [
    (lambda state: {'n_averaged': torch.tensor(3), **{f'module.{key}': value for key, value in state.items()}},
     'AveragedModel'),
    (lambda state: {'state_dict': {f'model.{key}': value for key, value in state.items()}, 'epoch': 1}, 'Lightning'),
    (lambda state: {'state_dict': {f'model._orig_mod.{key}': value for key, value in state.items()}}, 'Lightning'),
    (lambda state: {key: value.float() for key, value in state.items()}, 'num_batches_tracked'),
])
def test_what_other_trainers_save(wrap, named, caplog):
    """torch.optim.swa_utils, Lightning, and timm's avg_checkpoints.py, which averages counts too."""
    model = timm.create_model('smpconv_nano', num_classes=2)
    state = randomize_(model).state_dict()
    other = timm.create_model('smpconv_nano', num_classes=2)
    load_into(other, wrap(state))
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    assert len(caplog.records) == 1 and named in caplog.text


def test_weights_of_swa(tmp_path):
    """Weights saved by the class itself."""
    model = timm.create_model('smpconv_nano', num_classes=2)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    torch.save(averaged.state_dict(), tmp_path / 'swa.pth')
    other = timm.create_model('smpconv_nano', num_classes=2)
    load_into(other, checkpoint.load_file(tmp_path / 'swa.pth'))
    assert torch.equal(other.head.fc.weight, model.head.fc.weight)
