"""Replacement of other networks' depthwise convolutions: the same function, the same objects, and what is skipped."""
import copy
import pickle

import pytest
import timm
import torch
from common import randomize_, relative_error
from timm.layers import Conv2dSame
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from smpconv_models import DepthwiseConv1d, DepthwiseConv2d, SMPDepthwiseConv2d, accelerate_depthwise
from smpconv_models.layers.accelerate import DepthwiseReport

# of float64: sums of at most 31 * 31 terms in another order, through tens of layers
EXACT = 1e-12


def conv(**changes):
    """A depthwise 7x7 of four channels that would be replaced, or one with changes."""
    arguments = dict(in_channels=4, out_channels=4, kernel_size=7, padding=3, groups=4)
    return nn.Conv2d(**dict(arguments, **changes))


class ConvBN(nn.Sequential):
    def __init__(self, channels, kernel_size, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size, groups=channels, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(channels)


class RepLKBlock(nn.Module):
    """After RepLKNet's: a large kernel beside a small one, and a dilated one as UniRepLKNet has."""

    def __init__(self, channels=6):
        super().__init__()
        self.pw1 = nn.Conv2d(channels, channels, 1)
        self.lkb_origin = ConvBN(channels, 31, padding=15)
        self.small_conv = ConvBN(channels, 5, padding=2)
        self.dilated = ConvBN(channels, (7, 9), padding='same', dilation=(3, 2))
        self.pw2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        y = self.pw1(x).relu()
        y = self.lkb_origin(y) + self.small_conv(y) + self.dilated(y)
        return x + self.pw2(y.relu())


SMALL = dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), num_classes=3)


def convnext(**kwargs):
    return randomize_(timm.create_model('convnext_atto', **SMALL, **kwargs)).eval()


def timm_model(name):
    return randomize_(timm.create_model(name, num_classes=3).double()).eval()


NETWORKS = {
    'convnext_atto': (lambda: timm_model('convnext_atto'), 3, 12),
    'convnextv2_atto': (lambda: timm_model('convnextv2_atto'), 3, 12),
    'inception_next_atto': (lambda: timm_model('inception_next_atto'), 3, 24),
    'replk': (lambda: randomize_(RepLKBlock().double()).eval(), 6, 2),
    'replk in training': (lambda: randomize_(RepLKBlock().double()).train(), 6, 2),
}


def replaced(model, **kwargs):
    """A replaced copy of a model."""
    model = copy.deepcopy(model)
    assert accelerate_depthwise(model, **kwargs).replaced
    return model


def output_and_gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    return y, *torch.autograd.grad(y.square().sum(), (x, *model.parameters()))


# --- the same function ---


@pytest.mark.parametrize('name', NETWORKS)
def test_same_outputs_and_gradients(name):
    create, channels, count = NETWORKS[name]
    model = create()
    fast = copy.deepcopy(model)
    report = accelerate_depthwise(fast)
    assert len(report.replaced) == count
    assert sum(isinstance(module, DepthwiseConv2d) for module in fast.modules()) == count
    assert {module.training for module in fast.modules()} == {model.training}
    x = torch.randn(2, channels, 44, 37, dtype=torch.float64)
    results = zip(output_and_gradients(fast, x), output_and_gradients(model, x))
    assert max(relative_error(got, expected) for got, expected in results) < EXACT


def test_the_layers_compute_through_the_operation():
    """Otherwise equal outputs would prove nothing."""
    model = nn.Sequential(conv())
    accelerate_depthwise(model)
    assert '_ConvFunction' in model(torch.randn(1, 4, 8, 8)).grad_fn.name()


@pytest.mark.parametrize('changes', [
    {}, dict(bias=False), dict(padding='same'), dict(kernel_size=(1, 11), padding=(0, 5)),
    dict(kernel_size=(11, 1), padding=(5, 0)), dict(kernel_size=(7, 5), padding=(6, 2), dilation=(2, 1)),
    dict(kernel_size=1, padding='valid'), dict(stride=2), dict(stride=(1, 2)), dict(kernel_size=8, padding='same'),
    dict(kernel_size=(7, 8)), dict(padding=0), dict(padding='valid'), dict(padding=(3, 4)), dict(dilation=(1, 2)),
    dict(kernel_size=4, stride=4, padding=0),
], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_what_is_replaced(changes):
    model = nn.Sequential(conv(**changes, dtype=torch.float64))
    x = torch.randn(2, 4, 9, 14, dtype=torch.float64)
    fast = replaced(model, min_kernel_size=1, backend='reference')
    assert fast[0].backend == 'reference'
    for name in ('kernel_size', 'padding', 'dilation', 'groups', 'in_channels', 'out_channels', 'stride'):
        assert getattr(fast[0], name) == getattr(model[0], name)
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=EXACT)


@pytest.mark.parametrize('changes', [
    dict(padding=15), dict(padding='same', dilation=2), dict(padding=0, stride=3), dict(kernel_size=8, bias=False)],
    ids=str)
def test_sequences(changes):
    arguments = dict(in_channels=4, out_channels=4, kernel_size=31, groups=4, dtype=torch.float64)
    layer = nn.Conv1d(**dict(arguments, **changes))
    x = torch.randn(2, 4, 70, dtype=torch.float64)
    fast = replaced(nn.Sequential(layer))
    assert type(fast[0]) is DepthwiseConv1d and 'smpconv_models' in type(fast[0]).__module__
    for got, expected in zip(output_and_gradients(fast, x), output_and_gradients(layer, x)):
        assert relative_error(got, expected) < EXACT
    for convert in (torch.jit.script, torch.fx.symbolic_trace, lambda model: torch.export.export(model, (x,)).module()):
        assert relative_error(convert(fast)(x), layer(x)) < EXACT


def test_numbers_set_afterwards():
    """``F.conv2d`` takes numbers and lists where the constructor made pairs."""
    layer = conv(kernel_size=5, padding=0, dtype=torch.float64)
    layer.stride, layer.padding, layer.dilation = [1, 2], 4, 2
    x = torch.randn(2, 4, 9, 14, dtype=torch.float64)
    torch.testing.assert_close(replaced(nn.Sequential(layer), min_kernel_size=5)(x), layer(x), rtol=0, atol=EXACT)


# --- the same objects ---


@pytest.mark.parametrize('name', ['convnext_atto', 'inception_next_atto', 'replk in training'])
def test_same_parameters_keys_and_flags(name):
    model = NETWORKS[name][0]()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    accelerate_depthwise(model)
    after = dict(model.named_parameters())
    assert list(after) == list(parameters) and list(model.state_dict()) == keys
    assert all(after[name] is parameters[name] for name in after)


@pytest.mark.parametrize('training', [True, False])
def test_state_of_the_module_and_random_numbers_stay(training):
    layer = conv(dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_(False)
    layer._is_hf_initialized = True  # as other libraries mark modules
    strides, random_state = layer.weight.stride(), torch.random.get_rng_state()
    model = nn.Sequential(layer).train(not training)
    model[0].train(training)
    accelerate_depthwise(model)
    assert type(model[0]) is DepthwiseConv2d and model[0]._is_hf_initialized
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert model[0].training is training and model.training is not training
    assert model[0].weight.dtype == torch.bfloat16 and model[0].weight.stride() == strides
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_tied_weights_stay_tied():
    model = nn.Sequential(conv(), conv())
    model[1].weight = model[0].weight
    assert accelerate_depthwise(model).replaced == ('0', '1')
    assert model[0] is not model[1] and model[0].weight is model[1].weight


def test_a_module_of_two_names_is_replaced_by_one():
    layer, block = conv(), nn.Sequential(conv())
    model = nn.ModuleDict(dict(a=layer, b=layer, c=block, d=block))
    keys = list(model.state_dict())
    assert accelerate_depthwise(model).replaced == ('a', 'b', 'c.0', 'd.0')
    assert type(model['a']) is DepthwiseConv2d and model['a'] is model['b']
    assert type(model['c'][0]) is DepthwiseConv2d and model['c'] is model['d']
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize('name', ['convnext_atto', 'inception_next_atto'])
def test_meta(name):
    model = timm.create_model(name, device='meta')
    assert accelerate_depthwise(model).replaced
    assert all(value.is_meta for value in model.state_dict().values())
    assert model(torch.empty(1, 3, 64, 64, device='meta')).shape == (1, 1000)


def test_idempotent():
    model = convnext()
    accelerate_depthwise(model)
    modules = list(model.modules())
    assert accelerate_depthwise(model, backend='reference') == DepthwiseReport((), {})
    assert all(before is after for before, after in zip(modules, model.modules()))


# --- skipped modules and reasons ---


def changed(change):
    """A convolution that would be replaced, after a change of it."""
    layer = conv()
    change(layer)
    return layer


def hooked(register):
    return changed(lambda layer: getattr(layer, register)(lambda *args: None))


class Sharded(nn.Parameter):
    pass


SAME = dict(in_channels=4, out_channels=4, groups=4, kernel_size=7)

SKIPPED = [
    (lambda: conv(padding_mode='circular'), "padding_mode 'circular'"),
    (lambda: conv(out_channels=12), 'channel multiplier 3'),
    (lambda: conv(kernel_size=5, padding=2), 'kernel 5x5 below 7'),
    (lambda: conv(kernel_size=(1, 5), padding=(0, 2)), 'kernel 1x5 below 7'),
    (lambda: conv(kernel_size=4, stride=4, padding_mode='reflect'), "padding_mode 'reflect', kernel 4x4 below 7"),
    (lambda: nn.Conv1d(4, 4, 5, padding=2, groups=4), 'kernel 5 below 7'),
    (lambda: nn.LazyConv1d(4, 7, padding=3, groups=4), 'LazyConv1d, not nn.Conv1d itself'),
    (lambda: Conv2dSame(**SAME), 'Conv2dSame, not nn.Conv2d itself'),
    (lambda: parametrizations.weight_norm(conv()), 'ParametrizedConv2d, not nn.Conv2d itself'),
    (lambda: nn.LazyConv2d(4, 7, padding=3, groups=4), 'LazyConv2d, not nn.Conv2d itself'),
    (lambda: hooked('register_forward_hook'), 'forward hooks'),
    (lambda: hooked('register_forward_pre_hook'), 'forward pre hooks'),
    (lambda: hooked('register_full_backward_hook'), 'backward hooks'),
    (lambda: hooked('register_full_backward_pre_hook'), 'backward pre hooks'),
    (lambda: hooked('register_state_dict_post_hook'), 'state dict hooks'),
    (lambda: hooked('register_state_dict_pre_hook'), 'state dict pre hooks'),
    (lambda: hooked('register_load_state_dict_pre_hook'), 'load state dict pre hooks'),
    (lambda: hooked('register_load_state_dict_post_hook'), 'load state dict post hooks'),
    (lambda: changed(lambda layer: setattr(layer, 'forward', lambda x: x)), 'forward of its own'),
    (lambda: changed(nn.Module.compile), '_compiled_call_impl of its own'),
    (lambda: changed(lambda layer: layer.register_buffer('mask', torch.ones(1))), 'state other than weight and bias'),
    (lambda: changed(lambda layer: layer.register_module('a', nn.Identity())), 'state other than weight and bias'),
    (lambda: prune.random_unstructured(conv(), 'weight', 0.5), 'forward pre hooks, state other than weight and bias'),
    (lambda: changed(lambda layer: setattr(layer, 'weight', Sharded(layer.weight))), 'parameter of type Sharded'),
    (lambda: conv(bias=False, dtype=torch.complex64), 'parameter of dtype torch.complex64'),
    (lambda: torch.jit.script(conv()), 'a ScriptModule'),
    (lambda: torch.jit.trace(nn.Sequential(conv()), torch.ones(1, 4, 8, 8)), 'a ScriptModule'),
]


@pytest.mark.parametrize(('create', 'reason'), SKIPPED)
def test_what_is_skipped(create, reason):
    model = nn.Sequential(create(), conv())
    skipped = model[0]
    assert accelerate_depthwise(model) == DepthwiseReport(('1',), {'0': reason})
    assert model[0] is skipped and type(model[1]) is DepthwiseConv2d


def test_the_larger_side_counts():
    model = nn.Sequential(conv(kernel_size=(1, 11), padding=(0, 5)), conv(kernel_size=(9, 3), padding=(4, 1)))
    assert accelerate_depthwise(model, min_kernel_size=11) == DepthwiseReport(('0',), {'1': 'kernel 9x3 below 11'})


def test_other_layers_are_no_part_of_the_report():
    layers = [
        nn.Conv2d(4, 4, 7, padding=3), nn.Conv2d(4, 4, 7, padding=3, groups=2), nn.Conv2d(1, 1, 7, padding=3),
        nn.Conv2d(1, 8, 7, padding=3), nn.Conv1d(4, 4, 7, padding=3), nn.Conv3d(4, 4, 7, padding=3, groups=4),
        DepthwiseConv2d(4, 4, 7, padding='same', groups=4), DepthwiseConv1d(4, 4, 7, padding='same', groups=4),
        nn.ConvTranspose2d(4, 4, 7, padding=3, groups=4), SMPDepthwiseConv2d(4, 7, 5), nn.Sequential(),
    ]
    model = nn.Sequential(*layers)
    model.register_module('nothing', None)
    assert accelerate_depthwise(model) == DepthwiseReport((), {})
    assert all(before is after for before, after in zip(layers, model))


def test_a_lazy_model_after_its_first_run():
    model = nn.Sequential(nn.LazyConv2d(4, 7, padding=3, groups=4))
    model(torch.randn(1, 4, 8, 8))
    assert accelerate_depthwise(model).replaced == ('0',)


def test_the_report_is_a_table():
    model = nn.Sequential(
        *(conv() for _ in range(4)), conv(out_channels=8), conv(kernel_size=3, padding=1), conv(out_channels=8))
    assert str(accelerate_depthwise(model)) == '\n'.join([
        '    4  replaced                       0, ..., 3',
        '    2  skipped: channel multiplier 2  4, 6',
        '    1  skipped: kernel 3x3 below 7    5',
    ])
    assert str(accelerate_depthwise(nn.Sequential())) == 'no depthwise nn.Conv1d or nn.Conv2d'
    scripted = torch.jit.script(nn.Sequential(conv()))
    assert str(accelerate_depthwise(scripted)) == '    1  skipped: a ScriptModule  (the model)'


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(model=[nn.Identity()]), 'model must be a torch.nn.Module, got list'),
    (dict(model=nn.Conv2d), 'model must be a torch.nn.Module, got type'),
    (dict(model=conv()), 'model must be a network around the convolution, got the Conv2d itself, which cannot be '
                         'replaced in place; give nn.Sequential(conv)'),
    (dict(min_kernel_size=0), 'min_kernel_size must be a whole number of at least 1, got 0'),
    (dict(min_kernel_size=7.), 'min_kernel_size must be a whole number of at least 1, got 7.0'),
    (dict(min_kernel_size=(7, 7)), 'min_kernel_size must be a whole number of at least 1, got (7, 7)'),
    (dict(backend='x'), "backend must be 'auto' or one of ('cpu', 'triton', 'reference'), got 'x'"),
])
def test_errors_come_before_any_change(changes, message):
    model = nn.Sequential(conv())
    with pytest.raises(ValueError) as error:
        accelerate_depthwise(**dict(dict(model=model), **changes))
    assert str(error.value) == message
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize('backend', ['auto', 'cpu', 'reference'])
def test_known_backends_are_taken_on_any_device(backend):
    model = nn.Sequential(conv(device='meta'))
    accelerate_depthwise(model, backend=backend)
    assert model[0].backend == backend


# --- use of a network afterwards ---


def compile_whole(model):
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend='aot_eager')


@pytest.mark.parametrize('convert', [
    copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), torch.fx.symbolic_trace, torch.jit.script,
    lambda model: torch.jit.trace(model, torch.randn(1, 3, 40, 40)), compile_whole,
    lambda model: torch.export.export(model, (torch.randn(2, 3, 64, 48),), strict=True).module(),
], ids=['deepcopy', 'pickle', 'fx', 'script', 'trace', 'compile', 'export'])
def test_a_replaced_network_is_converted_as_before(convert):
    model, x = convnext(), torch.randn(2, 3, 64, 48)
    expected = model(x)
    assert relative_error(convert(replaced(model))(x), expected) < 1e-5


def test_a_compiled_network_may_be_replaced():
    """It is compiled once more then, with the operation in it."""
    graphs = []

    def backend(module, inputs):
        graphs.append(str(module.graph))
        return module.forward
    torch.compiler.reset()
    model, x = convnext().requires_grad_(False), torch.randn(2, 3, 64, 48)
    compiled_model = torch.compile(model, fullgraph=True, backend=backend)
    expected = compiled_model(x)
    assert accelerate_depthwise(compiled_model).replaced
    assert relative_error(compiled_model(x), expected) < 1e-5
    assert ['smpconv_models.depthwise_conv2d' in graph for graph in graphs] == [False, True]


def test_an_fx_graph_is_replaced():
    model, x = convnext(), torch.randn(2, 3, 64, 48)
    assert relative_error(replaced(torch.fx.symbolic_trace(model))(x), model(x)) < 1e-5


def test_reparameterization_by_timm():
    """FastViT merges its 7x7 convolutions with parallel ones, by the modules' attributes."""
    model, x = timm_model('fastvit_sa12'), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    folded = reparameterize_model(replaced(model, min_kernel_size=1))
    assert relative_error(folded(x), model(x)) < EXACT
    assert accelerate_depthwise(folded).replaced == ('stages.3.pos_emb.reparam_conv',)
    assert relative_error(folded(x), model(x)) < EXACT


def test_features_only():
    model, x = convnext(features_only=True), torch.randn(2, 3, 64, 48)
    fast = replaced(model)
    assert fast.feature_info.channels() == model.feature_info.channels()
    for got, expected in zip(fast(x), model(x)):
        assert relative_error(got, expected) < 1e-5


def test_gradient_checkpointing():
    model = convnext().train()
    fast = replaced(model)
    fast.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 48)
    results = zip(output_and_gradients(fast, x), output_and_gradients(model, x))
    assert max(relative_error(got, expected) for got, expected in results) < 1e-4
