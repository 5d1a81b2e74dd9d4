"""Convolution-norm-activation, the large kernel with its parallel, the residual blocks, and their folding."""
import copy
import re

import pytest
import torch
from common import has_batch_norm, randomize_, relative_error
from timm.layers import BatchNormAct2d, GroupNorm, freeze_batch_norm_2d
from timm.utils import reparameterize_model
from torch import nn

from smpconv_models.layers import (
    ConvFFN,
    ConvNormActBlock,
    DepthwiseConv1d,
    DepthwiseConv2d,
    LargeKernelBlock,
    ReparamLargeKernelConv,
    SMPDepthwiseConv2d,
)
from smpconv_models.layers.conv_norm import create_act, create_norm

# of float64: the folded sum is another order of the same terms
EXACT = 1e-12


def image(channels=4, **kwargs):
    return torch.randn(2, channels, 9, 7, dtype=torch.float64, **kwargs)


def depthwise(**changes):
    return DepthwiseConv2d(**dict(dict(
        in_channels=4, out_channels=4, kernel_size=7, padding='same', groups=4, dtype=torch.float64), **changes))


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(in_channels=0), 'in_channels must be a positive whole number, got 0'),
    (dict(groups='4'), "groups must be a positive whole number, got '4'"),
    (dict(dilation=0), 'dilation must be at least 1, got 0'),
    (dict(dilation=1.5), 'dilation must be one integer or two, got 1.5'),
    (dict(backend='x'), "backend must be 'auto' or one of ('cpu', 'triton', 'reference'), got 'x'"),
], ids=str)
def test_depthwise_conv_refuses_invalid_arguments(arguments, message):
    with pytest.raises(ValueError) as error:
        depthwise(**arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(stride=0), 'stride must be at least 1, got 0'), (dict(stride=1.5), 'stride must be one integer, got 1.5'),
    (dict(dilation=(1, 2)), 'dilation must be one integer, got (1, 2)'),
    (dict(padding=(1, 2)), 'padding must be one integer or a word, got (1, 2)'),
    (dict(padding=-1), 'padding must be at least 0, got -1'), (dict(padding='causal'), 'causal'),
], ids=str)
def test_depthwise_conv_of_sequences_refuses_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DepthwiseConv1d(4, 4, 7, groups=4, **arguments)


NOT_THE_OPERATION = [
    (dict(groups=1), 'groups 1 for 4 input channels'), (dict(out_channels=8), 'channel multiplier 2'),
    (dict(padding=3, padding_mode='circular'), "'circular'"),
]


@pytest.mark.parametrize(('changes', 'reason'), NOT_THE_OPERATION, ids=str)
def test_depthwise_conv_is_nn_conv_beyond_the_operation(changes, reason):
    """Libraries create layers of a layer's class; a named backend never falls back."""
    layer = depthwise(**changes)
    plain = nn.Conv2d(**dict(dict(in_channels=4, out_channels=4, kernel_size=7, padding='same', groups=4), **changes))
    plain.double().load_state_dict(layer.state_dict())
    x = image()
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(torch.jit.script(layer)(x), plain(x))
    with pytest.raises(ValueError, match=f"backend 'cpu' computes depthwise .* got .*{reason}"):
        depthwise(**changes, backend='cpu')


def test_a_padding_mode_that_is_set_afterwards_counts():
    layer = depthwise(backend='reference')
    layer.padding_mode = 'reflect'
    with pytest.raises(ValueError, match="got padding_mode 'reflect'"):
        layer(image())


def conv_norm(norm, channels=3, **kwargs):
    conv = nn.Conv2d(channels, 4, 3, padding=1, **{'bias': False, **kwargs})
    return randomize_(ConvNormActBlock(conv, norm, nn.ReLU()).double()).eval()


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, nn.SyncBatchNorm, lambda c: freeze_batch_norm_2d(nn.BatchNorm2d(c))])
def test_conv_norm_folds(norm):
    layer = conv_norm(norm(4)) if norm is not nn.SyncBatchNorm else conv_norm(nn.BatchNorm2d(4))
    x = image(3)
    expected = layer(x)
    if norm is nn.SyncBatchNorm:  # on a CPU it can be folded but not run
        layer = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    layer.reparameterize()
    assert isinstance(layer.norm, nn.Identity)
    assert relative_error(layer(x), expected) < EXACT


@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('groups', [1, 2, 4])
def test_grouped_convolutions_fold(groups, bias, affine):
    layer = conv_norm(nn.BatchNorm2d(4, affine=affine, eps=0.1), channels=4, groups=groups, bias=bias)
    x = image()
    expected = layer(x)
    layer.reparameterize()
    assert isinstance(layer.norm, nn.Identity) and relative_error(layer(x), expected) < EXACT


@pytest.mark.parametrize('norm', [
    lambda: GroupNorm(4, 2),
    lambda: nn.BatchNorm2d(4, track_running_stats=False),
    lambda: BatchNormAct2d(4),
])
def test_norms_that_cannot_be_folded_stay(norm):
    """Batch norm with its own activation, or without statistics, is not an affine map in evaluation."""
    layer = conv_norm(norm())
    x = image(3)
    expected, kind = layer(x), type(layer.norm)
    layer.reparameterize()
    assert type(layer.norm) is kind
    assert torch.equal(layer(x), expected)


def test_fuse_samples_the_kernel_once():
    layer = randomize_(SMPDepthwiseConv2d(4, 5, 6, dilation=2, backend='reference', dtype=torch.float64))
    x, fused = image(), layer.fuse()
    assert type(fused) is DepthwiseConv2d
    assert (fused.dilation, fused.backend, fused.bias) == ((2, 2), 'reference', None)
    assert torch.equal(fused(x), layer(x))


def large_kernel(**kwargs):
    arguments = dict(channels=4, kernel_size=7, num_points=9, dtype=torch.float64)
    return randomize_(ReparamLargeKernelConv(**dict(arguments, **kwargs))).eval()


def fused_and_compared(layer):
    """Return what the layer fuses into, whose output must be that of the layer."""
    x = image()
    expected = layer(x)
    fused = layer.fuse()
    assert relative_error(fused(x), expected) < EXACT
    return fused


@pytest.mark.parametrize('changes', [
    {}, dict(small_kernel_size=0), dict(small_kernel_size=7), dict(small_kernel_size=1), dict(dilation=2),
    dict(norm_layer=nn.Identity)], ids=str)
def test_large_kernel_fuses_into_one_convolution(changes):
    assert type(fused_and_compared(large_kernel(**changes))) is DepthwiseConv2d


def test_large_kernel_with_norms_of_two_kinds():
    """One branch folds, the other cannot: nothing is merged and nothing is lost."""
    layer = large_kernel()
    layer.small.norm = randomize_(GroupNorm(4, 2).double())
    for _ in range(2):  # the second time changes nothing
        assert fused_and_compared(layer) is layer


def block(kind, **kwargs):
    if kind is LargeKernelBlock:
        kwargs = dict(dict(dim=4, kernel_size=7, num_points=9), **kwargs)
    else:
        kwargs = dict(dict(dim=4, mlp_ratio=2.5), **kwargs)
    return randomize_(kind(**kwargs, dtype=torch.float64)).eval()


def reparameterize_(module):
    """Do what timm's walk over a model does, for one block."""
    module.reparameterize()
    for name, child in module.named_children():
        if hasattr(child, 'fuse'):
            setattr(module, name, child.fuse())
        elif hasattr(child, 'reparameterize'):
            child.reparameterize()


@pytest.mark.parametrize('kind', [LargeKernelBlock, ConvFFN])
def test_blocks_fold(kind):
    layer = block(kind)
    x = image()
    expected = layer(x)
    reparameterize_(layer)
    assert not has_batch_norm(layer)
    assert relative_error(layer(x), expected) < EXACT


def test_ffn_is_what_its_docstring_says():
    layer = block(ConvFFN)
    assert layer.pw1.conv.out_channels == 10  # int(4 * 2.5)
    x = image()
    y = nn.functional.gelu(layer.pw1.norm(layer.pw1.conv(layer.norm(x))))
    assert torch.equal(layer(x), x + layer.pw2.norm(layer.pw2.conv(y)))


@pytest.mark.parametrize('kind', [LargeKernelBlock, ConvFFN])
def test_drop_path_drops_whole_samples_in_training_only(kind):
    layer = block(kind, drop_path=0.5)
    x = torch.randn(64, 4, 3, 3, dtype=torch.float64)
    assert (layer(x) != x).flatten(1).any(1).all()
    torch.manual_seed(0)
    kept = (layer.train()(x) != x).flatten(1).any(1).sum()
    assert 16 < kept < 48  # 4 standard deviations about 32


@pytest.mark.parametrize('norm_layer', [nn.BatchNorm2d, 'batchnorm2d', lambda channels: nn.BatchNorm2d(channels)])
def test_create_norm(norm_layer):
    norm = create_norm(norm_layer, 5, device='meta', dtype=torch.float64)
    assert type(norm).__name__ == 'BatchNorm2d'
    assert (norm.num_features, norm.weight.device.type, norm.weight.dtype) == (5, 'meta', torch.float64)


def test_a_norm_on_the_meta_device_takes_no_memory():
    seen = []
    create_norm(lambda channels: seen.append(torch.empty(1).device.type) or nn.BatchNorm2d(channels), 5, device='meta')
    assert seen == ['meta']


@pytest.mark.parametrize('act_layer', [nn.GELU, 'gelu', lambda: nn.GELU()])
def test_create_act(act_layer):
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(create_act(act_layer)(x), nn.functional.gelu(x))


def test_a_shared_large_kernel_is_folded_once():
    shared = large_kernel()
    model = nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared)]).eval()
    x = image()
    expected = shared(x)
    for part in reparameterize_model(model):
        assert relative_error(part(x), expected) < EXACT
    shared.fuse()
    assert relative_error(shared(x), expected) < EXACT
    assert shared.fuse() is shared.fuse()


def test_points_are_sampled_once_in_any_parent():
    layer = randomize_(SMPDepthwiseConv2d(4, 5, 6, dtype=torch.float64))
    norm = randomize_(nn.BatchNorm2d(4, dtype=torch.float64))
    model = nn.Sequential(
        layer, ConvNormActBlock(copy.deepcopy(layer), norm), ConvNormActBlock(layer, nn.Identity())).eval()
    plain = reparameterize_model(model)
    assert not any(isinstance(module, SMPDepthwiseConv2d) for module in plain.modules())
    x = image()
    assert relative_error(plain(x), model(x)) < EXACT
