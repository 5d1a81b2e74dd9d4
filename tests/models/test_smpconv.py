"""The networks: sizes, outputs of the release, options, and timm's interface."""
import math
from functools import partial

import pytest
import timm
import torch
from common import assert_frozen, randomize_, relative_error, released
from nets import GOLDEN, GOLDEN_MOBILE, network, tiny
from timm.layers import DropPath, GroupNorm, LayerNorm2d
from timm.models import group_parameters
from torch import nn

from smpconv_models import SMPConvNet
from smpconv_models.layers import ReparamLargeKernelConv, SMPDepthwiseConv2d
from smpconv_models.models import smpconv
from smpconv_models.models.smpconv import checkpoint_filter_fn

NAMES = timm.list_models('smpconv*', exclude_filters='smpconv_cifar')  # another architecture
def rounded(tensor):
    """Return a tolerance for float32 results in another order of summation, through a few dozen layers."""
    return 1e-5 * tensor.abs().max().item()


# --- variants ---


@pytest.mark.parametrize(('name', 'kernel_sizes', 'drop_path', 'divisor'), [
    ('smpconv_t', (31, 29, 27, 13), 0.1, 4),
    ('smpconv_b', (31, 29, 27, 13), 0.5, 4),
    ('smpconv_mobile31', (31, 29, 27, 13), 0., 8),
    ('smpconv_mobile51', (51, 49, 47, 13), 0., 8),
])
def test_configurations_of_the_paper(name, kernel_sizes, drop_path, divisor):
    model = timm.create_model(name, device='meta')
    for stage, kernel_size in zip(model.stages, kernel_sizes):
        for layer in stage.modules():
            if isinstance(layer, ReparamLargeKernelConv):
                assert layer.large.conv.kernel_size == kernel_size
                assert layer.large.conv.coords.shape == (kernel_size ** 2 // divisor, 2)
                assert layer.small.conv.kernel_size == (5, 5)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert max(rates, default=0.) == pytest.approx(drop_path)


@pytest.mark.parametrize('name', NAMES)
def test_default_cfg(name):
    model = timm.create_model(name, device='meta')
    cfg = model.pretrained_cfg
    assert cfg['tag'] == ('in1k' if name in ('smpconv_t', 'smpconv_b') else 'untrained')
    assert model.get_submodule(cfg['classifier']) is model.get_classifier()
    assert isinstance(model.get_submodule(cfg['first_conv']), nn.Conv2d)
    height, width = cfg['input_size'][1:]
    reduction = model.feature_info[-1]['reduction']
    assert cfg['pool_size'] == (height // reduction, width // reduction)
    assert cfg['license'] == 'mit' and '2304.02330' in cfg['paper_ids']


@pytest.mark.parametrize('name', ['smpconv_nano', 'smpconv_t', 'smpconv_cifar'])
def test_state_dict_is_frozen(name):
    """Saved files must keep loading."""
    assert_frozen(name, timm.create_model(name, device='meta'))


# --- the release ---


@pytest.mark.parametrize(('name', 'config'), [
    ('imagenet_tiny', GOLDEN), ('imagenet_tiny_mobile', dict(GOLDEN_MOBILE, points_divisor=8, mlp_ratio=2.))])
def test_outputs_of_the_release(golden, name, config):
    data, model = golden(name), SMPConvNet(**config).eval()
    model.load_state_dict(checkpoint_filter_fn(released(data), model))
    with torch.no_grad():
        stages = model.forward_intermediates(data['input'], intermediates_only=True)
        logits = model(data['input'])
    assert len(stages) == 4
    for i, stage in enumerate(stages):
        assert relative_error(stage, data[f'stage.{i}']) < 1e-5
    assert relative_error(logits, data['logits']) < 1e-5


# --- options ---


def test_no_classes_returns_pooled_features():
    model = tiny(num_classes=0).eval()
    x = torch.randn(2, 3, 32, 40)
    assert isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(model(x), model.forward_features(x).mean((2, 3)))
    assert model.num_features == model.head_hidden_size == 20
    model.reset_classifier(0, '')
    assert torch.equal(model(x), model.forward_features(x)) and model(x).shape == (2, 20, 1, 2)


@pytest.mark.parametrize(('global_pool', 'pooled'), [
    ('avg', lambda f: f.mean((2, 3))),
    ('max', lambda f: f.amax((2, 3))),
    ('avgmax', lambda f: 0.5 * (f.mean((2, 3)) + f.amax((2, 3)))),
    ('catavgmax', lambda f: torch.cat([f.mean((2, 3)), f.amax((2, 3))], 1)),
])
def test_pooling(global_pool, pooled):
    model = network(global_pool=global_pool)
    x = torch.randn(2, 3, 64, 96)
    features = model.forward_features(x)
    expected = pooled(features)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)
    torch.testing.assert_close(model(x), model.get_classifier()(expected))
    assert model.head_hidden_size == expected.shape[1] == model.get_classifier().in_features


def test_drop_rate_is_the_heads():
    model = tiny(drop_rate=0.5).train()
    features = torch.ones(1, 20, 2, 2)
    with torch.no_grad():
        model.get_classifier().weight.fill_(1.)
        outputs = {round(model.forward_head(features)[0, 0].item(), 3) for _ in range(20)}
        model.eval()
        assert model.forward_head(features)[0, 0] == 20.
    assert len(outputs) > 1


def test_drop_path_rises_linearly_and_is_shared_in_a_block():
    model = tiny(depths=(2, 1, 2, 2), drop_path_rate=0.3)
    rates = [
        [getattr(part.drop_path, 'drop_prob', 0.) for part in (block.mixer, block.ffn)]
        for stage in model.stages for block in stage.blocks
    ]
    assert all(mixer == ffn for mixer, ffn in rates)
    assert [mixer for mixer, _ in rates] == pytest.approx([0.3 * i / 6 for i in range(7)])


@pytest.mark.parametrize('stem_stride', [1, 2, 4])
def test_stem_stride(stem_stride):
    model = tiny(stem_stride=stem_stride).eval()
    outputs = model.forward_intermediates(torch.randn(1, 3, 32, 64), intermediates_only=True)
    for info, output in zip(model.feature_info, outputs):
        assert output.shape[2:] == (32 // info['reduction'], 64 // info['reduction'])
    assert [info['reduction'] for info in model.feature_info] == [stem_stride * 2 ** i for i in range(4)]


@pytest.mark.parametrize('output_stride', [8, 16])
def test_output_stride_computes_the_same_values_more_densely(output_stride):
    """Including the border: padding agrees as well."""
    plain = randomize_(tiny().double()).eval()
    dense = randomize_(tiny(output_stride=output_stride).double()).eval()
    assert dense.feature_info[-1]['reduction'] == output_stride
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        for a, b, info, dense_info in zip(
                plain.forward_intermediates(x, intermediates_only=True),
                dense.forward_intermediates(x, intermediates_only=True),
                plain.feature_info, dense.feature_info):
            step = info['reduction'] // dense_info['reduction']
            assert b.shape[2:] == tuple(size * step for size in a.shape[2:])
            torch.testing.assert_close(b[:, :, ::step, ::step], a, rtol=0, atol=1e-12)


@pytest.mark.parametrize('norm_layer', [
    GroupNorm, 'groupnorm', 'layernorm2d', LayerNorm2d, lambda channels: nn.GroupNorm(2, channels),
    partial(GroupNorm, num_groups=4), partial(nn.BatchNorm2d, momentum=0.2)])
def test_norm_layer(norm_layer):
    """By class, name, function and partial; every norm of the network is of that kind."""
    if norm_layer in (GroupNorm, 'groupnorm'):
        kwargs = dict(dims=(32, 32, 64, 64))  # 32 groups by default
    else:
        kwargs = {}
    model = tiny(norm_layer=norm_layer, **kwargs)
    kind = type(model.norm)
    norms = [module for name, module in model.named_modules() if name.split('.')[-1] == 'norm']
    assert all(type(norm) is kind for norm in norms)
    if kind is not nn.BatchNorm2d:
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    model(torch.randn(2, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize('act_layer', ['silu', nn.SiLU, partial(nn.SiLU, inplace=True)], ids=str)
def test_act_layer(act_layer):
    model = tiny(act_layer=act_layer, ffn_act_layer='relu6')
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if name.split('.')[-1] == 'act'}
    assert kinds['stem.0.act'] == kinds['stages.1.downsample.0.act'] == 'SiLU'
    assert kinds['stages.0.blocks.0.mixer.act'] == kinds['stages.0.blocks.0.mixer.pw1.act'] == 'SiLU'
    assert kinds['stages.0.blocks.0.ffn.pw1.act'] == 'ReLU6'
    assert 'ReLU' not in kinds.values() and 'GELU' not in kinds.values()
    assert torch.isfinite(model(torch.randn(2, 3, 32, 32))).all()


@pytest.mark.parametrize('small_kernel_size', [0, 3])
def test_small_kernel(small_kernel_size):
    layers = [module for module in tiny(small_kernel_size=small_kernel_size).modules()
              if isinstance(module, ReparamLargeKernelConv)]
    assert layers and all((layer.small is None) == (small_kernel_size == 0) for layer in layers)


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(stem_stride=3), 'stem_stride must be 1, 2 or 4, got 3'),
    (dict(output_stride=4), 'output_stride must be 8, 16 or 32, got 4'),
    (dict(depths=(1, 1, 1)), 'depths, dims and kernel_sizes must have one entry for each stage, got 3, 4 and 4'),
    (dict(depths=(), dims=(), kernel_sizes=()), 'there must be at least one stage, got empty depths'),
    (dict(dims=(8,) * 5), 'depths, dims and kernel_sizes must have one entry for each stage, got 4, 5 and 4'),
    (dict(kernel_sizes=(9, 8, 5, 3)), 'kernel size must be odd and positive, got 8'),
    (dict(kernel_sizes=(9, 7, -5, 3)), 'kernel size must be odd and positive, got -5'),
    (dict(points_divisor=26),
     'points_divisor must leave at least one point of a 5x5 kernel, so lie in [1, 25], got 26'),
    (dict(points_divisor=0),
     'points_divisor must leave at least one point of a 9x9 kernel, so lie in [1, 81], got 0'),
    (dict(small_kernel_size=7), 'small_kernel_size must not exceed the large kernel, 5, got 7'),
    (dict(norm_layer='nonorm'), "norm_layer must be a callable or one of timm's names, got 'nonorm'"),
    (dict(act_layer='noact'), "act_layer must be a callable or one of timm's names, got 'noact'"),
    (dict(weight_init='none'), "weight_init must be '' or 'skip', got 'none'"),
    (dict(drop_rate=1.), 'drop_rate must lie in [0, 1), got 1.0'),
    (dict(drop_path_rate=-0.1), 'drop_path_rate must lie in [0, 1), got -0.1'),
    (dict(small_kernel_size=2), 'kernel size must be odd and positive, got 2'),
    (dict(features_only=True, out_indices=(0, 4)), 'out_indices must lie in [-4, 3], got (0, 4)'),
    (dict(features_only=True, out_indices=(-5,)), 'out_indices must lie in [-4, 3], got (-5,)'),
    (dict(features_only=True, out_indices=5), 'out_indices as a number of last stages must lie in [1, 4], got 5'),
    (dict(features_only=True, out_indices=0), 'out_indices as a number of last stages must lie in [1, 4], got 0'),
])
def test_bad_configuration(changes, message):
    with pytest.raises(ValueError) as error:
        tiny(**dict(dict(small_kernel_size=3), **changes))
    assert str(error.value) == message


@pytest.mark.parametrize('name', NAMES)
def test_unknown_keyword_raises(name):
    with pytest.raises(TypeError, match='not_an_argument'):
        timm.create_model(name, not_an_argument=1, device='meta')


# --- any size, dtype, layout, device ---


@pytest.mark.parametrize('size', [(1, 1), (3, 5), (7, 64), (33, 31)])
def test_any_input_size(size):
    model = network()
    y = model(torch.randn(1, 3, *size))
    assert y.shape == (1, 7)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize('batch_size', [1, 2])
def test_every_parameter_has_a_gradient(batch_size):
    model = randomize_(tiny()).train()
    model(torch.randn(batch_size, 3, 64, 64)).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None or not grad.any() or not grad.isfinite().all()] == []


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Each of about 60 layers rounds; 60 roundings, walking, are 8 of them."""
    model = network(dims=(24, 32, 40, 48))
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    y = model.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert relative_error(y, expected) < 8 * torch.finfo(dtype).eps


def test_autocast_trains_in_float32_parameters():
    model = network(dims=(24, 32, 40, 48))
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 8 * torch.finfo(torch.bfloat16).eps
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_channels_last():
    model = network()
    x = torch.randn(2, 3, 64, 96)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=rounded(expected))
    for stage in model.forward_intermediates(x, intermediates_only=True):
        assert stage.is_contiguous(memory_format=torch.channels_last)


def init_statistics(model):
    """Standard deviations by the kind of parameter; each kind is pooled over the network."""
    pooled = {}
    for module in model.modules():
        if isinstance(module, SMPDepthwiseConv2d):
            pooled.setdefault('points.weight', []).append(module.weight.flatten())
            pooled.setdefault('points.coords', []).append(module.coords.flatten())
            assert torch.equal(module.radius.detach(), torch.full_like(module.radius, 4 / module.kernel_size))
        elif isinstance(module, nn.Conv2d):
            pooled.setdefault('conv', []).append(module.weight.flatten())
            assert module.bias is None
        elif isinstance(module, nn.Linear):
            pooled.setdefault('linear', []).append(module.weight.flatten())
            assert (module.bias == 0).all()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
            assert (module.running_mean == 0).all() and (module.running_var == 1).all()
    return {kind: torch.cat(tensors) for kind, tensors in pooled.items()}


@pytest.mark.parametrize('created_on', ['cpu', 'meta'])
def test_initial_values(created_on):
    """For a new model, and for one made on the meta device, filled with garbage, and initialized."""
    if created_on == 'cpu':
        model = timm.create_model('smpconv_nano')
    else:
        model = timm.create_model('smpconv_nano', device='meta').to_empty(device='cpu')
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(77)
        model.init_weights()
    expected_std = {'points.weight': 0.02, 'points.coords': 0.2, 'conv': 0.02, 'linear': 0.02}
    statistics = init_statistics(model)
    assert statistics.keys() == expected_std.keys()
    for kind, values in statistics.items():
        std = expected_std[kind]
        assert abs(values.std() - std) < 5 * std / math.sqrt(2 * values.numel())
        assert abs(values.mean()) < 5 * std / math.sqrt(values.numel())


# --- timm's interface ---


def test_no_weight_decay_lists_exactly_the_points():
    model = timm.create_model('smpconv_t', device='meta')
    expected = {
        f'{name}.{parameter}' for name, module in model.named_modules() if isinstance(module, SMPDepthwiseConv2d)
        for parameter in ('coords', 'radius')
    }
    assert model.no_weight_decay() == expected
    assert len(expected) == 2 * (2 + 2 + 8 + 2)


@pytest.mark.parametrize('coarse', [False, True])
def test_every_parameter_is_in_a_group_in_forward_order(coarse):
    model = timm.create_model('smpconv_t', device='meta')
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    by_name = {name: index for index, names in groups.items() for name in names}
    assert by_name.keys() == dict(model.named_parameters()).keys()
    order = [by_name[name] for name, _ in model.named_parameters()]
    assert order == sorted(order)
    # the stem, the stages or their 14 blocks (a downsampling is with the block after it), norm and head
    assert len(groups) == (6 if coarse else 16)


def test_classifier_can_be_reset():
    model = tiny(dtype=torch.float64)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model.reset_classifier(3)
    assert model.num_classes == 3 and model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity) and model(x).shape == (2, 20)
    model.reset_classifier(5, 'catavgmax')
    assert model(x).shape == (2, 5) and model(x).dtype == torch.float64
    assert model.head_hidden_size == 40
    model.reset_classifier(0, '')
    assert model(x).shape == (2, 20, 1, 1)


def test_grad_checkpointing_changes_no_gradient(monkeypatch):
    calls, checkpoint_seq = [], smpconv.checkpoint_seq
    monkeypatch.setattr(smpconv, 'checkpoint_seq', lambda *args: calls.append(1) or checkpoint_seq(*args))
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model = randomize_(tiny(drop_path_rate=0.5)).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        model(x).square().sum().backward()
        assert len(calls) == (4 if enable else 0)  # one for each stage
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize('indices', [None, 1, 2, 4, [0], [1, 3], [-1], [0, -2]])
def test_forward_intermediates(indices):
    model = network()
    x = torch.randn(2, 3, 64, 96)
    every, y = [], model.stem(x)
    for stage in model.stages:
        y = stage(y)
        every.append(y)
    if indices is None:
        expected = every
    else:
        expected = every[-indices:] if isinstance(indices, int) else [every[i] for i in indices]
    final, got = model.forward_intermediates(x, indices=indices)
    assert torch.equal(final, model.forward_features(x))
    assert len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected))
    only = model.forward_intermediates(x, indices=indices, intermediates_only=True, stop_early=True)
    assert all(torch.equal(a, b) for a, b in zip(only, expected))


def test_forward_intermediates_norm_applies_to_the_last_stage_only():
    model = network()
    x = torch.randn(2, 3, 64, 96)
    plain = model.forward_intermediates(x, intermediates_only=True)
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], normed[:3]))
    assert torch.equal(normed[3], model.norm(plain[3]))


def test_forward_intermediates_stops_early():
    model = network()
    model.stages[2].register_forward_hook(lambda *args: pytest.fail('the third stage ran'))
    x = torch.randn(1, 3, 32, 32)
    final, got = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert torch.equal(final, got[1])


def test_forward_intermediates_has_one_format():
    with pytest.raises((AssertionError, ValueError), match='NCHW'):
        tiny().forward_intermediates(torch.randn(1, 3, 32, 32), output_fmt='NLC')


@pytest.mark.parametrize(('indices', 'kept'), [(1, 4), ([0, 1], 2), ([-2], 3), ([3], 4)])
def test_prune_intermediate_layers(indices, kept):
    model = network()
    x = torch.randn(2, 3, 64, 96)
    expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    last = model.forward_intermediates(x, intermediates_only=True)[kept - 1]
    taken = model.prune_intermediate_layers(indices)
    assert taken == [index % 4 for index in indices] if isinstance(indices, list) else taken == [3]
    assert len(model.stages) == kept
    got = model.forward_intermediates(x, indices=taken, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    expected_output = last if kept < 4 else model.norm(last)
    assert torch.equal(model(x), expected_output)
    assert model.num_features == model.feature_info[kept - 1]['num_chs']


def test_pruned_model_takes_a_new_classifier():
    model = tiny()
    model.prune_intermediate_layers([1])
    model.reset_classifier(3, 'avg')
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert model.head_hidden_size == model.num_features == 12


def test_pruning_can_keep_norm_and_head():
    model = network()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    model.prune_intermediate_layers([3], prune_norm=False, prune_head=False)
    assert torch.equal(model(x), expected)
    model.prune_intermediate_layers([3], prune_norm=True, prune_head=True)
    assert isinstance(model.norm, nn.Identity) and isinstance(model.get_classifier(), nn.Identity)
