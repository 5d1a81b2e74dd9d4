"""Adapters, pruning, norms of weights and parametrizations on the layers, then folding and clipping."""
import copy
import inspect
import logging
import pickle

import pytest
import torch
from common import randomize_, relative_error
from timm.layers import convert_sync_batchnorm
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from smpconv_models import accelerate_depthwise, clip_radius_
from smpconv_models.layers import (
    CausalConv1d,
    ConvNormActBlock,
    DepthwiseConv2d,
    FFTConv2d,
    LargeKernelBlock,
    ReparamConv,
    ReparamLargeKernelConv,
    SMPConv1d,
    SMPConv2d,
    SMPDepthwiseConv2d,
)

peft = pytest.importorskip('peft')
pytestmark = pytest.mark.filterwarnings(
    'ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning', 'ignore:.*groups > 1. Merging:UserWarning')

EXACT = 1e-12  # of float64: the same sums in another order


class Halved(nn.Module):
    """A parametrization that can be inverted exactly."""

    def forward(self, x):
        return x / 2

    def right_inverse(self, x):
        return x * 2


class Grown(nn.Module):
    """A parametrization that cannot be inverted."""

    def forward(self, x):
        return x + 3


def parametrized(layer, name='weight'):
    return parametrize.register_parametrization(layer, name, Halved())


TOOLS = {
    'parametrize': parametrized,
    'bias parametrized': lambda layer: parametrized(layer, 'bias'),
    'weight_norm': parametrizations.weight_norm,
    'old weight_norm': weight_norm,
    'spectral_norm': parametrizations.spectral_norm,
    'old spectral_norm': spectral_norm,
    'prune': lambda layer: prune.l1_unstructured(layer, 'weight', 0.5),
    'prune twice': lambda layer: prune.l1_unstructured(prune.l1_unstructured(layer, 'weight', 0.3), 'weight', 0.3),
    'bias pruned': lambda layer: prune.l1_unstructured(layer, 'bias', 0.5),
}
OF_WEIGHT = [name for name in TOOLS if 'bias' not in name]


def depthwise(kind=DepthwiseConv2d, **changes):
    return kind(**dict(dict(
        in_channels=4, out_channels=4, kernel_size=5, padding='same', groups=4, dtype=torch.float64), **changes))


LAYERS = {
    'DepthwiseConv2d': depthwise,
    'FFTConv2d': lambda: FFTConv2d(4, 4, 5, dtype=torch.float64),
    'CausalConv1d': lambda: CausalConv1d(4, 4, 5, dtype=torch.float64),
    'SMPDepthwiseConv2d': lambda: SMPDepthwiseConv2d(4, 5, 6, dtype=torch.float64),
    'SMPConv1d': lambda: SMPConv1d(4, 4, 9, 5, dtype=torch.float64),
    'SMPConv2d': lambda: SMPConv2d(4, 4, 5, 6, dtype=torch.float64),
}


def layer_and_input(name):
    size = (2, 4, 12) if '1d' in name else (2, 4, 9, 7)
    return randomize_(LAYERS[name]()), torch.randn(size, dtype=torch.float64)


def change_(module):
    """Change all parameters, like an optimizer step or a state dict."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(torch.rand_like(parameter) / 2 + 0.75)


# --- the tools on the layers ---


@pytest.mark.parametrize('tool', TOOLS)
def test_depthwise_conv_is_treated_as_nn_conv(tool):
    ours, plain = randomize_(depthwise()), depthwise(nn.Conv2d)
    plain.load_state_dict(ours.state_dict())
    results = []
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    for layer in (ours, plain):
        torch.manual_seed(0)
        layer = TOOLS[tool](layer)
        y = layer(x)
        results.append((layer.state_dict(), y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))))
    assert list(results[0][0]) == list(results[1][0])
    assert all(relative_error(got, expected) < EXACT for got, expected in zip(results[0][1:], results[1][1:]))


@pytest.mark.parametrize('tool', OF_WEIGHT)
@pytest.mark.parametrize('name', LAYERS)
def test_layers_train_under_the_tools(name, tool):
    layer, x = layer_and_input(name)
    layer = TOOLS[tool](layer)
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert any(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


@pytest.mark.parametrize('name', LAYERS)
def test_layers_are_copied_and_pickled(name):
    layer, x = layer_and_input(name)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(again) is type(layer) and torch.equal(again(x), layer(x))
    parametrized(layer)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize('name', ['DepthwiseConv2d', 'FFTConv2d', 'CausalConv1d'])
def test_torch_fuses_conv_and_norm(name):
    layer, x = layer_and_input(name)
    norm = randomize_((nn.BatchNorm1d if '1d' in name else nn.BatchNorm2d)(4).double()).eval()
    fused = fuse_conv_bn_eval(layer.eval(), norm)
    assert type(fused) is type(layer) and relative_error(fused(x), norm(layer(x))) < EXACT


@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
def test_sync_batch_norm_keeps_the_convolutions(convert):
    block = LargeKernelBlock(4, 7, 9)
    keys = list(block.state_dict())
    block = convert(block)
    assert isinstance(block.norm, nn.SyncBatchNorm) and type(block.large_kernel.large.conv) is SMPDepthwiseConv2d
    assert list(block.state_dict()) == keys


@pytest.mark.parametrize(('kind', 'base'), [
    (DepthwiseConv2d, nn.Conv2d), (FFTConv2d, nn.Conv2d), (CausalConv1d, nn.Conv1d)])
def test_arguments_are_those_of_the_base_class(kind, base):
    expected = list(inspect.signature(base).parameters)
    assert list(inspect.signature(kind).parameters)[:len(expected)] == expected


@pytest.mark.parametrize('kind', [FFTConv2d, CausalConv1d])
@pytest.mark.parametrize('changes', [
    dict(stride=2), dict(dilation=(2,)), dict(padding=1), dict(groups=2), dict(padding_mode='circular')], ids=str)
def test_arguments_with_one_value_refuse_others(kind, changes):
    name, = changes
    with pytest.raises(ValueError, match=f'^{name} of {kind.__name__} must be .*, got'):
        kind(4, 4, 5, **changes)


# --- adapters ---


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 7, padding=3, groups=4), nn.Conv2d(4, 4, 9, padding='same', groups=4),
        nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize('config', [
    peft.LoraConfig(r=4, target_modules=['1', '2']),
    peft.LoraConfig(r=8, target_modules=['1', '2', '3'], lora_dropout=0.),
    peft.LoHaConfig(r=2, target_modules=['1', '2'], use_effective_conv2d=True),
    peft.IA3Config(target_modules=['1', '2'], feedforward_modules=[])], ids=lambda config: config.peft_type.value)
def test_peft_on_an_accelerated_network(config):
    plain = randomize_(small_network())
    fast = copy.deepcopy(plain)
    assert accelerate_depthwise(fast).replaced == ('1', '2')
    plain, fast = (peft.get_peft_model(model, copy.deepcopy(config)).double() for model in (plain, fast))
    assert list(plain.state_dict()) == list(fast.state_dict())
    randomize_(fast, seed=1)
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(2, 3, 11, 10, dtype=torch.float64)
    for got, expected in zip(*(
            (y := model(x), *torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad]))
            for model in (fast, plain))):
        assert relative_error(got, expected) < EXACT


@pytest.mark.parametrize('name', ['FFTConv2d', 'CausalConv1d'])
def test_lora_on_the_other_convolutions(name):
    layer, x = layer_and_input(name)
    model = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(r=2, target_modules=['0'])).double()
    before = model(x)
    randomize_(model, seed=1)
    after = model(x)
    assert relative_error(after, before) > 0.01
    assert relative_error(model.merge_and_unload()(x), after) < EXACT


# --- folding ---


def conv_norm(kind='depthwise'):
    conv = depthwise() if kind == 'depthwise' else LAYERS[kind]()
    norm = (nn.BatchNorm1d if '1d' in kind else nn.BatchNorm2d)(4, dtype=torch.float64)
    return randomize_(ConvNormActBlock(conv, norm)).eval()


def evaluated(model, x):
    """Return the output in evaluation without gradients, so that PyTorch can copy its hooks' results."""
    with torch.no_grad():
        return model.eval()(x)


def image():
    return torch.randn(2, 4, 9, 7, dtype=torch.float64)


def folded_and_compared(model, x):
    """Return the folded model, whose output must be that of the model, which stays unchanged."""
    expected = evaluated(model, x)
    folded = reparameterize_model(model)
    assert relative_error(folded(x), expected) < EXACT
    assert relative_error(evaluated(model, x), expected) < EXACT
    return folded


@pytest.mark.parametrize('tool', TOOLS)
def test_effective_weights_are_folded(tool):
    model = nn.Sequential(conv_norm())
    TOOLS[tool](model[0].conv)
    folded = folded_and_compared(model, image())
    assert type(folded[0].conv) is DepthwiseConv2d and isinstance(folded[0].norm, nn.Identity)
    assert list(folded.state_dict()) == ['0.conv.weight', '0.conv.bias']


@pytest.mark.parametrize('tool', OF_WEIGHT)
@pytest.mark.parametrize('name', LAYERS)
def test_values_that_changed_since_the_last_forward_pass_are_folded(name, tool):
    model, (_, x) = nn.Sequential(conv_norm(name)), layer_and_input(name)
    TOOLS[tool](model[0].conv)
    evaluated(model, x)
    change_(model)
    folded = reparameterize_model(copy.deepcopy(model), inplace=True)
    assert relative_error(folded(x), evaluated(model, x)) < EXACT


@pytest.mark.parametrize('tool', ['parametrize', 'old weight_norm', 'prune'])
@pytest.mark.parametrize('with_norm', [True, False])
def test_whole_blocks_fold(tool, with_norm):
    norm = {} if with_norm else dict(norm_layer=lambda channels: nn.Identity())
    model = randomize_(nn.Sequential(LargeKernelBlock(4, 7, 9, **norm, dtype=torch.float64)))
    block = model[0]
    for conv in (block.pw1.conv, block.pw2.conv, block.large_kernel.large.conv, block.large_kernel.small.conv):
        TOOLS[tool](conv)
    folded = folded_and_compared(model, image())
    assert type(folded[0].large_kernel) is DepthwiseConv2d
    assert not any('BatchNorm' in type(module).__name__ for module in folded.modules())


def test_a_frozen_parametrized_weight_stays_frozen_and_norms_are_effective():
    model = nn.Sequential(conv_norm()).requires_grad_(False)
    parametrized(model[0].conv)
    parametrized(model[0].norm)
    folded = folded_and_compared(model.eval(), image())
    assert isinstance(folded[0].norm, nn.Identity)
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize('targets', [['pw1.conv'], ['small.conv'], ['pw1.conv', 'pw2.conv', 'small.conv']], ids=str)
@pytest.mark.parametrize('with_norm', [True, False])
def test_adapters_stay_and_are_named(targets, with_norm, caplog):
    norm = {} if with_norm else dict(norm_layer=lambda channels: nn.Identity())
    model = randomize_(nn.Sequential(LargeKernelBlock(4, 7, 9, **norm, dtype=torch.float64)))
    model = randomize_(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets)).double(), seed=1)
    folded_and_compared(model, image())
    messages = warnings_of(caplog)
    assert bool(messages) is with_norm and all('peft.tuners.lora.layer.Conv2d' in message for message in messages)


def test_ordinary_networks_are_folded_without_a_warning(caplog):
    reparameterize_model(nn.Sequential(LargeKernelBlock(4, 7, 9)).eval())
    assert warnings_of(caplog) == []


def test_a_module_to_save_of_peft_folds():
    model = nn.Sequential(randomize_(ReparamLargeKernelConv(4, 7, 9, dtype=torch.float64)), nn.Conv2d(4, 4, 1).double())
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=['1'], modules_to_save=['0'])).double()
    folded_and_compared(model, image())


def test_parallel_convolutions_of_sequences_fold():
    pair = ReparamConv(SMPConv1d(4, 4, 9, 5), CausalConv1d(4, 4, 3), lambda: nn.BatchNorm1d(4))
    model = randomize_(nn.Sequential(pair).double())
    for conv in (pair.large.conv, pair.small.conv):
        parametrizations.weight_norm(conv)
    assert type(folded_and_compared(model, torch.randn(2, 4, 12, dtype=torch.float64))[0]) is CausalConv1d


# --- radii ---


def out_of_range():
    return nn.Sequential(SMPDepthwiseConv2d(4, 7, 6, radius_range=(0.1, 0.5)))


def test_a_pruned_radius_is_clipped():
    model = out_of_range()
    prune.l1_unstructured(model[0], 'radius', 2)
    with torch.no_grad():
        model[0].radius_orig.copy_(torch.linspace(-1, 2, 6))
    clip_radius_(model)
    assert model[0].radius_orig.min() == 0.1 and model[0].radius_orig.max() == 0.5
    assert torch.equal(model[0].radius, model[0].radius_orig * model[0].radius_mask)


def test_a_parametrized_radius_is_clipped():
    model = out_of_range()
    parametrized(model[0], 'radius')
    original = model[0].parametrizations.radius.original
    with torch.no_grad():
        original.copy_(torch.linspace(-1, 2, 6))
    clip_radius_(model)
    assert model[0].radius.min() == 0.1 and model[0].radius.max() == 0.5
    assert model[0].parametrizations.radius.original is original
    before = original.clone()
    clip_radius_(model)
    assert torch.equal(original, before)


@pytest.mark.parametrize(('tool', 'reason'), [
    (lambda layer: parametrize.register_parametrization(layer, 'radius', Grown()), 'has no right_inverse'),
    (lambda layer: weight_norm(layer, 'radius'), 'computed before each forward pass'),
])
def test_a_radius_that_cannot_be_clipped_is_warned_of(tool, reason):
    model = out_of_range()
    tool(model[0])
    with torch.no_grad():
        for name, parameter in model[0].named_parameters():
            if 'radius' in name:
                parameter.fill_(1.)
    model(torch.randn(1, 4, 8, 8))
    with pytest.warns(UserWarning, match=rf"^radius of '0' is out of its range \(0.1, 0.5\) .*{reason}"):
        clip_radius_(model)


def test_a_radius_in_its_range_is_left_alone(recwarn):
    model = out_of_range()
    parametrize.register_parametrization(model[0], 'radius', nn.Sigmoid())
    with torch.no_grad():
        model[0].parametrizations.radius.original.fill_(-1.)
    clip_radius_(model)
    assert not recwarn.list


def test_clipping_does_not_advance_a_spectral_norm():
    model = out_of_range().train()
    spectral_norm(model[0])
    before = copy.deepcopy(model[0].weight_u)
    clip_radius_(model)
    assert torch.equal(model[0].weight_u, before)
