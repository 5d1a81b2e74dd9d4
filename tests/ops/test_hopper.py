"""The kernels for compute capability 9.0: their indices in float64, when they are selected, and results on a GPU."""
import logging
import sys
from contextlib import nullcontext

import pytest
import torch
from grid import Shape, assert_as_exact_as, make, plain_conv, terms

pytest.importorskip('triton', reason='PyTorch brings Triton on Linux only')
import ahead_of_time
import gluon_interpreter
from triton.compiler.errors import CompilationError

from smpconv_models.ops import _backends, _triton
from smpconv_models.ops._triton import kernels, launch, tuning

# Both numbers of blocks, with and without rows of blocks beyond the map; fewer images than a program's, and more.
SHAPES = {
    'three_blocks_and_a_half': Shape(19, 1, 11, 56, 31, 31),
    'widest_kernel': Shape(3, 1, 18, 64, 9, 33),
    'two_blocks': Shape(17, 2, 9, 28, 29, 29),
    'low_map': Shape(16, 3, 3, 24, 51, 19),
}


@pytest.fixture(autouse=True)
def nothing_refused():
    launch._refused.clear()
    yield
    launch._refused.clear()


def run_on_cpu(monkeypatch, function, *args, **options):
    """Return what a function of launch.py returns, with its kernels run in float64."""
    results = []
    for launched in ahead_of_time.launches(monkeypatch, lambda: results.append(function(*args, **options))):
        gluon_interpreter.run(launched)
    return results[0]


def assert_equal(got, exact):
    assert (got - exact).norm() <= 1e-13 * exact.norm()     # NaN fails the comparison too


class TestForward:
    @pytest.mark.parametrize('name', SHAPES)
    @pytest.mark.parametrize('flipped', [False, True])
    def test_indices(self, monkeypatch, name, flipped):
        shape = SHAPES[name]
        x, weight, bias, _ = make(shape, torch.float64)
        got = run_on_cpu(
            monkeypatch, launch.hopper_forward, x, weight, bias, tuning.HopperTile(bn=16), flipped=flipped)
        assert_equal(got, plain_conv(x, weight.flip(2, 3) if flipped else weight, bias, (1, 1)))

    @pytest.mark.parametrize('stages', [2, 3, 6])
    def test_slices_of_images_and_channels(self, monkeypatch, stages):
        x, weight, _, _ = make(SHAPES['two_blocks'], torch.float64)
        x = torch.cat([x, x], 1).repeat_interleave(2, 0)[::2, 1:3]
        tile = tuning.HopperTile(bn=16, num_stages=stages)
        assert_equal(run_on_cpu(monkeypatch, launch.hopper_forward, x, weight, None, tile),
                     plain_conv(x, weight, None, (1, 1)))


MAP_SHAPES = {
    'k27': Shape(19, 2, 14, 14, 27, 27),
    'k13': Shape(17, 3, 7, 7, 13, 13),
    'small_kernel': Shape(5, 3, 9, 12, 5, 7),
    'odd_rows': Shape(16, 2, 12, 11, 9, 21),
    'largest_kernel': Shape(17, 2, 10, 8, 51, 33),
    'largest_map': Shape(33, 1, 16, 16, 31, 31),
}


class TestMapForward:
    @pytest.mark.parametrize('name', MAP_SHAPES)
    @pytest.mark.parametrize('flipped', [False, True])
    def test_indices(self, monkeypatch, name, flipped):
        shape = MAP_SHAPES[name]
        x, weight, bias, _ = make(shape, torch.float64)
        for num_warps in (4, 8):
            tile = tuning.HopperMapTile(bn=16, num_warps=num_warps)
            got = run_on_cpu(monkeypatch, launch.hopper_map_forward, x, weight, bias, tile, flipped=flipped)
            assert_equal(got, plain_conv(x, weight.flip(2, 3) if flipped else weight, bias, (1, 1)))

    @pytest.mark.parametrize('name', ['k27', 'k13'])
    def test_slices_of_images_and_channels(self, monkeypatch, name):
        x, weight, _, _ = make(MAP_SHAPES[name], torch.float64)
        c = x.shape[1]
        x = torch.cat([x, x], 1).repeat_interleave(2, 0)[::2, 1:1 + c]
        tile = tuning.HopperMapTile(bn=16, num_warps=4)
        assert_equal(run_on_cpu(monkeypatch, launch.hopper_map_forward, x, weight, None, tile),
                     plain_conv(x, weight, None, (1, 1)))


GRAD_SHAPES = {
    'k27': Shape(19, 2, 14, 14, 27, 27),
    'small_kernel': Shape(5, 3, 9, 12, 5, 7),
    'beyond_the_map': Shape(17, 2, 10, 8, 51, 33),
    'largest_map': Shape(33, 1, 16, 16, 31, 31),
}


class TestWeightGrad:
    @pytest.mark.parametrize('name', GRAD_SHAPES)
    def test_indices(self, monkeypatch, name):
        shape = GRAD_SHAPES[name]
        x, _, _, grad = make(shape, torch.float64)
        size = [shape.kh, shape.kw]
        got = run_on_cpu(monkeypatch, launch.hopper_map_weight_grad, grad, x, size, tuning.HopperGradTile(bn=16))
        assert_equal(got, exact_weight_grad(x, grad, size))

    def test_slices_of_images_and_channels(self, monkeypatch):
        x, _, _, grad = make(GRAD_SHAPES['k27'], torch.float64)
        x = torch.cat([x, x], 1).repeat_interleave(2, 0)[::2, 1:3]
        grad = torch.cat([grad, grad], 1)[:, 1:3]
        got = run_on_cpu(monkeypatch, launch.hopper_map_weight_grad, grad, x, [27, 27], tuning.HopperGradTile(bn=16))
        assert_equal(got, exact_weight_grad(x, grad, [27, 27]))


SMALL_GRAD_SHAPES = {
    'k13': Shape(37, 2, 7, 7, 13, 13),
    'small_kernel': Shape(5, 3, 4, 6, 5, 3),
    'beyond_the_map': Shape(16, 2, 5, 8, 17, 33),
    'largest_map': Shape(33, 1, 8, 8, 15, 15),
}


class TestSmallWeightGrad:
    @pytest.mark.parametrize('name', SMALL_GRAD_SHAPES)
    def test_indices(self, monkeypatch, name):
        shape = SMALL_GRAD_SHAPES[name]
        x, _, _, grad = make(shape, torch.float64)
        size = [shape.kh, shape.kw]
        got = run_on_cpu(
            monkeypatch, launch.hopper_small_map_weight_grad, grad, x, size, tuning.HopperGradTile(bn=16))
        assert_equal(got, exact_weight_grad(x, grad, size))

    def test_slices_of_images_and_channels(self, monkeypatch):
        x, _, _, grad = make(SMALL_GRAD_SHAPES['k13'], torch.float64)
        x = torch.cat([x, x], 1).repeat_interleave(2, 0)[::2, 1:3]
        grad = torch.cat([grad, grad], 1)[:, 1:3]
        tile = tuning.HopperGradTile(bn=32)
        got = run_on_cpu(monkeypatch, launch.hopper_small_map_weight_grad, grad, x, [13, 13], tile)
        assert_equal(got, exact_weight_grad(x, grad, [13, 13]))


BLOCK_GRAD_SHAPES = {
    'three_blocks_and_a_half': Shape(19, 1, 43, 56, 31, 31),
    'two_blocks': Shape(17, 2, 28, 28, 29, 29),
    'low_map': Shape(3, 2, 3, 24, 31, 19),
    'small_kernel': Shape(5, 1, 20, 64, 5, 21),
}


class TestBlockWeightGrad:
    @pytest.mark.parametrize('name', BLOCK_GRAD_SHAPES)
    def test_indices(self, monkeypatch, name):
        shape = BLOCK_GRAD_SHAPES[name]
        x, _, _, grad = make(shape, torch.float64)
        size = [shape.kh, shape.kw]
        got = run_on_cpu(
            monkeypatch, launch.hopper_block_weight_grad, grad, x, size, tuning.HopperBlockGradTile(bn=16))
        assert_equal(got, exact_weight_grad(x, grad, size))

    @pytest.mark.parametrize('stages', [1, 2, 4])
    def test_slices_of_images_and_channels(self, monkeypatch, stages):
        x, _, _, grad = make(Shape(16, 2, 25, 28, 29, 29), torch.float64)
        x = torch.cat([x, x], 1).repeat_interleave(2, 0)[::2, 1:3]
        grad = torch.cat([grad, grad], 1)[:, 1:3]
        tile = tuning.HopperBlockGradTile(bn=16, num_stages=stages)
        got = run_on_cpu(monkeypatch, launch.hopper_block_weight_grad, grad, x, [29, 29], tile)
        assert_equal(got, exact_weight_grad(x, grad, [29, 29]))


def exact_weight_grad(x, grad, size):
    weight = torch.zeros(x.shape[1], 1, *size, dtype=x.dtype, requires_grad=True)
    return torch.autograd.grad(plain_conv(x, weight, None, (1, 1)), weight, grad)[0]


def test_the_interpreter_sees_a_copy_that_was_not_waited_for(monkeypatch):
    monkeypatch.setattr(gluon_interpreter.Copies, 'wait_group', lambda copies, outstanding: None)
    x, weight, _, _ = make(SHAPES['two_blocks'], torch.float64)
    assert run_on_cpu(monkeypatch, launch.hopper_forward, x, weight, None, tuning.HopperTile(bn=16)).isnan().any()


def test_the_interpreter_sees_an_operand_that_was_overwritten(monkeypatch):
    wait = gluon_interpreter.Products.wait
    monkeypatch.setattr(
        gluon_interpreter.Products, 'wait', lambda products, outstanding, deps: wait(products, 30 * outstanding, deps))
    x, _, _, grad = make(BLOCK_GRAD_SHAPES['two_blocks'], torch.float64)
    tile = tuning.HopperBlockGradTile(bn=16)
    assert run_on_cpu(monkeypatch, launch.hopper_block_weight_grad, grad, x, [29, 29], tile).isnan().any()


# --- selection ---


def forms(x, kernel_size, precision='half'):
    return [form for form, _ in tuning.candidates('forward', x, kernel_size, precision)]


def meta(n, c, h, w, dtype=torch.bfloat16):
    return torch.empty(n, c, h, w, dtype=dtype, device='meta')


@pytest.mark.parametrize(('size', 'kernel', 'selected'), [
    ((64, 96, 56, 56), 31, True), ((64, 192, 28, 28), 29, True), ((16, 8, 9, 64), 33, True),
    ((64, 384, 14, 14), 27, False), ((64, 8, 56, 48), 31, False), ((64, 8, 56, 72), 31, False),     # blocks
    ((64, 8, 56, 56), 35, False),       # a second neighbour
    ((64, 8, 56, 56), 17, False),       # two chunks in the other form
    ((8, 96, 56, 56), 31, False),       # images
    ((64, 8, 56, 58), 31, False),       # copies of 4 bytes
], ids=str)
def test_selected_by_shape(monkeypatch, size, kernel, selected):
    """Before the form of the other devices, which stays."""
    monkeypatch.setattr(tuning, '_capability', lambda device: 90)
    found = forms(meta(*size), [kernel, kernel])
    assert (found[0] == 'hopper_forward') == selected
    assert 'block_forward' in found


@pytest.mark.parametrize('capability', [None, 80, 89, 100, 120])
def test_other_devices(monkeypatch, capability):
    monkeypatch.setattr(tuning, '_capability', lambda device: capability)
    assert forms(meta(64, 96, 56, 56), [31, 31]) == ['block_forward']


@pytest.mark.parametrize(('size', 'kernel', 'selected'), [
    ((64, 384, 14, 14), 27, True), ((64, 768, 7, 7), 13, True), ((16, 8, 16, 16), 7, True),
    ((64, 8, 14, 13), 27, True),
    ((64, 8, 14, 14), 5, False), ((8, 8, 14, 14), 27, False), ((64, 8, 17, 14), 27, False),
    ((64, 8, 14, 17), 27, False),
], ids=str)
def test_map_forward_by_shape(monkeypatch, size, kernel, selected):
    monkeypatch.setattr(tuning, '_capability', lambda device: 90)
    found = forms(meta(*size), [kernel, kernel])
    assert (found[0] == 'hopper_map_forward') == selected
    assert 'hopper' not in found[-1]
    memory = torch.empty(size[0] * size[1] * size[2] * size[3] + 1, dtype=torch.bfloat16)
    found = forms(memory[1:].view(size), [kernel, kernel])
    assert (found[0] == 'hopper_map_forward') == (selected and size[3] % 2 == 1)


@pytest.mark.parametrize(('height', 'width', 'selected'), [
    (14, 14, True), (16, 16, True), (8, 10, True), (7, 7, False), (14, 13, False), (14, 18, False)])
def test_weight_grad_by_shape(monkeypatch, height, width, selected):
    monkeypatch.setattr(tuning, '_capability', lambda device: 90)
    x = meta(64, 8, height, width)
    found = [form for form, _ in tuning.candidates('weight_grad', x, [27, 27], 'half', x)]
    assert found[:-1].count('hopper_map_weight_grad') == selected
    odd = meta(64, 9, 14, 14).as_strided(x.shape, (9 * 14 * 14 + 1, height * width, width, 1))
    assert 'hopper_map_weight_grad' not in dict(tuning.candidates('weight_grad', x, [27, 27], 'half', odd))


@pytest.mark.parametrize(('height', 'width', 'selected'), [
    (7, 7, True), (8, 8, True), (4, 5, True), (3, 7, False), (9, 7, False), (7, 9, False)])
def test_small_weight_grad_by_shape(monkeypatch, height, width, selected):
    monkeypatch.setattr(tuning, '_capability', lambda device: 90)
    x = meta(64, 8, height, width)
    found = [form for form, _ in tuning.candidates('weight_grad', x, [13, 13], 'half', x)]
    assert (found[0] == 'hopper_small_map_weight_grad') == selected
    assert found[-1] == 'block_weight_grad'


@pytest.mark.parametrize(('size', 'kernel', 'selected'), [
    ((64, 96, 56, 56), [31, 31], True), ((64, 192, 28, 28), [29, 29], True), ((16, 8, 9, 64), [13, 31], True),
    ((64, 384, 14, 14), [27, 27], False), ((64, 8, 56, 48), [31, 31], False),       # blocks
    ((64, 8, 56, 56), [31, 33], False), ((64, 8, 56, 56), [33, 31], False), ((64, 8, 56, 56), [11, 31], False),
    ((8, 96, 56, 56), [31, 31], False),     # images
    ((64, 8, 56, 58), [31, 31], False),     # copies of 4 bytes
], ids=str)
def test_block_weight_grad_by_shape(monkeypatch, size, kernel, selected):
    monkeypatch.setattr(tuning, '_capability', lambda device: 90)
    x = meta(*size)
    found = [form for form, _ in tuning.candidates('weight_grad', x, kernel, 'half', x)]
    assert found[:-1].count('hopper_block_weight_grad') == selected
    assert found[-1] == 'block_weight_grad'
    monkeypatch.setattr(tuning, '_capability', lambda device: 100)
    assert 'hopper' not in str(tuning.candidates('weight_grad', x, kernel, 'half', x))


def test_other_types_and_unaligned_memory(monkeypatch):
    monkeypatch.setattr(tuning, '_capability', lambda device: 90)
    assert forms(meta(64, 96, 56, 56, torch.float32), [31, 31], 'tf32') == ['block_forward']
    memory = torch.empty(16 * 28 * 28 + 1, dtype=torch.bfloat16)
    assert forms(memory[:-1].view(16, 1, 28, 28), [29, 29])[0] == 'hopper_forward'
    assert forms(memory[1:].view(16, 1, 28, 28), [29, 29])[0] == 'block_forward'


def selected_launches(monkeypatch, x):
    """Return the names of the kernels that a forward pass launches, without a replacement of the Hopper kernels."""
    recorded = []
    with monkeypatch.context() as patch:
        patch.setattr(tuning, '_capability', lambda device: 90)
        patch.setattr(launch, 'kernels', ahead_of_time.Recorder(kernels, recorded))
        launch.forward(x, meta(x.shape[1], 1, 31, 31), None)
    return [launched.kernel.fn.__name__ for launched in recorded if 'expand' not in launched.kernel.fn.__name__]


def test_without_gluon(monkeypatch, caplog):
    """The other form runs, for a reason that is logged once."""
    monkeypatch.setitem(sys.modules, 'triton.experimental.gluon', None)
    monkeypatch.delitem(sys.modules, f'{_triton.__name__}.hopper')
    monkeypatch.delattr(_triton, 'hopper')
    with caplog.at_level(logging.DEBUG, logger='smpconv_models'):
        for _ in range(3):
            assert selected_launches(monkeypatch, meta(64, 96, 56, 56)) == ['block_forward']
    record, = caplog.records
    assert record.levelname == 'DEBUG' and 'hopper_forward' in record.message
    assert 'cannot import Gluon: ' in record.message


@pytest.mark.parametrize('error', [
    CompilationError('', None, 'module has no attribute'), RuntimeError('PassManager::run failed')], ids=repr)
def test_that_does_not_build(monkeypatch, caplog, error):
    """It is not tried again for the same problem."""
    tried = []

    class Broken:
        def __getitem__(self, grid):
            def launched(*args, **kwargs):
                tried.append(grid)
                raise error
            return launched
    from smpconv_models.ops._triton import hopper
    monkeypatch.setattr(hopper, 'hopper_forward', Broken())
    with caplog.at_level(logging.DEBUG, logger='smpconv_models'):
        for _ in range(3):
            assert selected_launches(monkeypatch, meta(64, 96, 56, 56)) == ['block_forward']
    assert len(tried) == len(caplog.records) == 1
    assert str(error).strip() in caplog.text


@pytest.mark.parametrize('form', launch._EXPERIMENTAL)
@pytest.mark.parametrize('wrong', [1., 1.1, float('nan')])
def test_a_form_that_computes_something_else_is_passed_over(monkeypatch, form, wrong):
    """The kernels themselves need a GPU: here both forms are plain convolutions, and one is wrong."""
    monkeypatch.setattr(launch, '_checked', {})

    def stand_in(factor):
        if form.endswith('forward'):
            return lambda x, weight, bias, tile: factor * plain_conv(x, weight, bias, (1, 1))
        return lambda grad, x, size, tile: factor * exact_weight_grad(x, grad, size)

    monkeypatch.setitem(launch._FORMS, form, stand_in(wrong))
    monkeypatch.setitem(launch._FORMS, launch._EXPERIMENTAL[form], stand_in(1.))
    for _ in range(2):
        with nullcontext() if wrong == 1. else pytest.raises(_backends.LaunchError, match='computes something else'):
            launch._check_experimental(form, torch.device('cpu'), torch.float16)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason='compute capability 9.0')
class TestOnDevice:
    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize('name', SHAPES)
    @pytest.mark.parametrize('flipped', [False, True])
    def test_forward(self, name, dtype, flipped):
        shape = SHAPES[name]
        x, weight, bias, _ = make(shape, dtype, device='cuda')
        kernel = weight.flip(2, 3) if flipped else weight
        exact = plain_conv(*(tensor.cpu().double() for tensor in (x, kernel, bias)), (1, 1))
        plain = plain_conv(x, kernel, bias, (1, 1))
        got = [launch.hopper_forward(x, weight, bias, tuning.HopperTile(bn=bn), flipped=flipped) for bn in (16, 64, 64)]
        for each in got:
            assert_as_exact_as(each.cpu(), plain.cpu(), exact, terms(shape)['y'])
        assert torch.equal(got[1], got[2])

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize('name', MAP_SHAPES)
    @pytest.mark.parametrize('flipped', [False, True])
    def test_map_forward(self, name, dtype, flipped):
        shape = MAP_SHAPES[name]
        x, weight, bias, _ = make(shape, dtype, device='cuda')
        kernel = weight.flip(2, 3) if flipped else weight
        exact = plain_conv(*(tensor.cpu().double() for tensor in (x, kernel, bias)), (1, 1))
        plain = plain_conv(x, kernel, bias, (1, 1))
        got = [
            launch.hopper_map_forward(x, weight, bias, tuning.HopperMapTile(bn=bn, num_warps=warps), flipped=flipped)
            for bn, warps in ((16, 4), (64, 8), (64, 8))]
        for each in got:
            assert_as_exact_as(each.cpu(), plain.cpu(), exact, terms(shape)['y'])
        assert torch.equal(got[1], got[2])

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(('form', 'shape'), [
        *(pytest.param('hopper_map_weight_grad', shape, id=name) for name, shape in GRAD_SHAPES.items()),
        *(pytest.param('hopper_small_map_weight_grad', shape, id=f'small_{name}')
          for name, shape in SMALL_GRAD_SHAPES.items())])
    def test_weight_grad(self, form, shape, dtype):
        x, _, _, grad = make(shape, dtype, device='cuda')
        size = [shape.kh, shape.kw]
        exact = exact_weight_grad(x.cpu().double(), grad.cpu().double(), size)
        plain = exact_weight_grad(x, grad, size)
        got = [launch._FORMS[form](grad, x, size, tuning.HopperGradTile(bn=bn)) for bn in (16, 64, 64)]
        for each in got:
            assert_as_exact_as(each.cpu(), plain.cpu(), exact, terms(shape)['dw'])
        assert torch.equal(got[1], got[2])

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize('name', BLOCK_GRAD_SHAPES)
    def test_block_weight_grad(self, name, dtype):
        shape = BLOCK_GRAD_SHAPES[name]
        x, _, _, grad = make(shape, dtype, device='cuda')
        size = [shape.kh, shape.kw]
        exact = exact_weight_grad(x.cpu().double(), grad.cpu().double(), size)
        plain = exact_weight_grad(x, grad, size)
        got = [
            launch.hopper_block_weight_grad(grad, x, size, tuning.HopperBlockGradTile(bn=16, num_stages=stages))
            for stages in (1, 3, 3)]
        for each in got:
            assert_as_exact_as(each.cpu(), plain.cpu(), exact, terms(shape)['dw'])
        assert torch.equal(got[1], got[2])

    def test_nan_stays_in_its_map(self):
        x, weight, bias, _ = make(SHAPES['two_blocks'], torch.float16, device='cuda')
        x[1, 1, 4, 4] = float('nan')
        y = launch.hopper_forward(x, weight, bias, tuning.HopperTile(bn=16))
        assert y[1, 1].isnan().any()
        y[1, 1] = 0
        assert y.isfinite().all()
