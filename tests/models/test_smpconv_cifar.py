"""The network for small images: parity with the original, size, timm's interface, errors."""
import json
import re

import pytest
import timm
import torch
from common import assert_other_shape_is_one_line, load_into, randomize_, relative_error, released

from smpconv_models import checkpoint, hub
from smpconv_models.layers import smp_layers
from smpconv_models.models import SMPResNet, _builder, identify

TINY = dict(depths=(1, 1), dims=(6, 12), kernel_size=9, num_points=8)


def create(**kwargs):
    return timm.create_model('smpconv_cifar', **{**TINY, **kwargs})


def test_parameters_are_the_papers():
    model = timm.create_model('smpconv_cifar', device='meta')
    assert sum(parameter.numel() for parameter in model.parameters()) == 489_646
    layers = smp_layers(model).values()
    assert {(layer.kernel_size, layer.coords.shape[1]) for layer in layers} == {(33, 16)}
    assert model.stages[0][0].drop1.p == 0.1


def test_initial_points_are_the_papers():
    layer = timm.create_model('smpconv_cifar', depths=(1,), dims=(24,)).stem.large.conv
    assert layer.radius.eq(torch.tensor(0.12)).all() and layer.coords_std == 0.05
    head = timm.create_model('smpconv_cifar', depths=(1,), dims=(400,), kernel_size=3).head.fc
    assert abs(head.weight.std() - (2 / 400) ** 0.5) < 0.01 and not head.bias.any()


@pytest.mark.parametrize('method', ['direct', 'fft'])
def test_logits_equal_the_original(golden, method):
    data = golden('cifar_tiny')
    model = create(method=method).eval()
    load_into(model, {'model': released(data)})
    with torch.no_grad():
        assert relative_error(model(data['input']), data['logits']) < 1e-5


def test_original_files_load_as_pretrained(golden, tmp_path):
    """Files of torch.save load unchanged; for other classes, only the classifier is new."""
    data = golden('cifar_tiny')
    file = tmp_path / 'model.pt'
    torch.save({'model': released(data), 'optimizer': {}, 'lr_scheduler': {}, 'epoch': 209}, file)
    model = create(pretrained=True, pretrained_cfg_overlay=dict(file=str(file))).eval()
    with torch.no_grad():
        assert relative_error(model(data['input']), data['logits']) < 1e-5
    other = create(pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), num_classes=3)
    assert torch.equal(other.stages[0][0].conv1.large.conv.coords, model.stages[0][0].conv1.large.conv.coords)
    assert other(data['input']).shape == (2, 3)


@pytest.mark.parametrize(('key', 'change'), [
    ('blocks.0.cconv1.Kernel.radius', lambda value: value.flatten()[0]),
    ('blocks.0.cconv1.Kernel.radius', lambda value: value.flatten()),
    ('cconv1.train_length', lambda value: value.repeat(2)),
    ('blocks.9.cconv1.train_length', lambda value: torch.tensor([9])),
    ('out_layer.weight', lambda value: torch.tensor(1.)),
])
def test_files_of_other_shapes_are_one_line(golden, key, change):
    assert_other_shape_is_one_line(create(), released(golden('cifar_tiny')), key, change)


def test_points_of_other_kernels_are_refused(golden, tmp_path):
    """Their shapes are the same."""
    with pytest.raises(ValueError, match=r'points of stem\.large\.conv are for kernels of size 9, not of 11'):
        load_into(create(kernel_size=11), released(golden('cifar_tiny')))
    torch.save(create(kernel_size=5).state_dict(), tmp_path / 'five.pt')
    with pytest.raises(ValueError, match=r'points of stem\.large\.conv are for kernels of size 5, not of 9'):
        create(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'five.pt')))


def test_blocks_are_divided_into_stages_by_their_channels():
    """The paper's network: 2, 3 and 2 blocks in one list."""
    model = timm.create_model('smpconv_cifar', device='meta')
    names = [
        (r'^stages\.(\d)\.(\d)', lambda m: f'blocks.{(0, 2, 5)[int(m[1])] + int(m[2])}'), ('^stem', 'conv1'),
        (r'^head\.fc', 'out_layer'), (r'\.shortcut\.', '.shortcut.0.'),
        (r'conv(\d)\.large\.conv\.weight', r'cconv\1.Kernel.weights'),
        (r'conv(\d)\.large\.conv\.coords', r'cconv\1.Kernel.weight_coord'),
        (r'conv(\d)\.large\.conv\.radius', r'cconv\1.Kernel.radius'),
        (r'conv(\d)\.small\.conv', r'cconv\1s'), (r'conv(\d)\.large\.norm', r'norm\1'),
        (r'conv(\d)\.small\.norm', r'norm\1s')]
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in names:
            key = re.sub(ours, theirs, key)
        state[key] = value
    assert 'blocks.6.cconv2.Kernel.weights' in state and 'cconv1.Kernel.radius' in state
    assert checkpoint.describe_mismatch(checkpoint.convert_original(state), model) is None


def test_features():
    model = create(features_only=True)
    assert model.feature_info.channels() == [6, 12] and model.feature_info.reduction() == [1, 1]
    assert [tuple(map_.shape) for map_ in model(torch.zeros(2, 3, 16, 12))] == [(2, 6, 16, 12), (2, 12, 16, 12)]
    assert create(features_only=True, out_indices=(1,)).feature_info.channels() == [12]


@pytest.mark.parametrize('out_indices', [(0, 5), 7, (-3,)])
def test_stages_that_do_not_exist(out_indices):
    with pytest.raises(ValueError, match='out_indices'):
        create(features_only=True, out_indices=out_indices)


def test_reparameterized():
    model = randomize_(create()).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        fused = timm.utils.reparameterize_model(model)
        assert relative_error(fused(x), expected) < 1e-5
    assert not smp_layers(fused)
    assert not [module for module in fused.modules() if isinstance(module, torch.nn.BatchNorm2d)]


def test_modes():
    model = randomize_(create()).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    assert relative_error(torch.jit.script(model)(x), expected) < 1e-5
    assert relative_error(torch.compile(model, fullgraph=True, backend='aot_eager')(x), expected) < 1e-5
    assert relative_error(torch.export.export(model, (x,)).module()(x), expected) < 1e-5
    model.set_grad_checkpointing()
    assert torch.equal(model(x), expected)


def test_intermediates_are_checkpointed_too():
    model, x = create(depths=(2, 2), block_drop_rate=0.), torch.randn(2, 3, 16, 16)

    def kept():
        """Number of elements saved for the backward pass, and the features."""
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t):
            features = model.forward_intermediates(x, intermediates_only=True)
        return sum(numbers), features

    plain, expected = kept()
    model.set_grad_checkpointing()
    checkpointed, features = kept()
    assert checkpointed < plain / 2
    for got, map_ in zip(features, expected):
        torch.testing.assert_close(got, map_)


def test_what_is_not_learned_stays():
    model = create(learned=('radius',))
    layer = model.stem.large.conv
    assert not layer.coords.requires_grad and layer.radius.requires_grad
    assert create().stem.large.conv.coords.requires_grad
    assert 'stem.large.conv.coords' in model.state_dict()


def test_pooling_and_classifier():
    model = create(num_classes=0, global_pool='')
    assert model(torch.zeros(2, 3, 9, 9)).shape == (2, 12, 9, 9)
    model.reset_classifier(5, 'avg')
    assert model(torch.zeros(2, 3, 9, 9)).shape == (2, 5) and model.get_classifier().out_features == 5


def test_created_on_meta_and_initialized_later():
    model = SMPResNet(**TINY, device='meta').to_empty(device='cpu')
    model.init_weights()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert model.stem.large.conv.radius.eq(torch.tensor(4 / 9)).all()


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(depths=(1,)), 'one entry for each stage, got 1 and 2'), (dict(depths=(), dims=()), 'got 0 and 0'),
    (dict(depths=(1, 0)), r'depths\[1\] must be a positive whole number, got 0'),
    (dict(dims=(0, 4)), r'dims\[0\] must be a positive whole number, got 0'),
    (dict(in_chans=0), 'in_chans must be a positive whole number, got 0'),
    (dict(kernel_size=(9, 9)), r'odd and positive, got \(9, 9\)'), (dict(small_kernel_size=True), 'got True'),
    (dict(kernel_size=8), 'odd and positive, got 8'), (dict(small_kernel_size=4), 'odd and positive, got 4'),
    (dict(small_kernel_size=11), 'must not exceed the large kernel, 9, got 11'),
    (dict(learned=('weight',)), r"learned must be some of \('coords', 'radius'\), got \('weight',\)"),
    (dict(learned='coords'), "got 'coords'"), (dict(block_drop_rate=1), r'block_drop_rate must lie in \[0, 1\), got 1'),
    (dict(num_classes=-2), 'num_classes must be a whole number of at least 0, got -2'),
])
def test_mistakes(changes, message):
    with pytest.raises(ValueError, match=message):
        create(**changes)


def folder_of(data, path, **config):
    """A folder with the original's weights, and these arguments in its config."""
    torch.save({'model': released(data), 'model_kwargs': TINY}, path / 'model.pt')
    done = hub.convert(path / 'model.pt', path / 'folder', 'smpconv_cifar')
    assert done.key == 'model' and done.difference < 1e-5
    file = path / 'folder' / 'config.json'
    content = json.loads(file.read_text())
    content['model_args'].update(config)
    file.write_text(json.dumps(content))
    return path / 'folder'


def test_converted_for_the_hub(golden, tmp_path):
    """A file of the original release as a folder that loads anywhere."""
    data = golden('cifar_tiny')
    with torch.no_grad():
        assert relative_error(hub.load(folder_of(data, tmp_path)).eval()(data['input']), data['logits']) < 1e-5


def test_files_of_the_paper_are_known_by_their_shapes():
    model = timm.create_model('smpconv_cifar', num_classes=7, device='meta')
    assert str(identify(model.state_dict())) == 'smpconv_cifar with 7 classes and 3 input channels'


@pytest.mark.parametrize(('config', 'message'), [
    (dict(kernel_size='9'), "expected a number as kernel_size, got '9'"),
    (dict(num_points=[8]), r'expected a number as num_points, got \[8\]'),
    (dict(dims=[6, 200]), r'model.safetensors: the checkpoint does not fit the model: .*of another shape'),
    (dict(kernel_size=9999), 'kernels of side 9999 take'),
    (dict(dims=[100_000, 100_000]), 'expected at most 2e\\+09 numbers'),
])
def test_a_config_is_validated_before_it_takes_memory(golden, tmp_path, monkeypatch, config, message):
    folder = folder_of(golden('cifar_tiny'), tmp_path, **config)
    build = _builder.build_model_with_cfg

    def built(*args, **kwargs):
        assert kwargs['device'] == 'meta'
        return build(*args, **kwargs)

    monkeypatch.setattr(_builder, 'build_model_with_cfg', built)
    with pytest.raises(ValueError, match=message):
        timm.create_model(f'local-dir:{folder}', pretrained=True)


def test_weights_of_four_channels_on_gray_images(tmp_path):
    model = create(in_chans=4)
    torch.save(model.state_dict(), tmp_path / 'four.pt')
    overlay = dict(file=str(tmp_path / 'four.pt'), input_size=(4, 32, 32))
    gray = create(in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay)
    image = torch.randn(1, 1, 9, 9)
    with torch.no_grad():
        assert relative_error(gray.eval()(image), model.eval()(image.expand(-1, 4, -1, -1))) < 1e-5


def test_gray_weights_take_gray_images_only(golden, tmp_path):
    gray = create(in_chans=1)
    torch.save({'state_dict': gray.state_dict(), 'model_kwargs': {**TINY, 'in_chans': 1}}, tmp_path / 'gray.pt')
    hub.convert(tmp_path / 'gray.pt', tmp_path / 'folder', 'smpconv_cifar')
    with pytest.raises(ValueError, match=r'weights of 1 input channels can be converted to 1 channel only, got 3'):
        hub.load(tmp_path / 'folder', in_chans=3)


def test_a_folder_with_arguments_of_another_network_is_refused(golden, tmp_path):
    with pytest.raises(ValueError, match='points_divisor'):
        hub.load(folder_of(golden('cifar_tiny'), tmp_path, points_divisor=9))
