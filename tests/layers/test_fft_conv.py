"""Causal and same convolutions with long kernels: their meaning, by FFT as directly, in every dtype and mode."""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from smpconv_models.layers import CausalConv1d, FFTConv2d, causal_conv1d, fft_conv, fft_conv2d

LENGTHS = [(60, 60), (61, 7), (5, 30), (1, 1), (17, 2), (64, 33)]
SIZES = [((8, 9), (33, 33)), ((32, 20), (9, 33)), ((12, 7), (3, 3)), ((5, 5), (1, 1)), ((1, 40), (5, 5))]


def loop_causal(x, weight):
    """Equation 3 cut off at the present, element by element."""
    batch, channels, length = x.shape
    out, _, k = weight.shape
    y = torch.zeros(batch, out, length, dtype=torch.float64)
    for n in range(batch):
        for o in range(out):
            for t in range(length):
                y[n, o, t] = sum(
                    weight[o, c, k - 1 - s] * x[n, c, t - s] for c in range(channels) for s in range(min(k, t + 1)))
    return y


@pytest.mark.parametrize('method', ['direct', 'fft'])
@pytest.mark.parametrize(('length', 'k'), [(7, 7), (6, 3), (3, 8)])
def test_causal_equals_scalar_loops(length, k, method):
    x, weight = torch.randn(2, 3, length, dtype=torch.float64), torch.randn(2, 3, k, dtype=torch.float64)
    torch.testing.assert_close(causal_conv1d(x, weight, method=method), loop_causal(x, weight), rtol=0, atol=1e-13)


def both(function, x, weight, bias):
    """Results and gradients, directly and by FFT."""
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    results = []
    for method in ('direct', 'fft'):
        y = function(*leaves, method=method)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    return results


@pytest.mark.parametrize(('length', 'k'), LENGTHS)
def test_causal_by_fft_equals_the_direct_sum(length, k):
    x, weight = torch.randn(3, 2, length, dtype=torch.float64), torch.randn(4, 2, k, dtype=torch.float64)
    for direct, fft in zip(*both(causal_conv1d, x, weight, torch.randn(4, dtype=torch.float64))):
        torch.testing.assert_close(fft, direct, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(('size', 'kernel'), SIZES)
def test_same_by_fft_equals_the_direct_sum(size, kernel):
    x, weight = torch.randn(3, 2, *size, dtype=torch.float64), torch.randn(4, 2, *kernel, dtype=torch.float64)
    for direct, fft in zip(*both(fft_conv2d, x, weight, torch.randn(4, dtype=torch.float64))):
        torch.testing.assert_close(fft, direct, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('method', ['direct', 'fft'])
def test_the_past_knows_nothing_of_the_future(method):
    """Up to the rounding of the FFT, which is relative to the largest values of the sequence."""
    x = torch.randn(1, 2, 50)
    later = x.clone()
    later[..., 30:] += 100
    weight = torch.randn(3, 2, 50)
    past, same = (causal_conv1d(each, weight, method=method) for each in (x, later))
    error = (past - same)[..., :30].abs().max().item()
    assert error == 0 if method == 'direct' else error < 1e-6 * same.abs().max()


def test_whole_numbers_are_summed_directly(monkeypatch):
    monkeypatch.setattr(fft_conv, '_is_fft_faster', lambda *args: True)
    x, weight = torch.randint(-9, 9, (2, 3, 40)), torch.randint(-9, 9, (4, 3, 40))
    assert torch.equal(causal_conv1d(x, weight).double(), loop_causal(x, weight))
    with pytest.raises(ValueError, match=r"'fft' takes floating point numbers, got torch\.int64 and torch\.int64"):
        causal_conv1d(x, weight, method='fft')


def test_second_derivatives():
    x, weight = torch.randn(1, 2, 6, dtype=torch.float64), torch.randn(2, 2, 5, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda *args: causal_conv1d(*args, method='fft'), (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    """So the only rounding error is that of the output."""
    x, weight = torch.randn(2, 3, 200).to(dtype), torch.randn(4, 3, 200).to(dtype)
    got = causal_conv1d(x, weight, method='fft')
    exact = causal_conv1d(x.double(), weight.double(), method='direct')
    assert got.dtype == dtype
    error = (got.double() - exact).abs().max() / exact.abs().max()
    assert error <= max(torch.finfo(dtype).eps / 2, 16 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize('method', ['direct', 'fft'])
def test_autocast_gives_its_dtype(method):
    x, weight = torch.randn(2, 3, 64), torch.randn(4, 3, 64)
    exact = causal_conv1d(x.double(), weight.double(), method='direct')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        got = causal_conv1d(x, weight, method=method)
    assert got.dtype == torch.bfloat16
    tolerance = {'direct': 0.03, 'fft': torch.finfo(torch.bfloat16).eps / 2}[method]
    assert (got.double() - exact).abs().max() / exact.abs().max() < tolerance


def test_batch_of_none():
    assert causal_conv1d(torch.zeros(0, 2, 40), torch.zeros(3, 2, 40), method='fft').shape == (0, 3, 40)


@pytest.mark.parametrize(('batch', 'channels', 'size', 'kernel', 'ratio'), [
    (64, 30, (32,), 32, 2.1), (64, 30, (784,), 784, 36), (8, 30, (16,), 16, 0.57), (8, 30, (161,), 161, 3.5),
    (1, 30, (100,), 100, 0.33), (1, 30, (784,), 784, 8.2), (64, 30, (784,), 5, 0.49), (64, 30, (784,), 33, 2.8),
    (4, 64, (2000,), 33, 0.31), (8, 24, (32, 32), 5, 0.38), (8, 24, (32, 32), 9, 1.6), (8, 24, (32, 32), 33, 31),
    (64, 12, (8, 8), 5, 0.46), (64, 12, (8, 8), 9, 2.0), (8, 24, (5, 5), 9, 0.62), (1, 24, (32, 32), 9, 0.42),
    (8, 24, (128, 128), 15, 3.7), (64, 96, (32, 32), 3, 0.37), (64, 128, (512,), 9, 0.74), (16, 96, (32, 32), 5, 0.31),
    (16, 96, (32, 32), 15, 2.8), (2, 256, (16, 16), 15, 0.38), (16, 256, (500,), 9, 0.23), (16, 256, (500,), 129, 2.4),
])
def test_auto_takes_the_faster_method(monkeypatch, batch, channels, size, kernel, ratio):
    """The ratio is the speed-up by the FFT on a CPU."""
    monkeypatch.setattr(fft_conv, '_fft_conv', lambda x, *rest: 'FFT')
    x = torch.zeros(batch, channels, *size)
    weight = torch.zeros(channels, channels, *[kernel] * len(size))
    left = [kernel - 1] if len(size) == 1 else [kernel // 2] * 2
    assert fft_conv._use_fft('auto', x, weight, None, left) == (ratio > 1)


def test_auto_on_other_devices_follows_the_original():
    """On the meta device, as on a GPU."""
    def takes(size, kernel):
        x = torch.zeros(64, 30, *size, device='meta')
        return fft_conv._use_fft('auto', x, torch.zeros(30, 30, *kernel, device='meta'), None, [0] * len(size))

    assert takes((784,), (784,)) and not takes((182,), (182,)) and not takes((32, 32), (33, 33))


def test_transforms_of_functions():
    """torch.func differentiates and maps it."""
    x, weight = torch.randn(2, 3, 40, dtype=torch.float64), torch.randn(4, 3, 40, dtype=torch.float64)

    def loss(method):
        return lambda x, weight: causal_conv1d(x, weight, method=method).sin().sum()

    for fft, direct in zip(*(torch.func.grad(loss(method), (0, 1))(x, weight) for method in ('fft', 'direct'))):
        torch.testing.assert_close(fft, direct)
    many = torch.func.vmap(lambda x: causal_conv1d(x, weight, method='fft'))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(many[1], causal_conv1d(2 * x, weight, method='direct'))


@pytest.mark.parametrize('needed, products', [((True, True), 2), ((True, False), 1), ((False, True), 1)])
def test_only_the_gradients_that_are_needed(needed, products):
    """A product over the frequencies is an ``aten.bmm``, the only one of the backward pass for a gradient."""
    leaves = [torch.randn(2, 3, 40), torch.randn(4, 3, 40)]
    x, weight = (leaf.requires_grad_(flag) for leaf, flag in zip(leaves, needed))
    y = causal_conv1d(x, weight, method='fft')
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == list(needed)
    one, = {flops // products for flops in counter.get_flop_counts()['Global'].values()}
    with FlopCounterMode(display=False) as counter:
        causal_conv1d(x, weight, method='fft')
    assert counter.get_total_flops() == one


def test_keeps_its_arguments_and_no_spectra():
    x, weight = torch.randn(2, 3, 500, requires_grad=True), torch.randn(4, 3, 500, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = causal_conv1d(x, weight, method='fft')
    assert sorted(tensor.numel() for tensor in kept) == sorted([x.numel(), weight.numel()])
    assert y.untyped_storage().nbytes() == y.numel() * 4  # and no view of a larger tensor


@pytest.mark.parametrize(('x', 'weight', 'message'), [
    (torch.zeros(3, 40), torch.zeros(2, 3, 40), r'expected an input \(N, C, ...\).*got \(3, 40\)'),
    (torch.zeros(1, 2, 40), torch.zeros(2, 3, 40), r'of the same C, got \(1, 2, 40\) and \(2, 3, 40\)'),
    (torch.zeros(1, 3, 40).double(), torch.zeros(2, 3, 40), 'of one type, got torch.float64 and torch.float32'),
])
def test_shapes_that_do_not_fit(x, weight, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(x, weight, method='fft')


@pytest.mark.parametrize('method', ['direct', 'fft'])
def test_biases_of_other_sizes(method):
    with pytest.raises(ValueError, match=r'expected a bias \(2,\), got \(1,\)'):
        causal_conv1d(torch.zeros(1, 3, 40), torch.zeros(2, 3, 40), torch.zeros(1), method)


def test_even_kernels_have_no_middle():
    with pytest.raises(ValueError, match='odd sizes, got 4x5'):
        fft_conv2d(torch.zeros(1, 1, 9, 9), torch.zeros(1, 1, 4, 5))


def test_doubles_stay_doubles_under_autocast():
    x = torch.randn(1, 2, 64, dtype=torch.float64)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert causal_conv1d(x, torch.randn(2, 2, 64, dtype=torch.float64), method='fft').dtype == torch.float64


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
def test_scripted_and_traced():
    """'auto' is direct; a named method raises."""
    x = torch.randn(1, 2, 64)
    module = CausalConv1d(2, 3, 64)
    expected = module(x)
    torch.testing.assert_close(torch.jit.script(module)(x), expected)
    torch.testing.assert_close(torch.jit.trace(module, x)(x), expected)
    named = CausalConv1d(2, 3, 64, method='fft')
    with pytest.raises(Exception, match="'fft' cannot be scripted or traced"):
        torch.jit.script(named)(x)
    with pytest.raises(ValueError, match="'fft' cannot be scripted or traced"):
        torch.jit.trace(named, x)


@pytest.mark.parametrize('module', [CausalConv1d(3, 4, 40, bias=True, method='fft'), FFTConv2d(3, 4, 9, method='fft')])
def test_modules_are_their_functions(module):
    x = torch.randn(2, 3, *[40] * (module.weight.ndim - 2))
    function = causal_conv1d if module.weight.ndim == 3 else fft_conv2d
    assert torch.equal(module(x), function(x, module.weight, module.bias, 'fft'))
    assert "method='fft'" in repr(module)


@pytest.mark.parametrize('make', [
    lambda: CausalConv1d(1, 1, 3, method='quick'), lambda: FFTConv2d(1, 1, 3, method='quick'),
    lambda: causal_conv1d(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), method='quick')])
def test_unknown_methods(make):
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'quick'"):
        make()


def test_exported_directly():
    module = CausalConv1d(2, 3, 64)
    x = torch.randn(1, 2, 64)
    graph = torch.export.export(module, (x,)).graph_module.code
    assert 'fft' not in graph and 'conv1d' in graph


def test_fx_sees_one_call():
    graph = torch.fx.symbolic_trace(CausalConv1d(2, 3, 64)).graph
    assert [node.target for node in graph.nodes if node.op == 'call_function'] == [causal_conv1d]
