"""Convolution of sequences: the same operation for maps of height 1, with paddings of its own."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from smpconv_models.ops import available_backends, depthwise_conv1d

BACKENDS = ('auto', *available_backends())
OPTIONS = [
    {}, dict(kernel_size=6), dict(kernel_size=1), dict(kernel_size=57), dict(padding='causal'), dict(padding='valid'),
    dict(padding=4, stride=3), dict(kernel_size=15, padding=(9, 2), dilation=2),
    dict(padding='causal', dilation=5, stride=2), dict(padding=(0, 30), kernel_size=2), dict(length=1), dict(batch=0),
    dict(kernel_size=3, padding=(1, 0), stride=40),
]


def plain(x, weight, bias, stride=1, padding='same', dilation=1):
    """Compute the operation by its definition."""
    k = weight.shape[2]
    total = dilation * (k - 1)
    before, after = {'same': (total // 2, total - total // 2), 'valid': (0, 0), 'causal': (total, 0)}.get(
        padding, (padding, padding) if isinstance(padding, int) else padding)
    return F.conv1d(F.pad(x, (before, after)), weight, bias, stride, 0, dilation, x.shape[1])


def make(options, dtype=torch.float64, transposed=False):
    """Return input, weight, bias, and the options that are the function's; the input may lie as (N, L, C)."""
    options = dict(options)
    n, length, k = options.pop('batch', 2), options.pop('length', 40), options.pop('kernel_size', 31)
    x = torch.randn(n, length, 3, dtype=dtype).transpose(1, 2) if transposed else torch.randn(n, 3, length, dtype=dtype)
    return x, torch.randn(3, 1, k, dtype=dtype), torch.randn(3, dtype=dtype), options


def with_gradients(function, *tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    grad = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
    return y, *torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('backend', [name for name in BACKENDS if name != 'triton'])     # which has no float64
def test_equals_conv1d(backend, options, transposed):
    *tensors, options = make(options, transposed=transposed)
    got = with_gradients(lambda *args: depthwise_conv1d(*args, **options, backend=backend), *tensors)
    for each, expected in zip(got, with_gradients(lambda *args: plain(*args, **options), *tensors)):
        torch.testing.assert_close(each, expected, rtol=0, atol=1e-12)
    if transposed and tensors[0].numel():
        assert got[0].transpose(1, 2).is_contiguous()


@pytest.mark.skipif('triton' not in BACKENDS, reason='see test_triton_interpreted.py')
@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_equals_conv1d_on_triton(options):
    *tensors, options = make(options, torch.float32)
    got = with_gradients(lambda *args: depthwise_conv1d(*args, **options, backend='triton'), *tensors)
    for each, expected in zip(got, with_gradients(lambda *args: plain(*args, **options), *tensors)):
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-4)     # sums of at most 80 products


def test_causal_outputs_do_not_depend_on_later_elements():
    x, weight, bias, _ = make({})
    changed = torch.cat([x[:, :, :25], torch.full_like(x[:, :, 25:], torch.nan)], 2)
    y, other = (depthwise_conv1d(each, weight, bias, padding='causal', backend='reference') for each in (x, changed))
    assert torch.equal(y[:, :, :25], other[:, :, :25]) and not other[:, :, 25:].isfinite().any()


@pytest.mark.parametrize('backend', [name for name in BACKENDS if name != 'triton'])
def test_gradients_of_any_order(backend):
    x = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True), torch.randn(2, dtype=torch.float64)

    def function(x, weight):
        return depthwise_conv1d(x, weight, bias, padding='causal', stride=2, backend=backend)
    assert torch.autograd.gradcheck(function, (x, weight))
    assert torch.autograd.gradgradcheck(function, (x, weight))


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1, 7))

    def forward(self, x):
        return depthwise_conv1d(x, self.weight, None, padding='causal', dilation=2)


@pytest.mark.parametrize('convert', [
    torch.jit.script, torch.fx.symbolic_trace, lambda module: torch.jit.trace(module, torch.randn(1, 3, 20)),
    lambda module: torch.compile(module, fullgraph=True, backend='aot_eager'),
    lambda module: torch.export.export(module, (torch.randn(2, 3, 33),), dynamic_shapes=(
        {0: torch.export.Dim('batch', min=1, max=64), 2: torch.export.Dim('length', min=2, max=4096)},)).module(),
], ids=['script', 'fx', 'trace', 'compile', 'export'])
@pytest.mark.filterwarnings('error::torch.jit.TracerWarning')
def test_converted(convert):
    torch.compiler.reset()
    module, x = Causal(), torch.randn(4, 3, 25)
    torch.testing.assert_close(convert(module)(x), plain(x, module.weight, None, padding='causal', dilation=2))


def test_an_exported_graph_is_plain_aten():
    graph = torch.export.export(Causal(), (torch.randn(2, 3, 33),)).graph
    names = [str(node.target) for node in graph.nodes if node.op == 'call_function']
    assert any('aten.conv1d' in name for name in names) and not any('smpconv_models' in name for name in names)


def test_a_sequence_without_a_batch():
    x, weight, bias, _ = make({})
    torch.testing.assert_close(depthwise_conv1d(x[0], weight, bias), plain(x, weight, bias)[0])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    x, weight, bias, _ = make({}, torch.float32)
    with torch.autocast('cpu', dtype):
        under_autocast = depthwise_conv1d(x, weight, bias)
    got = depthwise_conv1d(*(tensor.to(dtype) for tensor in (x, weight, bias)))
    assert under_autocast.dtype == got.dtype == dtype
    for each in (under_autocast, got):
        torch.testing.assert_close(each.float(), plain(x, weight, bias), rtol=0, atol=0.2)   # 31 terms of about 1


def test_flops_are_those_of_conv1d():
    x, weight, bias, _ = make({}, torch.float32)
    with FlopCounterMode(display=False) as counter:
        depthwise_conv1d(x, weight, bias, stride=3, padding=4)
    assert counter.get_total_flops() == 2 * 2 * 3 * 31 * ((40 + 8 - 31) // 3 + 1)


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(input=torch.ones(2, 3, 5, 5)), 'input must have dimensions (N, C, L) or (C, L), got shape (2, 3, 5, 5)'),
    (dict(weight=torch.ones(3, 1, 3, 3)),
     'weight must have shape (3, 1, k) for an input of 3 channels, got (3, 1, 3, 3)'),
    (dict(padding='full'), "padding must be a number, two, or one of ('same', 'valid', 'causal'), got 'full'"),
    (dict(padding=(1, 2, 3)), 'padding must be one integer or two, got (1, 2, 3)'),
    (dict(stride=(2,), padding=1), 'stride must be one integer, got (2,)'),
    (dict(dilation=(1, 2)), 'dilation must be one integer, got (1, 2)'),
    (dict(stride=2), "padding 'same' takes stride 1, got stride 2"),
    (dict(padding='valid', dilation=3),
     'kernel length 3 with dilation 3 needs a padded input of at least 7, got 5: 5 with padding 0 and 0'),
], ids=str)
def test_errors_name_what_was_expected_and_given(changes, message):
    arguments = dict(dict(input=torch.ones(2, 3, 5), weight=torch.ones(3, 1, 3)), **changes)
    with pytest.raises(ValueError) as error:
        depthwise_conv1d(**arguments)
    assert str(error.value) == message
