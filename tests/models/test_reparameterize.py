"""Folding whole networks by timm's own function."""
from copy import deepcopy

import pytest
import timm
import torch
from common import relative_error
from nets import network
from timm.layers import GroupNorm, freeze_batch_norm_2d
from timm.utils import reparameterize_model
from torch import nn

from smpconv_models.layers import SMPDepthwiseConv2d


def kinds(model, *classes):
    return [name for name, module in model.named_modules() if isinstance(module, classes)]


@pytest.mark.parametrize('kwargs', [
    {}, dict(small_kernel_size=0), dict(output_stride=8), dict(output_stride=16), dict(drop_path_rate=0.2),
    dict(num_classes=0, global_pool=''), dict(stem_stride=1)], ids=str)
def test_same_function(kwargs):
    """Differences that rounding hides in float32: 1e-12 leaves no room for a wrong border or epsilon."""
    model, x = network(dtype=torch.float64, **kwargs), torch.randn(2, 3, 40, 56, dtype=torch.float64)
    expected = model(x)
    state_dict = deepcopy(model.state_dict())
    folded = reparameterize_model(model)
    assert relative_error(folded(x), expected) < 1e-12
    assert kinds(folded, nn.BatchNorm2d) == ['norm'] and kinds(folded, SMPDepthwiseConv2d) == []
    assert len(list(folded.modules())) < len(list(model.modules()))
    # the model itself is left as it was
    assert all(torch.equal(value, state_dict[key]) for key, value in model.state_dict().items())


def test_idempotent():
    model = network()
    assert reparameterize_model(model, inplace=True) is model
    first, second = model.state_dict(), reparameterize_model(model).state_dict()
    assert list(first) == list(second) and kinds(model, nn.BatchNorm2d) == ['norm']
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('flag', [True, False])
def test_keeps_dtype_requires_grad_and_training_flag(flag, dtype):
    folded = reparameterize_model(network().to(dtype).requires_grad_(flag).train(flag))
    assert {value.dtype for value in folded.state_dict().values() if value.is_floating_point()} == {dtype}
    assert {parameter.requires_grad for parameter in folded.parameters()} == {flag}
    assert {module.training for module in folded.modules()} == {flag}


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    """Folding rounds kernels once more: a few roundings of the output, no more."""
    model = network(dims=(24, 32, 40, 48)).to(dtype)
    x = torch.randn(2, 3, 64, 64).to(dtype)
    exact = deepcopy(model).float()(x.float())
    assert relative_error(reparameterize_model(model)(x), exact) < 8 * torch.finfo(dtype).eps


def test_keeps_channels_last():
    model = network().to(memory_format=torch.channels_last)
    folded = reparameterize_model(model)
    for name, parameter in folded.named_parameters():
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last), name
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    assert relative_error(folded(x), model(x)) < 1e-5
    assert folded.forward_features(x).is_contiguous(memory_format=torch.channels_last)


def test_new_parameters_are_leaves_that_train():
    folded = reparameterize_model(network())
    folded(torch.randn(2, 3, 64, 64)).sum().backward()
    for parameter in folded.parameters():
        assert parameter.is_leaf and parameter.grad is not None


@pytest.mark.parametrize('name', ['smpconv_nano', 'smpconv_mobile51', 'smpconv_cifar'])
def test_on_meta(name):
    model = timm.create_model(name, device='meta').eval()
    folded = reparameterize_model(model)
    assert all(value.is_meta for value in folded.state_dict().values())
    assert kinds(folded, nn.BatchNorm2d) == ([] if name == 'smpconv_cifar' else ['norm'])
    assert folded(torch.empty(1, 3, 64, 64, device='meta')).shape == (1, model.num_classes)


def test_group_norm_stays_and_kernels_are_sampled_once():
    model = network(norm_layer=lambda channels: GroupNorm(channels, 4))
    x = torch.randn(2, 3, 64, 96)
    folded = reparameterize_model(model)
    assert kinds(folded, SMPDepthwiseConv2d) == []
    assert kinds(folded, GroupNorm) == kinds(model, GroupNorm)
    assert relative_error(folded(x), model(x)) < 1e-5
    twice = reparameterize_model(folded)
    assert all(torch.equal(value, twice.state_dict()[key]) for key, value in folded.state_dict().items())


def test_frozen_batch_norm_folds():
    model = network()
    x = torch.randn(2, 3, 64, 96)
    expected = model(x)
    folded = reparameterize_model(freeze_batch_norm_2d(model))
    assert relative_error(folded(x), expected) < 1e-5
    assert [name for name, module in folded.named_modules() if 'BatchNorm' in type(module).__name__] == ['norm']


def test_features_only_folds():
    model = network(features_only=True, out_indices=(1, 3))
    x = torch.randn(2, 3, 64, 96)
    folded = reparameterize_model(model)
    assert kinds(folded, nn.BatchNorm2d) == []
    for got, expected in zip(folded(x), model(x)):
        assert relative_error(got, expected) < 1e-5


@pytest.mark.slow  # 10 s of compiling
def test_folded_network_scripts_compiles_and_exports():
    torch.compiler.reset()
    folded = reparameterize_model(network())
    x = torch.randn(2, 3, 64, 64)
    expected = folded(x)
    for converted in (
            torch.jit.script(folded),
            torch.compile(folded, fullgraph=True, backend='aot_eager'),
            torch.export.export(folded, (x,), strict=True).module(),
    ):
        assert relative_error(converted(x), expected) < 1e-5
