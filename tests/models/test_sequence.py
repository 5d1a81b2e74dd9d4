"""Networks for sequences: parity with the original, sizes, their factory, other lengths, errors."""
import pytest
import timm
import torch
from common import assert_frozen, assert_other_shape_is_one_line, load_into, randomize_, relative_error, released

from smpconv_models.layers import points, smp_layers
from smpconv_models.models import SMPSequenceNet, create_sequence_model, list_sequence_models

TINY = dict(sequence_length=60, in_chans=2, num_classes=5, depth=2, dim=6, num_points=8)
GOLDEN = {'sequence_tiny': True, 'sequence_tiny_nofft': False}
# Counts of the original release.
PARAMETERS = {
    'smpconv_smnist': 370_960, 'smpconv_scifar10': 373_480, 'smpconv_characters': 373_790,
    'smpconv_speech_mfcc': 391_840, 'smpconv_speech': 370_960,
}
SHAPES = {
    'smpconv_smnist': (1, 784), 'smpconv_scifar10': (3, 1024), 'smpconv_characters': (3, 182),
    'smpconv_speech_mfcc': (20, 161), 'smpconv_speech': (1, 16000), 'smpconv_sdigits': (1, 64),
}


@pytest.mark.parametrize('method', ['direct', 'fft'])
@pytest.mark.parametrize('name', GOLDEN)
def test_logits_equal_the_original(golden, name, method):
    data = golden(name)
    model = SMPSequenceNet(**TINY, conv_bias=GOLDEN[name], method=method).eval()
    assert load_into(model, {'model': released(data), 'epoch': 3}) == 'model'
    with torch.no_grad():
        assert relative_error(model(data['input']), data['logits']) < 1e-5


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters_are_the_papers(name):
    model = create_sequence_model(name, device='meta')
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_all_variants():
    assert list_sequence_models() == sorted(SHAPES)
    assert not [name for name in SHAPES if timm.is_model(name)]
    for name, shape in SHAPES.items():
        model = create_sequence_model(name, device='meta', depth=1)
        assert (model.in_chans, model.sequence_length) == shape
        assert model(torch.zeros(2, *shape, device='meta')).shape == (2, 20 if name == 'smpconv_characters' else 10)


def test_arguments_reach_the_constructor():
    model = create_sequence_model(
        'smpconv_smnist', num_classes=3, sequence_length=50, in_chans=2, depth=1, kernel_size=20, small_kernel_size=0)
    assert model(torch.zeros(2, 2, 50)).shape == (2, 3)
    assert [layer.kernel_size for layer in smp_layers(model).values()] == [20, 20]
    with pytest.raises(TypeError, match='colour'):
        create_sequence_model('smpconv_smnist', colour='red')


def test_dropouts_are_the_recipes():
    model = create_sequence_model('smpconv_smnist')
    assert model.input_drop.p == 0.1 and model.blocks[0].drop1.p == 0
    assert create_sequence_model('smpconv_speech_mfcc', device='meta').blocks[0].drop1.p == 0.2
    assert create_sequence_model('smpconv_speech', device='meta', drop_rate=0.3).head_drop.p == 0.3


def test_unknown_names_have_the_nearest():
    with pytest.raises(ValueError, match=r"is named 'smpconv_smnits'.*did you mean smpconv_smnist\?"):
        create_sequence_model('smpconv_smnits')


def test_the_last_step_sees_all_others():
    model = randomize_(SMPSequenceNet(**TINY)).eval()
    x = torch.randn(1, 2, 60, requires_grad=True)
    model(x).sum().backward()
    assert (x.grad != 0).any(1).float().mean() > 0.9


@pytest.mark.parametrize('length', [59, 61, 1])
def test_other_lengths_are_refused(length):
    with pytest.raises(ValueError, match=f'expected sequences of 60 steps, got {length}: set_sequence_length'):
        SMPSequenceNet(**TINY)(torch.zeros(1, 2, length))


def test_another_length_resamples_the_kernels():
    """A sequence with every step twice, with kernels twice as dense, has nearly the same result."""
    torch.manual_seed(0)
    model = SMPSequenceNet(**TINY, small_kernel_size=0, init_radius=0.3).eval()
    with torch.no_grad():
        for layer in smp_layers(model).values():
            layer.weight.mul_(50)
            layer.coords.uniform_(-0.8, 0.8)
    x = torch.randn(1, 2, 8).repeat_interleave(8, -1)[..., :60].cumsum(-1) / 8
    expected = model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.set_sequence_length(120)
    assert {layer.kernel_size for layer in smp_layers(model).values()} == {120}
    twice = model(x.repeat_interleave(2, -1))
    assert 0 < relative_error(twice, expected) < 0.1
    with pytest.raises(ValueError, match='expected sequences of 120 steps, got 60'):
        model(x)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.set_sequence_length(60)
    assert torch.equal(model(x), expected)


def test_invalid_lengths():
    model = SMPSequenceNet(**TINY)
    with pytest.raises(ValueError, match='positive whole number, got 0'):
        model.set_sequence_length(0)
    with pytest.raises(ValueError, match='kernels of at least 5 elements, got 4'):
        model.set_sequence_length(4)
    assert model.sequence_length == 60 and next(iter(smp_layers(model).values())).kernel_size == 60
    fused = timm.utils.reparameterize_model(model.eval())
    with pytest.raises(ValueError, match=r'cannot be changed: the model is re-parameterized'):
        fused.set_sequence_length(120)


def test_reparameterized():
    model = randomize_(SMPSequenceNet(**TINY, conv_bias=True)).eval()
    x = torch.randn(2, 2, 60)
    with torch.no_grad():
        expected = model(x)
        fused = timm.utils.reparameterize_model(model)
        assert not smp_layers(fused)
        assert relative_error(fused(x), expected) < 1e-5
    assert not [module for module in fused.modules() if isinstance(module, torch.nn.BatchNorm1d)]


def test_initial_weights():
    torch.manual_seed(0)
    model = SMPSequenceNet(60, in_chans=2, dim=40, depth=2)
    small = model.blocks[1].conv1.small.conv.weight
    assert abs(small.std() - 0.02) < 0.002
    assert abs(model.head.weight.std() - 0.01) < 0.002 and not model.head.bias.any()
    empty = SMPSequenceNet(60, in_chans=2, dim=40, depth=2, device='meta').to_empty(device='cpu')
    with torch.no_grad():
        for value in [*empty.parameters(), *empty.buffers()]:
            value.fill_(torch.nan if value.is_floating_point() else -1)
    empty.init_weights()
    assert empty.state_dict().keys() == model.state_dict().keys()
    for name, value in empty.state_dict().items():
        expected = model.state_dict()[name].double()
        if expected.numel() > 1 and expected.std() > 0:
            assert 0.5 < value.double().std() / expected.std() < 2, name
        else:
            assert torch.equal(value.double(), expected), name


def test_classifier():
    model = SMPSequenceNet(**TINY)
    assert model.get_classifier() is model.head
    model.reset_classifier(7)
    assert model(torch.zeros(2, 2, 60)).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0)
    assert model(torch.zeros(2, 2, 60)).shape == (2, 6)
    features = model.forward_features(torch.zeros(2, 2, 60))
    assert features.shape == (2, 6, 60) and model.forward_head(features, pre_logits=True).shape == (2, 6)


def test_state_dict_is_frozen():
    """Saved files must keep loading."""
    assert_frozen('smpconv_speech_mfcc', create_sequence_model('smpconv_speech_mfcc', device='meta'))


def test_no_decay_on_points():
    model = SMPSequenceNet(**TINY)
    assert model.no_weight_decay() == {
        f'blocks.{block}.conv{conv}.large.conv.{name}'
        for block in range(len(model.blocks)) for conv in (1, 2) for name in ('coords', 'radius')}


@pytest.mark.parametrize('method', ['auto', 'fft'])
def test_modes(method):
    model = randomize_(SMPSequenceNet(**{**TINY, 'depth': 1}, method=method)).eval()
    x = torch.randn(2, 2, 60)
    expected = model(x)
    if method == 'auto':
        assert relative_error(torch.jit.script(model)(x), expected) < 1e-5
    assert relative_error(torch.compile(model, fullgraph=True, backend='aot_eager')(x), expected) < 1e-5
    exported = torch.export.export(model, (x,)).module()
    assert relative_error(exported(x), expected) < 1e-5


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(sequence_length=0), 'sequence_length must be a positive whole number, got 0'),
    (dict(depth=0), 'depth must be'), (dict(dim=-1), 'dim must be'),
    (dict(kernel_size=3), 'small_kernel_size must not exceed the large kernel, 3, got 5'),
    (dict(drop_rate=1.), r'^drop_rate must lie in \[0, 1\), got 1.0'),
    (dict(block_drop_rate=1.), r'block_drop_rate must lie in \[0, 1\), got 1.0'),
    (dict(input_drop_rate=-0.1), 'input_drop_rate must lie'),
    (dict(num_classes=None), 'num_classes must be a whole number of at least 0, got None'),
    (dict(num_classes=-1), 'num_classes must be a whole number of at least 0, got -1'),
])
def test_mistakes(changes, message):
    with pytest.raises(ValueError, match=message):
        SMPSequenceNet(**{**TINY, **changes})


def test_long_kernels_in_chunks_train_alike(monkeypatch):
    torch.manual_seed(0)
    model = SMPSequenceNet(**TINY)
    x = torch.randn(3, 2, 60)
    model(x).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(points, '_MAX_PAIRS', 800)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_files_trained_at_another_length_are_refused(golden):
    """Shapes of points do not depend on the length: those for 16,000 steps equal those for 784."""
    model = SMPSequenceNet(**{**TINY, 'sequence_length': 61})
    with pytest.raises(ValueError, match=r'of blocks\.0\.conv1\.large\.conv are for kernels of size 60, not of 61'):
        load_into(model, released(golden('sequence_tiny_nofft')))


def test_our_own_files_of_another_length_are_refused():
    model = SMPSequenceNet(**TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = randomize_(SMPSequenceNet(**{**TINY, 'sequence_length': 61}))
    with pytest.raises(ValueError, match='are for kernels of size 61, not of 60'):
        load_into(model, {'state_dict': other.state_dict()})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(('key', 'change'), [
    ('backbone.0.cconv1.Kernel.radius', lambda value: value.flatten()[0]),
    ('backbone.0.cconv1.Kernel.radius', lambda value: value.flatten()),
    ('backbone.0.cconv1.train_length', lambda value: value.repeat(2)),
    ('backbone.0.cconv1.train_length', lambda value: value[0]),
    ('backbone.9.cconv1.train_length', lambda value: torch.tensor([60])),
    ('finallyr.weight', lambda value: torch.tensor(1.)),
])
def test_files_of_other_shapes_are_one_line(golden, key, change):
    assert_other_shape_is_one_line(SMPSequenceNet(**TINY), released(golden('sequence_tiny')), key, change)


@pytest.mark.parametrize('shape', [(2, 60), (1, 3, 60), (60,)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r'expected sequences \(N, 2, 60\), got'):
        SMPSequenceNet(**TINY)(torch.zeros(shape))


@pytest.mark.parametrize(('name', 'radius', 'bias'), [
    ('smpconv_smnist', 0.002, False), ('smpconv_scifar10', 0.002, True), ('smpconv_characters', 0.012, True),
    ('smpconv_speech_mfcc', 0.012, True), ('smpconv_speech', 0.0002, False)])
def test_initial_radii_and_biases_are_the_originals(name, radius, bias):
    layer = create_sequence_model(name, depth=1).blocks[0].conv1.large.conv
    assert layer.radius.eq(torch.tensor(radius)).all() and (layer.bias is not None) == bias
