"""The public function with PyTorch's dispatcher, tracers, compilers, autocast and counters."""
import inspect

import pytest
import torch
from grid import LAYOUTS, lay_out, plain_conv
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from smpconv_models.ops import _backends, available_backends, depthwise_conv2d

KERNEL_SIZES = (3, 15)      # conv2d computes the first


class Conv(nn.Module):
    """A user's module that calls the function with its keyword-only arguments."""

    def __init__(self, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1, 5, 3))
        self.bias = nn.Parameter(torch.randn(3)) if bias else None

    def forward(self, x):
        return depthwise_conv2d(x, self.weight, self.bias, dilation=(2, 1), backend='auto')


def expected_of(module, x):
    return plain_conv(x, module.weight, module.bias, (2, 1))


SAMPLES = {
    'plain': ((2, 3, 6, 5), 'nchw', (3, 3), True),
    'channels_last': ((2, 3, 6, 5), 'channels_last', (15, 15), False),
    'slice': ((2, 3, 6, 5), 'slice', (5, 3), True),
    'one_channel': ((2, 1, 4, 5), 'channels_last', (3, 3), False),
    'one_pixel': ((2, 3, 1, 1), 'channels_last', (3, 3), True),
    'empty_batch': ((0, 3, 4, 5), 'nchw', (3, 3), True),
}


@pytest.mark.parametrize(('sample', 'backend'), [
    ('plain', 'auto'), *((sample, backend) for sample in SAMPLES for backend in available_backends())])
def test_opcheck(sample, backend):
    """Schemas, fake kernels, autograd registration and AOT dispatch of both operators."""
    size, layout, kernel_size, has_bias = SAMPLES[sample]
    x = lay_out(torch.randn(size), layout).requires_grad_()
    weight = torch.randn(size[1], 1, *kernel_size, requires_grad=True)
    bias = torch.randn(size[1], requires_grad=True) if has_bias else None
    operators = torch.ops.smpconv_models
    padding = [size // 2 for size in kernel_size for _ in range(2)]
    for options in (([1, 1], padding, [1, 1]), ([2, 1], [7, 3, 14, 11], [1, 2])):
        torch.library.opcheck(operators.depthwise_conv2d, (x, weight, bias, *options, backend, ''))
        grad = lay_out(torch.randn_like(operators.depthwise_conv2d(x, weight, bias, *options, backend, '')), layout)
        for wanted in ([True, True], [True, False], [False, True]):
            torch.library.opcheck(
                operators.depthwise_conv2d_backward,
                (grad.requires_grad_(), x, weight, wanted, *options, backend, ''))


def test_compiled_over_several_sizes():
    """One dynamic graph, forward and backward, also for a batch, height and width not seen when it was made."""
    torch.compiler.reset()
    module = Conv()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend='aot_eager')
    for size in ((2, 3, 6, 7), (3, 3, 9, 8), (4, 3, 5, 12)):
        x = torch.randn(size, requires_grad=True)
        y, expected = compiled(x), expected_of(module, x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(*(torch.autograd.grad(out, x, torch.ones_like(out))[0] for out in (y, expected)))


@pytest.mark.parametrize('backend', ('auto', *available_backends()))
def test_an_image_without_a_batch(backend):
    """Equal to conv2d of an image (C, H, W), in value and gradients."""
    x, weight = torch.randn(3, 6, 5, requires_grad=True), torch.randn(3, 1, 5, 5, requires_grad=True)
    got, expected = depthwise_conv2d(x, weight, backend=backend), nn.functional.conv2d(x, weight, padding=2, groups=3)
    torch.testing.assert_close(got, expected)
    for each in zip(*(torch.autograd.grad(y.square().sum(), (x, weight)) for y in (got, expected))):
        torch.testing.assert_close(*each)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('convert', [torch.jit.script, lambda module: torch.jit.trace(module, torch.randn(1, 3, 8, 8))])
def test_torchscript_of_a_caller(convert, bias):
    module = Conv(bias)
    x = torch.randn(2, 3, 7, 9)
    torch.testing.assert_close(convert(module)(x), expected_of(module, x))


def test_torchscript_of_the_function():
    x, weight, bias = torch.randn(2, 3, 7, 9), torch.randn(3, 1, 3, 5), torch.randn(3)
    scripted = torch.jit.script(depthwise_conv2d)
    torch.testing.assert_close(scripted(x, weight), plain_conv(x, weight, None, 1))
    torch.testing.assert_close(
        scripted(x, weight, bias, dilation=(2, 1), backend='reference'), plain_conv(x, weight, bias, (2, 1)))


def test_options_are_keyword_only():
    """The signature for scripting must not be visible."""
    kinds = {name: parameter.kind for name, parameter in inspect.signature(depthwise_conv2d).parameters.items()}
    *tensors, stride, padding, dilation, backend = kinds
    assert tensors == ['input', 'weight', 'bias']
    assert {kinds[name] for name in (stride, padding, dilation, backend)} == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(TypeError):
        depthwise_conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1), None, 1)


@pytest.mark.skipif(
    torch.__version__ < '2.11', reason="strict export of PyTorch 2.10 fails on plain conv2d with such sizes, too")
def test_strict_export_is_plain_aten():
    module = Conv().eval()
    batch, height = torch.export.Dim('batch', min=1), torch.export.Dim('height', min=1)
    exported = torch.export.export(
        module, (torch.randn(2, 3, 7, 9),), strict=True, dynamic_shapes=({0: batch, 2: height},))
    targets = [node.target for node in exported.graph.nodes if node.op == 'call_function']
    assert any('aten.conv2d' in str(target) for target in targets)
    assert not any('smpconv_models' in str(target) for target in targets)
    x = torch.randn(4, 3, 5, 9)
    torch.testing.assert_close(exported.module()(x), expected_of(module, x))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('given', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('kernel_size', KERNEL_SIZES)
def test_autocast_takes_the_dtype_that_conv2d_takes(given, dtype, kernel_size):
    x = torch.randn(1, 2, 5, 6, dtype=given, requires_grad=True)
    weight, bias = torch.randn(2, 1, kernel_size, kernel_size, dtype=given), torch.ones(2, dtype=given)
    with torch.autocast('cpu', dtype):
        y, expected = depthwise_conv2d(x, weight, bias), plain_conv(x, weight, bias, 1)
        with torch.no_grad():
            assert torch.equal(depthwise_conv2d(x, weight, bias), y)
    assert y.dtype == expected.dtype
    assert torch.autograd.grad(y.sum(), x)[0].dtype == given
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize('kernel_size', KERNEL_SIZES)
def test_autocast_takes_mixed_dtypes_and_can_be_left(kernel_size):
    x, weight = torch.randn(1, 2, 5, 6, dtype=torch.bfloat16), torch.randn(2, 1, kernel_size, kernel_size)
    with torch.autocast('cpu', torch.bfloat16):
        assert depthwise_conv2d(x, weight).dtype == torch.bfloat16
        with torch.autocast('cpu', enabled=False):
            assert depthwise_conv2d(x.float(), weight).dtype == torch.float32


def test_backward_within_autocast_keeps_float32():
    """Like plain conv2d with a forward pass outside of autocast."""
    x, weight = torch.randn(1, 2, 5, 6, requires_grad=True), torch.randn(2, 1, 15, 15, requires_grad=True)
    gradients = []
    for function in (depthwise_conv2d, lambda x, weight: plain_conv(x, weight, None, 1)):
        y = function(x, weight)
        with torch.autocast('cpu', torch.bfloat16):
            gradients.append(torch.autograd.grad(y, (x, weight), torch.ones_like(y)))
    for got, expected in zip(*gradients):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('kernel_size', KERNEL_SIZES)
def test_meta(layout, kernel_size):
    x = lay_out(torch.randn(2, 3, 6, 5, dtype=torch.float16), layout).to('meta').requires_grad_()
    weight = torch.empty(3, 1, kernel_size, kernel_size, device='meta', dtype=torch.float16, requires_grad=True)
    y = depthwise_conv2d(x, weight)
    assert (y.device.type, y.dtype, y.shape) == ('meta', torch.float16, x.shape)
    assert y.is_contiguous(memory_format=torch.channels_last) == (layout == 'channels_last')
    dx, dw = torch.autograd.grad(y, (x, weight), torch.empty_like(y))
    assert dx.shape == x.shape
    assert dw.shape == weight.shape


def test_flops_are_counted():
    """Two for each product: once forward, once for each of the two large gradients."""
    x, weight = torch.randn(2, 3, 6, 5, requires_grad=True), torch.randn(3, 1, 5, 7, requires_grad=True)
    with FlopCounterMode(display=False) as plain_counter:
        plain_conv(x, weight, None, 1)
    with FlopCounterMode(display=False) as counter:
        y = depthwise_conv2d(x, weight)
    assert counter.get_total_flops() == plain_counter.get_total_flops() == 2 * 2 * 3 * 6 * 5 * 5 * 7
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * plain_counter.get_total_flops()


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_subclasses_see_the_operator(monkeypatch, device):
    """FakeTensor is one that has no data to compute with, on a device that need not exist."""
    monkeypatch.setattr(_backends, 'select', lambda *args: pytest.fail('a backend was tried'))
    with FakeTensorMode() as mode:
        x, weight = torch.empty(2, 3, 6, 5, device=device), torch.empty(3, 1, 15, 15, device=device)
    assert mode is x.fake_mode
    y = depthwise_conv2d(x, weight)
    assert type(y) is FakeTensor and y.device.type == device


def test_func_grad():
    x, weight, bias = torch.randn(2, 3, 6, 7), torch.randn(3, 1, 5, 3), torch.randn(3)

    def gradients(function):
        return torch.func.grad(lambda *args: function(*args).square().sum(), argnums=(0, 1, 2))(x, weight, bias)
    for got, expected in zip(gradients(depthwise_conv2d), gradients(lambda *args: plain_conv(*args, 1))):
        torch.testing.assert_close(got, expected)


def test_func_jvp():
    """The tangent, or an error; never a silent zero."""
    x, weight, tangent = torch.randn(2, 3, 6, 7), torch.randn(3, 1, 5, 3), torch.randn(3, 1, 5, 3)
    expected = plain_conv(x, tangent, None, 1)
    try:
        _, got = torch.func.jvp(lambda weight: depthwise_conv2d(x, weight), (weight,), (tangent,))
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings('ignore:There is a performance drop')  # a loop over the mapped dimension is enough
def test_func_vmap():
    x, weight = torch.randn(4, 2, 3, 6, 7), torch.randn(3, 1, 5, 3)
    y = torch.func.vmap(lambda x: depthwise_conv2d(x, weight))(x)
    torch.testing.assert_close(y, torch.stack([plain_conv(part, weight, None, 1) for part in x]))


def good(**changes):
    arguments = dict(
        input=torch.ones(2, 3, 5, 7), weight=torch.ones(3, 1, 3, 3), bias=torch.ones(3), dilation=1, backend='auto')
    return dict(arguments, **changes)


BAD = {
    'input_2d': (
        dict(input=torch.ones(5, 7)), 'input must have dimensions (N, C, H, W) or (C, H, W), got shape (5, 7)'),
    'weight_of_other_channels': (
        dict(weight=torch.ones(4, 1, 3, 3)),
        'weight must have shape (3, 1, kh, kw) for an input of 3 channels, got (4, 1, 3, 3)'),
    'weight_not_depthwise': (
        dict(weight=torch.ones(3, 3, 3, 3)),
        'weight must have shape (3, 1, kh, kw) for an input of 3 channels, got (3, 3, 3, 3)'),
    'weight_3d': (
        dict(weight=torch.ones(3, 3, 3)),
        'weight must have shape (3, 1, kh, kw) for an input of 3 channels, got (3, 3, 3)'),
    'no_input': (dict(input=None), 'input must be a tensor, got NoneType'),
    'bias_of_bool': (dict(bias=True), 'bias must be a tensor, got bool'),
    'empty_kernel': (
        dict(weight=torch.ones(3, 1, 0, 3)), 'input and kernel must have at least one element, got height 5 and 0'),
    'empty_map': (
        dict(input=torch.ones(2, 3, 5, 0)), 'input and kernel must have at least one element, got width 0 and 3'),
    'kernel_beyond_the_padding': (
        dict(weight=torch.ones(3, 1, 3, 5), padding=(1, 0), dilation=(1, 2)),
        'kernel width 5 with dilation 2 needs a padded input of at least 9, got 7: 7 with padding 0 and 0'),
    'no_padding_of_this_name': (
        dict(padding='full'), "padding must be a number, two, or one of ('same', 'valid'), got 'full'"),
    'same_with_a_stride': (
        dict(stride=(1, 2)), "padding 'same' takes stride 1, got stride (1, 2)"),
    'negative_padding': (
        dict(padding=(0, -1)), 'padding must be at least 0, got (0, -1)'),
    'no_stride': (
        dict(stride=0, padding=1), 'stride must be at least 1, got 0'),
    'too_large_an_output': (
        dict(padding=2 ** 62),
        f'output must have at most 9223372036854775807 elements, got (2, 3, {2 ** 63 + 3}, {2 ** 63 + 5})'),
    'too_large_a_stride': (
        dict(stride=2 ** 64, padding=1),
        f'stride must be at most 9223372036854775807, got {2 ** 64}'),
    'no_channels': (
        dict(input=torch.ones(2, 0, 5, 7), weight=torch.ones(0, 1, 3, 3), bias=None),
        'input must have at least one channel, got shape (2, 0, 5, 7)'),
    'bias_of_other_channels': (dict(bias=torch.ones(2)), 'bias must have shape (3,), got (2,)'),
    'no_dilation': (dict(dilation=(1, 0)), 'dilation must be at least 1, got (1, 0)'),
    'unknown_backend': (
        dict(backend='cuda'), "backend must be 'auto' or one of ('cpu', 'triton', 'reference'), got 'cuda'"),
    'integer_input': (
        dict(input=torch.ones(2, 3, 5, 7, dtype=torch.int64)), 'input must be of a floating dtype, got torch.int64'),
    'integer_weight': (
        dict(weight=torch.ones(3, 1, 3, 3, dtype=torch.int8)), 'weight must be of a floating dtype, got torch.int8'),
    'integer_bias': (
        dict(bias=torch.ones(3, dtype=torch.int32)), 'bias must be of a floating dtype, got torch.int32'),
    'two_dtypes': (
        dict(weight=torch.ones(3, 1, 3, 3, dtype=torch.float64)),
        'input, weight and bias must have one dtype, got torch.float32, torch.float64 and torch.float32'),
    'dtype_of_bias': (
        dict(bias=torch.ones(3, dtype=torch.float16)),
        'input, weight and bias must have one dtype, got torch.float32, torch.float32 and torch.float16'),
    'two_devices': (
        dict(weight=torch.ones(3, 1, 3, 3, device='meta')), 'weight must be on the device of input, cpu, got meta'),
    'bias_elsewhere': (
        dict(bias=torch.ones(3, device='meta')), 'bias must be on the device of input, cpu, got meta'),
}


@pytest.mark.parametrize('case', BAD)
def test_errors_name_what_was_expected_and_given(case):
    changes, message = BAD[case]
    with pytest.raises(ValueError) as error:
        depthwise_conv2d(**good(**changes))
    assert str(error.value) == message


@pytest.mark.parametrize('option', ['stride', 'padding', 'dilation'])
@pytest.mark.parametrize('value', [(1, 2, 3), (1,), (), 1., None, '22', True, (1.5, 2)])
def test_options_are_one_number_or_two(option, value):
    with pytest.raises(ValueError, match=option):
        depthwise_conv2d(**good(**{option: value}))
