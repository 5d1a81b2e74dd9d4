"""FLOP counters on every model: they count all convolutions, and other counts are exact sums too."""
import copy
import re
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import smpconv_models
from smpconv_models.__main__ import count_macs
from smpconv_models.layers import CausalConv1d, FFTConv2d, SMPLayer, smp_layers
from smpconv_models.ops import depthwise_conv2d

calflops = pytest.importorskip('calflops')
ptflops = pytest.importorskip('ptflops')
thop = pytest.importorskip('thop')
torchinfo = pytest.importorskip('torchinfo')
torchsummary = pytest.importorskip('torchsummary')
FlopCountAnalysis = pytest.importorskip('fvcore.nn').FlopCountAnalysis

SMALL = {'smpconv_cifar': (3, 8, 8)}
SEQUENCE_LENGTH = 48
# widths and kernels as registered; every block of a stage has the same layers
SHORT = {name: dict(depths=(1, 1, 1, 1)) for name in timm.list_models('smpconv_[tbm]*')}
NAMES = (*timm.list_models('smpconv*'), *smpconv_models.list_sequence_models())
QUICK = ('smpconv_cifar', 'smpconv_nano', 'smpconv_t', 'smpconv_scifar10', 'smpconv_sdigits')
FORMS = ('points', 'reparameterized')

# Nothing of these is a convolution or a linear layer.
OTHERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.ReLU, nn.GELU, nn.AdaptiveAvgPool2d, nn.LayerNorm)


def build(name, form, device, **kwargs):
    if name in smpconv_models.list_sequence_models():
        model = smpconv_models.create_sequence_model(name, device=device, **kwargs)
    else:
        model = timm.create_model(name, device=device, **kwargs)
    model.eval()
    return timm.utils.reparameterize_model(model) if form == 'reparameterized' else model


def cases():
    for name in NAMES:
        marks = () if name in QUICK else pytest.mark.slow  # other sizes of the same layers
        yield from (pytest.param((name, form), marks=marks, id=f'{name}-{form}') for form in FORMS)


@pytest.fixture(scope='module', params=cases())
def built(request):
    name, form = request.param
    is_sequence = name in smpconv_models.list_sequence_models()
    kwargs = dict(sequence_length=SEQUENCE_LENGTH) if is_sequence else SHORT.get(name, {})
    meta = build(name, form, 'meta', **kwargs)
    shape = (meta.in_chans, SEQUENCE_LENGTH) if is_sequence else SMALL.get(name, (3, 32, 32))
    model = copy.deepcopy(meta).to_empty(device='cpu')  # faster than to sample weights, whose values do not count
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(1)
    return model, torch.randn(1, *shape), count_macs(meta, *shape)


@pytest.fixture
def case(built):
    """A model, a small input of batch size 1, the MACs of the model table."""
    model, x, macs = built
    return copy.deepcopy(model), x, macs


def outputs(model, x, kinds):
    """Modules of these kinds with their outputs."""
    found = []
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda module, inputs, output: found.append((module, output)))
    with torch.no_grad():
        model(x)
    return found


def bias_additions(model, x):
    kinds = (nn.modules.conv._ConvNd, nn.Linear, SMPLayer)
    return sum(y.numel() for module, y in outputs(model, x, kinds) if getattr(module, 'bias', None) is not None)


def sampling_macs(model):
    """Products of points' weights and tents, one for each weight and kernel element."""
    return sum(
        layer.weight.numel() * layer.kernel_size ** layer.coords.shape[-1] for layer in smp_layers(model).values())


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def num_trained(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# --- one call of each tool ---


def by_thop(model, x):
    others = {kind: lambda module, inputs, output: None for kind in OTHERS}
    return thop.profile(model, (x,), custom_ops=others, verbose=False)


def by_ptflops(model, x, backend):
    pytorch = dict(ignore_modules=OTHERS, backend_specific_config=dict(count_functional=False))
    return ptflops.get_model_complexity_info(
        model, tuple(x.shape[1:]), as_strings=False, print_per_layer_stat=False, backend=backend,
        **(pytorch if backend == 'pytorch' else {}))


def by_fvcore(model, x):
    analysis = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.by_operator()


def layers_and_sampling(counted):
    return counted['conv'] + counted['linear'], counted['matmul']


def by_calflops(model, x):
    return calflops.calculate_flops(model, args=[x], print_results=False, output_as_string=False)


def by_torch(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


def by_torchinfo(model, x):
    return torchinfo.summary(model, input_data=x, verbose=0)


def conv_flops_of_deepspeed(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Return the MACs as the profiler of DeepSpeed 0.18 counts them; it takes anything but a tuple for one number."""
    length = input.ndim - 2
    strides, dilations = (value if type(value) is tuple else (value,) * length for value in (stride, dilation))
    if padding == 'same':
        paddings = tuple(d * (k - 1) // 2 for d, k in zip(dilations, weight.shape[2:]))
    else:
        paddings = padding if type(padding) is tuple else (padding,) * length
    macs = input.shape[0] * input.shape[1] * weight.shape[0] * weight[0, 0].numel() // groups
    for size, k, s, p, d in zip(input.shape[2:], weight.shape[2:], strides, paddings, dilations):
        macs *= (size + 2 * p - (d * (k - 1) + 1)) // s + 1
    return macs


@pytest.fixture
def deepspeed(monkeypatch):
    """Functions of torch.nn.functional replaced by wrappers that count, as DeepSpeed's flops profiler does."""
    counted = []

    def replace(name, macs_of):
        original = getattr(F, name)

        def counting(*args, **kwargs):
            counted.append(macs_of(*args, **kwargs))
            return original(*args, **kwargs)
        monkeypatch.setattr(F, name, counting)

    for name in ('conv1d', 'conv2d', 'conv3d'):
        replace(name, conv_flops_of_deepspeed)
    replace('linear', lambda input, weight, bias=None: input.numel() * weight.shape[0])
    return counted


# --- every model, as it is trained and re-parameterized ---

# Counts of a tool, and the expected ones from the model, the input and the MACs of the table. Biases and the sampling
# of kernels are counted by some tools in addition; PyTorch counts two FLOPs for a product.
COUNTS = {
    'thop': lambda model, x, macs: (by_thop(model, x), (macs, num_parameters(model))),
    'ptflops': lambda model, x, macs: (
        by_ptflops(copy.deepcopy(model), x, 'pytorch'), (macs + bias_additions(model, x), num_trained(model))),
    'ptflops aten': lambda model, x, macs: (
        by_ptflops(copy.deepcopy(model), x, 'aten')[0], macs + bias_additions(model, x) + sampling_macs(model)),
    'fvcore': lambda model, x, macs: (layers_and_sampling(by_fvcore(model, x)), (macs, sampling_macs(model))),
    'calflops': lambda model, x, macs: (by_calflops(model, x)[1:], (macs, num_trained(model))),
    'torch': lambda model, x, macs: (by_torch(model, x), 2 * (macs + sampling_macs(model))),
}


@pytest.mark.parametrize('tool', COUNTS)
def test_counts(case, tool):
    counted, expected = COUNTS[tool](*case)
    assert counted == expected


def test_deepspeed(case, deepspeed):
    model, x, macs = case
    with torch.no_grad():
        model(x)
    assert sum(deepspeed) == macs


def test_torchinfo(case):
    """Norms' parameters and biases are its own; of layers with points it takes the points for the kernel, and warns."""
    model, x, macs = case
    norms = sum(num_parameters(module) for module in model.modules() if isinstance(module, OTHERS))
    unseen = sum(
        (layer.kernel().numel() - layer.weight.numel()) * y[0, 0].numel() for layer, y in outputs(model, x, SMPLayer))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        summary = by_torchinfo(copy.deepcopy(model), x)
    assert summary.total_mult_adds == macs + bias_additions(model, x) + norms - unseen
    assert summary.total_params == num_parameters(model)
    assert any('torchinfo counts' in str(warning.message) for warning in caught) == bool(smp_layers(model))


def test_torchsummary(case, capsys):
    """Positions and radii are not seen, which is warned of."""
    model, x, _ = case
    unseen = sum(layer.coords.numel() + layer.radius.numel() for layer in smp_layers(model).values())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torchsummary.summary(copy.deepcopy(model), tuple(x.shape[1:]), device='cpu')
    total = re.search(r'Total params: ([\d,]+)', capsys.readouterr().out).group(1)
    assert int(total.replace(',', '')) == num_parameters(model) - unseen
    assert any('torchsummary counts' in str(warning.message) for warning in caught) == bool(smp_layers(model))


# --- layers in other networks ---


def counts(model, x, deepspeed):
    deepspeed.clear()
    with torch.no_grad():
        copy.deepcopy(model)(x)
    return (
        sum(deepspeed), by_thop(copy.deepcopy(model), x), by_ptflops(copy.deepcopy(model), x, 'pytorch'),
        by_ptflops(copy.deepcopy(model), x, 'aten'), by_fvcore(copy.deepcopy(model), x),
        by_calflops(copy.deepcopy(model), x), by_torch(copy.deepcopy(model), x),
        by_torchinfo(copy.deepcopy(model), x).total_mult_adds)


def test_accelerated_networks_count_as_before(deepspeed):
    model, x = timm.create_model('convnext_atto').eval(), torch.randn(1, 3, 64, 64)
    expected = counts(model, x, deepspeed)
    assert smpconv_models.accelerate_depthwise(model).replaced
    assert counts(model, x, deepspeed) == expected


def test_a_named_backend_runs_while_functions_are_replaced(monkeypatch):
    x, weight, conv2d, dilations = torch.randn(1, 4, 32, 32), torch.randn(4, 1, 15, 15), F.conv2d, []

    def replaced(*args, **kwargs):
        dilations.append(tuple(kwargs['dilation']))
        return conv2d(*args, **kwargs)

    monkeypatch.setattr(F, 'conv2d', replaced)
    for backend in ('auto', 'reference', 'cpu'):
        depthwise_conv2d(x, weight, dilation=2, backend=backend)
    assert dilations == [(2, 2), (2, 2), (1, 1)]  # backend 'cpu' convolves the phases of a dilated convolution


@pytest.mark.parametrize('backend', ['auto', 'reference'])
def test_convolutions_with_a_bias_and_dilation(deepspeed, backend):
    arguments = dict(padding=14, dilation=2, groups=4)  # fvcore does not count nn.Conv2d's padding='same'
    plain = nn.Sequential(nn.Conv2d(4, 4, 15, **arguments))
    ours = nn.Sequential(smpconv_models.DepthwiseConv2d(4, 4, 15, **arguments, backend=backend))
    x = torch.randn(2, 4, 20, 18)
    assert counts(ours, x, deepspeed) == counts(plain, x, deepspeed)


@pytest.mark.parametrize('layer', [
    CausalConv1d(3, 5, 300), smpconv_models.SMPConv1d(3, 5, 300), FFTConv2d(3, 5, 33),
    smpconv_models.SMPConv2d(3, 5, 33)], ids=lambda layer: type(layer).__name__)
def test_convolutions_by_fft_count_as_direct_ones(deepspeed, layer):
    x = torch.randn(2, 3, *((300,) if '1d' in type(layer).__name__ else (40, 30)))
    macs = x[:, 0].numel() * 5 * 3 * (300 if x.ndim == 3 else 33 ** 2)
    model = nn.Sequential(layer)
    with torch.no_grad():
        model(x)
    assert sum(deepspeed) == macs
    assert by_thop(copy.deepcopy(model), x)[0] == macs
    assert by_calflops(copy.deepcopy(model), x)[1] == macs
    assert by_torch(model, x) == 2 * (macs + sampling_macs(model))


# --- no effect beyond counting ---


class Names(TorchDispatchMode):
    """A dispatch mode of another library."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **kwargs or {})


def test_only_other_libraries_modes_are_shown_plain_convolutions():
    x, weight = torch.randn(2, 3, 20, 20), torch.randn(3, 1, 15, 15, requires_grad=True)
    expected = smpconv_models.depthwise_conv2d(x, weight)
    with Names() as names:
        got = smpconv_models.depthwise_conv2d(x, weight)
    assert 'aten::convolution' in names.seen
    assert 'smpconv_models::depthwise_conv2d' not in names.seen
    torch.testing.assert_close(got, expected)
    with FlopCounterMode(display=False) as counter:
        smpconv_models.depthwise_conv2d(x, weight)
    assert set(counter.get_flop_counts()['Global']) == {torch.ops.smpconv_models.depthwise_conv2d}


def test_gradients_of_the_operator_are_counted_without_an_error(deepspeed):
    x, weight = torch.randn(2, 16, 20, 20, requires_grad=True), torch.randn(16, 1, 15, 15, requires_grad=True)
    with pytest.MonkeyPatch.context() as before:
        before.setattr(F, 'conv1d', torch.conv1d)
        before.setattr(F, 'conv2d', torch.conv2d)
        y = smpconv_models.depthwise_conv2d(x, weight)
    assert not deepspeed
    y.sum().backward()
    assert deepspeed


def test_the_layers_count_again_and_keep_nothing():
    model, x = nn.Sequential(smpconv_models.SMPDepthwiseConv2d(4, 15, 8)), torch.randn(1, 4, 20, 20)
    expected = x.numel() * 15 ** 2
    assert [by_thop(model, x)[0] for _ in range(2)] == [expected, expected]
    assert [by_ptflops(model, x, 'pytorch')[0] for _ in range(2)] == [expected, expected]
    assert not model[0]._forward_hooks
    assert not model[0]._buffers


# --- whole sizes ---


@pytest.mark.slow  # large kernels by PyTorch's slow loops at 224x224
@pytest.mark.parametrize('name', ['smpconv_t', 'smpconv_b', 'smpconv_mobile31', 'smpconv_mobile51'])
def test_the_table_of_the_models(name, deepspeed):
    page = (Path(__file__).parent.parent / 'docs/models.md').read_text()
    macs = float(re.search(rf'`{name}` \| [\d,]+ \| ([\d.]+) G', page).group(1))
    model, x = build(name, 'points', 'cpu'), torch.randn(1, 3, 224, 224)
    of_thop = by_thop(copy.deepcopy(model), x)[0]
    of_ptflops = by_ptflops(copy.deepcopy(model), x, 'pytorch')[0] - bias_additions(model, x)
    deepspeed.clear()
    with torch.no_grad():
        model(x)
    assert of_thop == of_ptflops == sum(deepspeed)
    assert round(of_thop / 1e9, 2) == macs
