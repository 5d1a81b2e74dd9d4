"""Every backend compared with float64 over one grid; layouts, empty batches, and the selection of a backend."""
import functools
import logging
import subprocess
import sys

import pytest
import torch
from grid import DTYPES, LAYOUTS, SHAPES, assert_as_exact_as, make, plain_conv, terms, with_gradients

from smpconv_models.ops import _backends, _triton, available_backends, depthwise_conv2d
from smpconv_models.ops._problem import make_axes, memory_format_of

BACKENDS = ('auto', *available_backends())      # under Triton's interpreter, Triton too: see test_triton_interpreted.py
IN_FLOAT64 = tuple(name for name in BACKENDS if name != 'triton')
EVERYWHERE = [(dtype, layout, name) for dtype in DTYPES for layout in LAYOUTS for name in SHAPES]
# compiling costs 50 times the call: every shape once, and every dtype and layout of one shape
COMPILED = [case for case in EVERYWHERE if case[:2] == (torch.float32, 'nchw') or case[2] == 'k15']


def axes_of(kernel_size, dilation=1):
    """Return the axes of a "same" convolution of a map of 2x2."""
    padding = dilation * (kernel_size // 2)
    return make_axes([2, 2], [kernel_size] * 2, [1, 1], [padding] * 4, [dilation] * 2)


def _id(value):
    return str(value).removeprefix('torch.')


def check(function, dtype, layout, name):
    shape = SHAPES[name]
    x, weight, bias, grad = make(shape, dtype, layout)
    got = with_gradients(
        lambda *args: function(*args, **shape.options), x, weight, bias, grad)
    plain = with_gradients(
        lambda *args: plain_conv(*args, **shape.options), x, weight, bias, grad)
    exact = with_gradients(
        lambda *args: depthwise_conv2d(*args, **shape.options, backend='reference'),
        x.double(), weight.double(), bias.double(), grad.double(),
    )
    for key, num_terms in terms(shape).items():
        assert got[key].dtype == dtype
        assert got[key].shape == exact[key].shape
        assert_as_exact_as(got[key], plain[key], exact[key], num_terms)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('dtype', 'layout', 'name'), EVERYWHERE, ids=_id)
def test_result_and_gradients(dtype, layout, name, backend):
    if backend == 'triton' and (reason := _triton.unsupported_reason(torch.device('cpu'), dtype)):
        pytest.skip(reason)

    def function(*args, **kwargs):
        return depthwise_conv2d(*args, **kwargs, backend=backend)
    check(function, dtype, layout, name)


@pytest.mark.parametrize(('dtype', 'layout', 'name'), COMPILED, ids=_id)
def test_compiled_result_and_gradients(dtype, layout, name):
    torch.compiler.reset()
    check(torch.compile(depthwise_conv2d, fullgraph=True, dynamic=True, backend='aot_eager'), dtype, layout, name)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('name', ['k5_odd_map', 'k31'])
def test_output_keeps_layout(name, backend):
    for layout in LAYOUTS:
        x, weight, bias, _ = make(SHAPES[name], torch.float32, layout)
        y = depthwise_conv2d(x, weight, bias, backend=backend)
        memory_format = torch.channels_last if layout == 'channels_last' else torch.contiguous_format
        assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_inputs_are_not_written_to(layout, backend):
    x, weight, bias, grad = make(SHAPES['k15'], torch.float32, layout)
    before = [tensor.clone() for tensor in (x, weight, bias, grad)]
    with_gradients(lambda *args: depthwise_conv2d(*args, backend=backend), x, weight, bias, grad)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, bias, grad)))


@pytest.mark.parametrize('backend', BACKENDS)
def test_non_contiguous_weight_bias_and_expanded_gradient(backend):
    shape = SHAPES['rectangular']
    x, weight, bias, _ = make(shape, torch.float32)
    weight = weight.transpose(2, 3).contiguous().transpose(2, 3)
    bias = torch.stack([bias, bias], 1)[:, 0]
    grad = torch.ones(1).expand(shape.n, shape.c, shape.h, shape.w)
    got = with_gradients(lambda *args: depthwise_conv2d(*args, backend=backend), x, weight, bias, grad)
    plain = with_gradients(lambda *args: plain_conv(*args, 1), x, weight, bias, grad)
    exact = with_gradients(
        lambda *args: plain_conv(*args, 1), *(tensor.double() for tensor in (x, weight, bias, grad)))
    for key, num_terms in terms(shape).items():
        assert_as_exact_as(got[key], plain[key], exact[key], num_terms)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('kernel_size', [3, 31])
def test_empty_batch(kernel_size, backend):
    """The output is empty, and the parameters' gradients are zero, not uninitialized."""
    x, weight, bias = torch.randn(0, 3, 5, 7), torch.randn(3, 1, kernel_size, kernel_size), torch.randn(3)
    got = with_gradients(lambda *args: depthwise_conv2d(*args, backend=backend), x, weight, bias, x)
    assert got['y'].shape == got['dx'].shape == (0, 3, 5, 7)
    assert torch.equal(got['dw'], torch.zeros_like(weight))
    assert torch.equal(got['db'], torch.zeros_like(bias))


@pytest.mark.parametrize('backend', IN_FLOAT64)
@pytest.mark.parametrize('wanted', [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_any_subset_of_gradients(wanted, backend):
    x, weight, bias, grad = make(SHAPES['k5_odd_map'], torch.float64)
    expected = list(with_gradients(lambda *args: plain_conv(*args, 1), x, weight, bias, grad).values())[1:]
    tensors = [x, weight, bias]
    for index in wanted:
        tensors[index].requires_grad_()
    y = depthwise_conv2d(*tensors, backend=backend)
    for index, got in zip(wanted, torch.autograd.grad(y, [tensors[index] for index in wanted], grad)):
        torch.testing.assert_close(got, expected[index], rtol=0, atol=1e-12)


@pytest.mark.parametrize('backend', IN_FLOAT64)
@pytest.mark.parametrize('options', [
    {}, dict(dilation=(2, 1)), dict(stride=(1, 2), padding=(2, 1)), dict(padding='valid')], ids=str)
def test_gradcheck(options, backend):
    x = torch.randn(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        return depthwise_conv2d(x, weight, bias, **options, backend=backend)
    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


@pytest.mark.parametrize('backend', IN_FLOAT64)
@pytest.mark.parametrize('wanted', [(0, 1), (0,), (1,)])
def test_gradgradcheck_of_the_backward_pass(wanted, backend):
    """The third order exists as well: the second operator's own backward pass is differentiable."""
    grad, x = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)

    def function(*args):
        gradients = torch.ops.smpconv_models.depthwise_conv2d_backward(
            *args, [0 in wanted, 1 in wanted], [1, 1], [1] * 4, [1, 1], backend, '')
        return tuple(gradients[index] for index in wanted)
    assert torch.autograd.gradcheck(function, (grad, x, weight))
    assert torch.autograd.gradgradcheck(function, (grad, x, weight))


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', ['k5_odd_map', 'k15', 'dilated_large', 'strided'])
def test_the_gradients_of_the_backward_operator_keep_their_layouts(name, layout):
    """dx has the layout of the output's gradient, and dw is contiguous."""
    shape = SHAPES[name]
    x, weight, _, grad = make(shape, torch.float32, layout)
    padding = [3] * 4 if name == 'strided' else [d * (k // 2) for d, k in zip(
        shape.dilation, (shape.kh, shape.kw)) for _ in range(2)]
    (dx, dw), expected = (torch.ops.smpconv_models.depthwise_conv2d_backward(
        grad, x, weight, [True, True], list(shape.stride), padding, list(shape.dilation), backend, '')
        for backend in ('cpu', 'reference'))
    for got, plain in zip((dx, dw), expected):
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)     # sums of at most 408 products
    assert dx.is_contiguous(memory_format=memory_format_of(grad)) and dw.is_contiguous()


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('group_bytes', [2 ** 23, 1])   # all images, one image at a time
def test_float16_is_float32_rounded_once(monkeypatch, group_bytes, layout):
    """PyTorch's own convolutions of this dtype take up to 240 times as long on a CPU."""
    monkeypatch.setattr(_backends.load('cpu'), '_GROUP_BYTES', group_bytes)
    half = make(SHAPES['k5_odd_map'], torch.float16, layout)
    assert _backends.select('auto', half[0], axes_of(3)) == 'cpu'
    got = with_gradients(depthwise_conv2d, *half)
    wide = with_gradients(depthwise_conv2d, *(tensor.float() for tensor in half))
    for key, tensor in got.items():
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(tensor, wide[key].half())
    assert memory_format_of(got['y']) == memory_format_of(half[0])


def test_deterministic():
    x, weight, bias, grad = make(SHAPES['k31'], torch.float32)
    first, second = (with_gradients(depthwise_conv2d, x, weight, bias, grad) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_available_backends():
    assert available_backends() == available_backends('cpu') == available_backends(torch.device('cpu'))
    assert available_backends() == ('cpu', 'reference')
    assert available_backends('meta') == ('reference',)


@pytest.mark.parametrize(('kernel_size', 'dilation', 'needs_weight_grad', 'expected'), [
    (3, 1, True, 'reference'), (5, 1, True, 'cpu'),
    (9, 1, False, 'reference'), (15, 1, False, 'cpu'), (13, 2, False, 'cpu'),
])
def test_auto_leaves_small_kernels_to_conv2d(kernel_size, dilation, needs_weight_grad, expected):
    """The CPU backend would call the same kernels."""
    axes = axes_of(kernel_size, dilation)
    assert _backends.select('auto', torch.ones(1, 1, 2, 2), axes, needs_weight_grad) == expected


def test_auto_skips_and_logs_why(monkeypatch, caplog):
    """The branch that a machine with every backend does not take."""
    monkeypatch.setattr(_backends.load('cpu'), 'unsupported_reason', lambda device, dtype=None: 'its reason')
    with caplog.at_level(logging.DEBUG, logger='smpconv_models'):
        y = depthwise_conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1))
    assert torch.equal(y, torch.ones(1, 1, 2, 2))
    assert 'its reason' in caplog.text
    assert available_backends() == ('reference',)
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run here: its reason"):
        depthwise_conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1), backend='cpu')


def test_a_named_backend_never_falls_back():
    """Also for meta tensors, which have nothing to compute and are not on the CPU."""
    x, weight = torch.empty(1, 2, 4, 4, device='meta'), torch.empty(2, 1, 3, 3, device='meta')
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run here: .*meta"):
        depthwise_conv2d(x, weight, backend='cpu')


@pytest.mark.parametrize('limits', [
    dict(_CACHED_BYTES=1),                                              # an image and a vector of channels at a time
    dict(_MOST_PLAN_BYTES=0),
    dict(_MOST_PLAN_BYTES=0, _MOST_PLAN_BYTES_WITH_HALO=0, _CACHED_BYTES=5000),
    dict(_MOST_PLAN_BYTES=0, _MOST_PLAN_BYTES_WITH_HALO=0, _LARGEST_BLOCK=4),
], ids=str)
@pytest.mark.parametrize('name', [
    'k5_odd_map', 'k13_map_below_kernel', 'k31', 'rectangular', 'dilated', 'one_pixel', 'even', 'strided_even', 'valid',
    'wide_padding', 'sequence'])
def test_cpu_weight_gradient_in_parts_and_with_halos(monkeypatch, name, limits):
    """The code path of large maps and batches."""
    cpu = _backends.load('cpu')
    for constant, value in limits.items():
        monkeypatch.setattr(cpu, constant, value)
    for layout in LAYOUTS:
        check(functools.partial(depthwise_conv2d, backend='cpu'), torch.float32, layout, name)


MEMORY = """
import sys, threading, time, torch
from smpconv_models import depthwise_conv2d

def resident():
    return int(open('/proc/self/statm').read().split()[1]) * 4096

def watch():
    global peak
    while running:
        peak = max(peak, resident())
        time.sleep(0.001)

x = torch.randn(*map(int, sys.argv[2:6])).contiguous(memory_format=getattr(torch, sys.argv[1]))
x = x.to(getattr(torch, sys.argv[7]))
weight = torch.randn(x.shape[1], 1, int(sys.argv[6]), int(sys.argv[6]), dtype=x.dtype, requires_grad=True)
torch.autograd.grad(depthwise_conv2d(x[:1, :, :20, :20], weight).sum(), weight)     # load libraries first
x.requires_grad_()
running, peak, before = True, 0, resident()
thread = threading.Thread(target=watch)
thread.start()
y = depthwise_conv2d(x, weight)
torch.autograd.grad(y, (x, weight), y.detach())
running = False
thread.join()
print((peak - before) / (x.numel() * x.itemsize))
"""


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
@pytest.mark.parametrize(('size', 'kernel_size', 'memory_format', 'dtype'), [
    ((1, 32, 400, 400), 13, 'contiguous_format', 'float32'),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (  # 8 s each
        ((1, 32, 400, 400), 13, 'channels_last', 'float32'), ((2, 64, 120, 200), 31, 'contiguous_format', 'float32'),
        ((2, 64, 120, 200), 31, 'channels_last', 'float32'), ((16, 64, 112, 112), 15, 'channels_last', 'float16'))),
], ids=str)
def test_memory_is_a_few_times_the_inputs(size, kernel_size, memory_format, dtype):
    """Results take two inputs' memory, a copy in another layout one, and oneDNN's plans some; once it was hundreds."""
    command = [sys.executable, '-c', MEMORY, memory_format, *map(str, size), str(kernel_size), dtype]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert float(result.stdout) < 6


@pytest.mark.parametrize('backend', [name for name in BACKENDS if name != 'reference'])
def test_dilation_beyond_the_map(backend):
    """Only the kernel's centre overlaps the map, and no memory grows with the dilation."""
    x, weight = torch.randn(2, 3, 5, 6), torch.randn(3, 1, 7, 7)
    torch.testing.assert_close(
        depthwise_conv2d(x, weight, dilation=10 ** 9, backend=backend), x * weight[:, 0, 3:4, 3:4])


def test_out_of_memory_is_pytorchs_own_error():
    """And the process continues."""
    x, weight = torch.zeros(1).expand(2 ** 20, 2 ** 20, 32, 32), torch.zeros(1).expand(2 ** 20, 1, 15, 15)
    with pytest.raises(RuntimeError, match='alloc'):
        depthwise_conv2d(x, weight)
    assert depthwise_conv2d(x[:1, :3], weight[:3]).shape == (1, 3, 32, 32)


@pytest.mark.parametrize('stride', [1000, 2 ** 40])
def test_stride_beyond_the_map(stride):
    """There is one output, and no memory grows with the stride."""
    x, weight = torch.randn(2, 3, 32, 32), torch.randn(3, 1, 31, 31)

    def results(function, stride):
        return with_gradients(
            lambda *args: function(*args, stride=stride, padding=0), x, weight, torch.zeros(3), torch.ones(2, 3, 1, 1))
    got, expected = results(functools.partial(depthwise_conv2d, backend='cpu'), stride), results(plain_conv, 2)
    for key in ('y', 'dx', 'dw'):
        torch.testing.assert_close(got[key], expected[key])


ONE_CHANNEL = """
import torch
from smpconv_models.ops import depthwise_conv2d
for backend in ('auto', 'cpu'):
    x, weight = torch.randn(1, 1, 5, 1, requires_grad=True), torch.randn(1, 1, 12, 4, requires_grad=True)
    y = depthwise_conv2d(x, weight, stride=2, dilation=(1, 2), padding=(12, 13), backend=backend)
    expected = torch.nn.functional.conv2d(x, weight, stride=2, dilation=(1, 2), padding=(12, 13))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.autograd.grad(y, (x, weight), torch.ones_like(y))
"""


def test_one_channel_with_a_stride_returns():
    """In a separate process, which oneDNN ended."""
    subprocess.run([sys.executable, '-c', ONE_CHANNEL], check=True, timeout=60)


FEW_CHANNELS = """
import torch
from smpconv_models.ops import depthwise_conv2d
for channels in (2, 3, 16):
    x = torch.randn(1, channels, 31, 33).to(torch.{dtype}).requires_grad_()
    weight = torch.randn(channels, 1, 31, 31).to(torch.{dtype}).requires_grad_()
    y = depthwise_conv2d(x, weight)
    torch.autograd.grad(y, (x, weight), y.detach())
"""


@pytest.mark.parametrize('dtype', [pytest.param('float16', marks=pytest.mark.slow), 'bfloat16'])  # 7 s each
def test_few_channels_return(dtype):
    """In a separate process: the call must return at all."""
    try:
        subprocess.run([sys.executable, '-c', FEW_CHANNELS.format(dtype=dtype)], check=True, timeout=30)
    except subprocess.TimeoutExpired:
        pytest.fail('no result after 30 s')
