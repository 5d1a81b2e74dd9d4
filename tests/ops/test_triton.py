"""The Triton kernels, under Triton's interpreter or on a GPU; and the reasons for which the backend cannot run.

The interpreter is chosen when Triton is imported, so test_triton_interpreted.py runs this file again in a separate
process; on a machine with a CUDA device, ``pytest -m gpu`` runs it there.
"""
import ast
import json
import logging
import mmap
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from grid import LAYOUTS, SHAPES, Shape, assert_as_exact_as, make, plain_conv, terms, with_gradients

from smpconv_models.ops import _backends, _triton, available_backends, depthwise_conv2d
from smpconv_models.ops._problem import ConvProblem, make_axes, memory_format_of

pytest.importorskip('triton', reason='PyTorch brings Triton on Linux only')
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from smpconv_models.ops._triton import launch, tuning

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cpu' if INTERPRETED else 'cuda'
on_device = [] if INTERPRETED else pytest.mark.gpu
MODES = {
    'float16': (torch.float16, 'tf32'), 'bfloat16': (torch.bfloat16, 'tf32'),
    'tf32': (torch.float32, 'tf32'), 'ieee': (torch.float32, 'ieee'),
}

# Cases beyond the grid of all backends: maps wider than a block, and as wide as a multiple of its columns.
WIDE = {
    'k29': Shape(2, 2, 28, 28, 29, 29),
    'k31_three_chunks': Shape(1, 1, 19, 70, 31, 31),
    'k51_five_chunks': Shape(1, 1, 11, 100, 51, 51),
    'k7_one_chunk': Shape(3, 2, 21, 56, 7, 7),
    'k3_aligned': Shape(2, 1, 9, 64, 3, 3),
    'tall': Shape(2, 2, 65, 6, 17, 3),
    'one_row': Shape(2, 1, 1, 300, 1, 63),
    'one_column': Shape(2, 1, 150, 1, 63, 1),
    'k63': Shape(1, 1, 17, 33, 63, 63),
    'many_images': Shape(70, 1, 5, 18, 5, 5),
}
ALL = {**{name: replace(shape, c=2) for name, shape in SHAPES.items() if shape.is_same}, **WIDE}


@pytest.fixture(autouse=True)
def nothing_refused():
    launch._refused.clear()
    yield
    launch._refused.clear()


@pytest.fixture
def mode(request, fp32_precision):
    dtype, precision = MODES[request.param]
    if INTERPRETED and (reason := _triton.unsupported_reason(torch.device(DEVICE), dtype)):
        pytest.skip(reason)
    fp32_precision(precision)
    return dtype


def expected(shape, x, weight, bias, grad):
    """Return the results of a plain convolution of the same dtype, and those in float64."""
    def function(*args):
        return plain_conv(*args, **shape.options)
    plain = with_gradients(function, x, weight, bias, grad)
    return plain, with_gradients(function, *(tensor.cpu().double() for tensor in (x, weight, bias, grad)))


def assert_close(got, plain, exact, num_terms, dtype):
    """Products of tf32 have 11 bits on a GPU; the interpreter's are of float32."""
    if launch.matmul_precision(dtype) == 'tf32' and not INTERPRETED:
        assert (got.cpu().double() - exact).norm() <= 2 ** -10 * exact.norm()
    else:
        assert_as_exact_as(got.cpu(), plain.cpu(), exact, num_terms)


FORMS = tuple(form for form in launch._FORMS if form not in launch._EXPERIMENTAL)     # test_hopper.py has the others
FITTING = [
    (form, name) for form in FORMS for name, shape in ALL.items()
    if form == 'block_forward' or form == 'block_weight_grad'
    or (form == 'map_forward' and shape.h * shape.w <= 400)
    or (form == 'map_weight_grad' and tuning.weight_grad_form(shape.h, shape.w) == form)
]


def default_tile(form, shape, precision):
    return tuning.TILES[form].default(shape.n, shape.h, shape.w, [shape.kh, shape.kw], precision)


def run_form(form, shape, tensors, tile):
    x, weight, bias, grad = tensors
    args = (x, weight, bias) if form.endswith('forward') else (grad, x, [shape.kh, shape.kw])
    return launch._FORMS[form](*args, tile)


def check_form(form, shape, dtype, tile):
    tensors = make(shape, dtype, device=DEVICE)
    plain, exact = expected(shape, *tensors)
    key = 'y' if form.endswith('forward') else 'dw'
    got = run_form(form, shape, tensors, tile)
    assert_close(got, plain[key], exact[key], terms(shape)[key], dtype)


class Refused:
    """Replacement of a kernel that the device refuses with the given errors, one a launch, and takes afterwards."""

    def __init__(self, kernel, *errors):
        self.kernel, self.errors, self.launches = kernel, list(errors), 0

    def __getitem__(self, grid):
        def launched(*args, **kwargs):
            self.launches += 1
            if self.errors:
                raise self.errors.pop(0)
            return self.kernel[grid](*args, **kwargs)
        return launched


TOO_LARGE = OutOfResources(232448, 101376, 'shared memory')
LACK = 'shared memory needed 232448, available 101376'
CLOSE = dict(rtol=1e-5, atol=1e-4)      # sums of at most 162 products of float32
FORWARD, WEIGHT_GRAD = ('block_forward', 'map_forward'), ('block_weight_grad',)


@pytest.fixture
def exact_products(fp32_precision):
    """Products of float32 on a GPU too, so that results compare with those of plain conv2d."""
    fp32_precision('ieee')


def refuse(monkeypatch, kernels, *errors):
    """Replace kernels; return the replacements."""
    found = [Refused(getattr(launch.kernels, name), *errors) for name in kernels]
    for name, refused in zip(kernels, found):
        monkeypatch.setattr(launch.kernels, name, refused)
    return found


@pytest.fixture
def auto_takes_triton(monkeypatch):
    monkeypatch.setattr(_backends, 'AUTO_ORDER', ('triton', 'reference'))
    monkeypatch.setattr(_triton, 'skip_reason', lambda problem: None)


class TestKernels:
    pytestmark = on_device

    @pytest.mark.parametrize('mode', MODES, indirect=True)
    @pytest.mark.parametrize(('form', 'name'), FITTING)
    def test_every_form_on_every_shape(self, form, name, mode):
        """Every form, also those that would not be selected."""
        shape = ALL[name]
        check_form(form, shape, mode, default_tile(form, shape, launch.matmul_precision(mode)))

    @pytest.mark.parametrize(('form', 'tile'), [
        ('map_forward', tuning.MapTile(bn=16, bi=64, bo=16)),
        ('block_forward', tuning.BlockTile(r=1, s=16, tc=64, bp=16)),
        ('block_forward', tuning.BlockTile(r=16, s=16, tc=16, bp=64)),
        ('block_forward', tuning.BlockTile(r=2, s=32, tc=16, bp=32)),
        ('block_forward', tuning.BlockTile(r=4, s=16, tc=16, bp=16, unroll=1)),
        ('map_weight_grad', tuning.MapGradTile(bn=32, bi=512, bo=32)),
        ('block_weight_grad', tuning.BlockGradTile(r=2, s=16, d=16, tc=32, bn=1, bj=16)),
        ('block_weight_grad', tuning.BlockGradTile(r=4, s=32, d=4, tc=64, bn=2, bj=8)),
        ('block_weight_grad', tuning.BlockGradTile(r=1, s=16, d=2, tc=16, bn=16, bj=1)),
    ], ids=str)
    def test_other_tiles(self, form, tile):
        check_form(form, Shape(3, 1, 9, 23 if form.startswith('block') else 13, 9, 11), torch.float32, tile)

    @pytest.mark.parametrize(('kernels', 'error', 'message'), [
        (FORWARD, TOO_LARGE, f"'triton' has no kernel for 1x1x9x18 that fits {DEVICE}.*: {LACK}"),
        (WEIGHT_GRAD, TOO_LARGE, f"'triton' has no kernel for 1x1x9x18 that fits {DEVICE}.*: {LACK}"),
        (FORWARD, CompilationError('', None, 'not found'), 'could not run its kernel on .*not found'),
        (WEIGHT_GRAD, PTXASError('too many registers'), 'could not run its kernel on .*too many registers'),
        (FORWARD, RuntimeError('PassManager::run failed'), 'could not run its kernel on .*PassManager::run failed'),
    ], ids=['forward', 'weight_grad', 'compiler', 'assembler', 'pass'])
    @pytest.mark.parametrize('backend', ['triton', 'auto'])
    def test_a_kernel_that_the_device_refuses(
            self, monkeypatch, caplog, auto_takes_triton, exact_products, backend, kernels, error, message):
        """A named backend raises with the numbers; auto is plain conv2d, which is logged once."""
        refused = refuse(monkeypatch, kernels, *[error] * 100)
        tensors = make(Shape(1, 1, 9, 18, 3, 3), torch.float32, device=DEVICE)

        def call():
            return with_gradients(lambda *args: depthwise_conv2d(*args, backend=backend), *tensors)

        if backend == 'triton':
            with pytest.raises(RuntimeError, match=message):
                call()
            return
        plain = with_gradients(lambda *args: plain_conv(*args, (1, 1)), *tensors)
        with caplog.at_level(logging.WARNING, logger='smpconv_models'):
            first = call()
            launches = [each.launches for each in refused]
            second = call()
        assert [each.launches for each in refused] == launches, 'what was refused is not tried again'
        assert [bool(re.search(message, record.message)) for record in caplog.records] == [True]
        torch.testing.assert_close(first, plain, **CLOSE)
        torch.testing.assert_close(second, plain, **CLOSE)

    def test_smaller_tiles_until_one_is_taken(self, monkeypatch, exact_products):
        """And the next call starts with it."""
        refused, = refuse(monkeypatch, ['block_forward'], TOO_LARGE, TOO_LARGE)
        shape = Shape(1, 1, 9, 70, 9, 9)
        x, weight, bias, _ = make(shape, torch.float32, device=DEVICE)
        for launches in (3, 4):
            got = launch.forward(x, weight, bias)
            torch.testing.assert_close(got, plain_conv(x, weight, bias, (1, 1)), **CLOSE)
            assert refused.launches == launches

    @pytest.mark.parametrize('error', [CompilationError('', None, 'unknown'), PTXASError('unknown')], ids=repr)
    def test_another_form_if_one_cannot_be_built(self, monkeypatch, exact_products, error):
        refused, = refuse(monkeypatch, ['block_forward'], error)
        x, weight, bias, _ = make(Shape(2, 1, 12, 12, 9, 9), torch.float32, device=DEVICE)
        for _ in range(2):
            got = launch.forward(x, weight, bias)
            torch.testing.assert_close(got, plain_conv(x, weight, bias, (1, 1)), **CLOSE)
            assert refused.launches == 1

    @pytest.mark.parametrize(('error', 'capturing'), [
        (RuntimeError('Triton Error [CUDA]: out of memory'), False), (TOO_LARGE, True)], ids=['driver', 'capturing'])
    @pytest.mark.parametrize('backend', ['triton', 'auto'])
    def test_what_may_pass_is_tried_again(
            self, monkeypatch, auto_takes_triton, exact_products, backend, error, capturing):
        """The driver's errors, and any while a CUDA graph is captured."""
        for module in (launch, _backends):
            monkeypatch.setattr(module, 'is_capturing', lambda: capturing)
        refused = refuse(monkeypatch, FORWARD, *[error] * 20)
        x, weight, bias, _ = make(Shape(2, 1, 12, 12, 9, 9), torch.float32, device=DEVICE)
        with pytest.raises(_backends.LaunchError) if backend == 'triton' else nullcontext():
            depthwise_conv2d(x, weight, bias, backend=backend)
        before = sum(each.launches for each in refused)
        for each in refused:
            each.errors.clear()
        got = depthwise_conv2d(x, weight, bias, backend=backend)
        assert sum(each.launches for each in refused) == before + 1
        torch.testing.assert_close(got, plain_conv(x, weight, bias, (1, 1)), **CLOSE)

    @pytest.mark.parametrize('backend', ['triton', 'auto'])
    def test_out_of_memory_is_pytorchs_own_error(self, monkeypatch, auto_takes_triton, exact_products, backend):
        """And the next call succeeds."""
        refuse(monkeypatch, FORWARD, torch.OutOfMemoryError('full'))
        x, weight, bias, _ = make(Shape(1, 1, 9, 18, 3, 3), torch.float32, device=DEVICE)
        with pytest.raises(torch.OutOfMemoryError, match='full'):
            depthwise_conv2d(x, weight, bias, backend=backend)
        got = depthwise_conv2d(x, weight, bias, backend=backend)
        torch.testing.assert_close(got, plain_conv(x, weight, bias, (1, 1)), **CLOSE)

    @pytest.mark.parametrize('form', FORMS)
    def test_every_smaller_tile(self, form):
        shape = Shape(3, 1, 9, 12 if form.startswith('map') else 20, 5, 7)
        ladder = tuning._ladder(form, shape.n, shape.h, shape.w, (shape.kh, shape.kw), 'tf32', None)
        for tile in {replace(tile, num_stages=1): tile for tile in ladder}.values():
            check_form(form, shape, torch.float32, tile)

    @pytest.mark.parametrize('form', ['map_forward', 'block_forward'])
    def test_flipped(self, form):
        """To the bit what the flipped weight results in."""
        shape = Shape(2, 2, 9, 20, 5, 7)
        x, weight, bias, _ = make(shape, torch.float32, device=DEVICE)
        tile = default_tile(form, shape, 'tf32')
        flipped = launch._FORMS[form](x, weight, bias, tile, flipped=True)
        assert torch.equal(flipped, launch._FORMS[form](x, weight.flip(2, 3), bias, tile))

    @pytest.mark.parametrize(
        'size', [(2, 3, 5, 7), (1, 70, 9, 8), (3, 64, 1, 130), (2, 16, 130, 1), (2, 1, 4, 4)], ids=str)
    @pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
    def test_layouts(self, size, dtype):
        x = torch.randn(size, device=DEVICE).to(dtype)
        last = x.contiguous(memory_format=torch.channels_last)
        for tensor in (last, last[:, :3], last[1:]):
            maps = launch.contiguous_maps(tensor)
            assert torch.equal(maps, tensor)
            assert maps.is_contiguous() or size[1] == 1
        got = launch.laid_out_like(x, last)
        assert torch.equal(got, x)
        assert got.stride() == torch.empty_like(x, memory_format=memory_format_of(last)).stride()

    @pytest.mark.parametrize('path', sorted(tuning._CONFIGS.glob('*.json')), ids=lambda path: path.stem)
    def test_tuned_tiles(self, path):
        for entry in json.loads(path.read_text()):
            tile = tuning.TILES[entry['kernel']](**entry['tile'])
            if entry['kernel'] not in FORMS and INTERPRETED:
                continue
            check_form(entry['kernel'], Shape(1, 1, entry['height'], entry['width'], *entry['kernel_size']),
                       torch.float16 if entry['mode'] == 'half' else torch.float32, tile)

    def test_sum_in_parts(self, monkeypatch):
        """Few channels: several programs share a sum."""
        shape = Shape(33, 1, 5, 40, 5, 5)
        tile = tuning.BlockGradTile(r=4, s=16, d=8, tc=16, bn=4, bj=4)
        assert tile.splits(shape.n, shape.w, 6) == 9
        check_form('block_weight_grad', shape, torch.float32, tile)

    def test_tiny_kernel_on_a_map_of_one_block(self):
        """The window excludes columns outside of the map, on both sides."""
        shape = Shape(2, 2, 12, 10, 15, 15)
        tile = default_tile('block_forward', shape, 'half')
        assert tuning.window(tile.s, tile.tc, 10, 15) == (0, 1)
        check_form('block_forward', shape, torch.float32, tile)

    @pytest.mark.parametrize('form', FORMS)
    @pytest.mark.parametrize('stride', [2 ** 31 + 17, 2 ** 31 + 16])    # the second is passed divided by 8
    def test_offsets_beyond_32_bits(self, form, stride):
        """Two images two billion elements apart, in memory that is only reserved."""
        shape = Shape(2, 2, 6, 16, 3, 5)
        tensors = [tensor.half() for tensor in make(shape, torch.float32, device=DEVICE)]
        tile = default_tile(form, shape, 'half')
        near = run_form(form, shape, tensors, tile)
        tensors[0] = apart(tensors[0], stride)
        assert torch.equal(near, run_form(form, shape, tensors, tile))

    @pytest.mark.parametrize('form', FORMS)
    def test_nan_stays_in_its_map(self, form):
        """Or in its channel, for the weight gradient."""
        shape = Shape(3, 4, 9, 12, 5, 5)
        tensors = make(shape, torch.float32, device=DEVICE)
        tensors[0][1, 2, 4, 4] = float('nan')
        result = run_form(form, shape, tensors, default_tile(form, shape, 'tf32'))
        at = (1, 2) if form.endswith('forward') else (2,)
        assert result[at].isnan().any()
        result[at] = 0
        assert result.isfinite().all()

    @pytest.mark.skipif(INTERPRETED, reason='test_backends.py has it')
    @pytest.mark.parametrize('mode', MODES, indirect=True)
    @pytest.mark.parametrize('layout', LAYOUTS)
    @pytest.mark.parametrize('name', [*SHAPES, 'k29', 'k7_one_chunk'])
    def test_public_function(self, name, layout, mode):
        shape = {**SHAPES, **WIDE}[name]
        x, weight, bias, grad = make(shape, mode, layout, device=DEVICE)
        got = with_gradients(
            lambda *args: depthwise_conv2d(*args, **shape.options, backend='triton'), x, weight, bias, grad)
        plain, exact = expected(shape, x, weight, bias, grad)
        for key, num_terms in terms(shape).items():
            assert got[key].dtype == mode
            assert_close(got[key], plain[key], exact[key], num_terms, mode)

    def test_deterministic(self):
        shape = Shape(2, 2, 9, 18, 3, 3) if INTERPRETED else WIDE['k7_one_chunk']
        x, weight, bias, grad = make(shape, torch.float16, device=DEVICE)
        first, second = (with_gradients(
            lambda *args: depthwise_conv2d(*args, backend='triton'), x, weight, bias, grad) for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)


def apart(tensor, stride):
    """Return the same images, ``stride`` elements from each other."""
    n, c, h, w = tensor.shape
    size = (n - 1) * stride + c * h * w
    if DEVICE == 'cpu':
        memory = torch.frombuffer(mmap.mmap(-1, 2 * size), dtype=torch.float16)
    else:
        memory = torch.zeros(size, dtype=torch.float16, device=DEVICE)
    return memory.as_strided((n, c, h, w), (stride, h * w, w, 1)).copy_(tensor)


# --- selection of kernels, tiles and the backend ---


def test_precision_follows_the_settings_for_convolutions(fp32_precision):
    assert launch.matmul_precision(torch.bfloat16) == launch.matmul_precision(torch.float16) == 'half'
    fp32_precision('tf32')
    assert launch.matmul_precision(torch.float32) == 'tf32'
    fp32_precision('ieee')
    assert launch.matmul_precision(torch.float32) == 'ieee'
    torch.backends.cudnn.allow_tf32 = True
    assert launch.matmul_precision(torch.float32) == 'tf32'


def test_slices_of_images_and_channels_are_not_copied():
    x = torch.randn(4, 6, 5, 7)
    for same in (x, x[1:3], x[:, 2:5], x[::2, ::3], x[:, :, 1:4]):
        assert launch.contiguous_maps(same) is same
    for other in (x[..., 1:5], x.transpose(2, 3), x[:, :, ::2]):
        assert launch.contiguous_maps(other).is_contiguous()


@pytest.mark.parametrize(('height', 'width', 'forward', 'weight_grad'), [
    (7, 7, 'map_forward', 'map_weight_grad'),
    (14, 14, 'block_forward', 'map_weight_grad'),
    (16, 16, 'block_forward', 'block_weight_grad'),     # no room to rotate a row
    (4, 60, 'block_forward', 'block_weight_grad'),
    (56, 56, 'block_forward', 'block_weight_grad'),
])
def test_forms(height, width, forward, weight_grad):
    assert tuning.forward_form(height, width) == forward
    assert tuning.weight_grad_form(height, width) == weight_grad


def test_window():
    """31 wide: 15 columns to each side, from a multiple of 8 on, in chunks of 16; a map of one block has no sides."""
    assert tuning.window(16, 16, 56, 31) == (16, 3)
    assert tuning.window(16, 32, 56, 7) == (8, 1)
    assert tuning.window(32, 32, 28, 29) == (0, 1)
    assert tuning.window(16, 16, 20, 51) == (16, 3)


def test_tiles_that_would_be_wrong_are_refused():
    for tile in (dict(r=8, s=16, d=4, tc=16), dict(r=4, s=32, d=8, tc=16)):
        with pytest.raises(AssertionError, match='diagonal wraps around'):
            tuning.BlockGradTile(**tile, bn=16, bj=1)
    x = torch.ones(1, 1, 9, 9)
    for bi, bo in ((64, 16), (128, 8)):
        with pytest.raises(AssertionError, match='holds the map'):
            launch.map_weight_grad(x, x, [3, 3], tuning.MapGradTile(bn=16, bi=bi, bo=bo))


@pytest.fixture
def no_cached_tiles():
    for cached in (tuning._entries, tuning._tuned, tuning._candidates):
        cached.cache_clear()
    yield
    for cached in (tuning._entries, tuning._tuned, tuning._candidates):
        cached.cache_clear()


def test_a_tuned_tile_serves_from_half_its_batch(monkeypatch, tmp_path, no_cached_tiles):
    entry = dict(kernel='block_forward', mode='half', batch=64, height=56, width=56, kernel_size=[31, 31],
                 tile=dict(r=8, s=16, tc=16, bp=256, num_warps=8), source='a test')
    (tmp_path / 'sm_90.json').write_text(json.dumps([entry]))
    monkeypatch.setattr(tuning, '_CONFIGS', tmp_path)
    monkeypatch.setattr(tuning, '_capability', lambda device: 90)

    def bp(batch, width=56):
        return first_tile(torch.empty(batch, 1, 56, width, device='meta'), [31, 31]).bp
    assert bp(64) == bp(32) == bp(1000) == 256
    assert bp(31) == bp(64, width=57) == 128


def first_tile(x, kernel_size, precision='half'):
    """Return the tile of the block form that is tried first."""
    return dict(tuning.candidates('forward', x, kernel_size, precision))['block_forward'][0]


@pytest.mark.parametrize(('capability', 'kernel_size', 'precision', 'chunks', 'unrolled'), [
    (90, 51, 'half', 5, 5), (90, 51, 'tf32', 5, 5),
    (86, 51, 'half', 5, 5), (86, 51, 'tf32', 5, 1),     # 123 kB of 101 in one step
    (100, 51, 'half', 5, 1),                            # 640 columns of tensor memory of 512
    (80, 131, 'half', 5, 5), (90, 179, 'half', 7, 1),   # wider chunks
    (None, 51, 'half', 5, 1), (130, 51, 'half', 5, 1),  # unknown: what all have
], ids=str)
def test_as_many_chunks_a_step_as_the_device_holds(monkeypatch, capability, kernel_size, precision, chunks, unrolled):
    monkeypatch.setattr(tuning, '_capability', lambda device: capability)
    dtype = torch.float32 if precision == 'tf32' else torch.float16
    x = torch.empty(64, 1, 160, 160, dtype=dtype, device='meta')
    tile = first_tile(x, [kernel_size] * 2, precision)
    assert tuning.window(tile.s, tile.tc, 160, kernel_size)[1] == chunks
    assert tile.unrolled(chunks) == unrolled


@pytest.mark.parametrize('step', ['forward', 'weight_grad'])
@pytest.mark.parametrize('size', [7, 14, 56, 300])
def test_tiles_for_less_and_less_memory(monkeypatch, step, size):
    """The first tile fits, each has a successor until none is left, and then the error has the numbers."""
    x = torch.empty(64, 8, size, size, dtype=torch.float16, device='meta')
    before = {}
    for available in (2 ** 18, 2 ** 16, 2 ** 14, 2 ** 13):
        monkeypatch.setattr(tuning, '_limits', lambda *args: tuning.Limits(available))  # noqa: B023
        for form, tiles in tuning.candidates(step, x, [51, 51], 'half'):
            needed = [tile.shared_memory(tuning.Limits(available), 2, size, 51) for tile in tiles]
            assert all(one <= available for one in needed)
            assert needed == sorted(needed, reverse=True)
            assert set(tiles) <= set(before.get(form, tiles))
            before[form] = tiles
    monkeypatch.setattr(tuning, '_limits', lambda *args: tuning.Limits(64))
    with pytest.raises(_backends.LaunchError, match=r'that fits meta: .* needed \d+, available 64$') as error:
        tuning.candidates(step, x, [51, 51], 'half')
    assert error.value.needed > error.value.available == 64


def test_a_grid_beyond_the_device():
    """No smaller tile is tried, which would need more programs."""
    with pytest.raises(_backends.LaunchError, match='needs 2147483648 programs, available 2147483647') as error:
        launch._grid(2 ** 31)
    assert error.value.needed is None


def test_a_compilers_error_is_the_line_with_the_reason():
    error = CompilationError('def kernel():\n    x = tl.nothing()', ast.parse('x').body[0], 'module has no nothing')
    assert len(str(error).splitlines()) > 1 and launch.reason_line(error) == 'module has no nothing'
    assert launch.reason_line(RuntimeError('out of memory\nand more')) == 'out of memory'


@pytest.mark.skipif(INTERPRETED, reason='the interpreter runs on the CPU')
def test_named_where_it_cannot_run():
    x, weight = torch.ones(1, 2, 4, 4), torch.ones(2, 1, 3, 3)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: it runs on CUDA tensors"):
        depthwise_conv2d(x, weight, backend='triton')
    assert 'triton' not in available_backends()
    with pytest.raises(RuntimeError, match='float16, bfloat16 and float32, got'):
        depthwise_conv2d(x.double(), weight.double(), backend='triton')


@pytest.fixture
def broken(monkeypatch):
    """Asks for the toolchain's fault on a CUDA device of a given capability, as if there were one."""
    def ask(capability, probe=None):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        if probe is not None:
            monkeypatch.setattr(launch, 'probe', probe)
        return _triton.unsupported_reason(torch.device('cuda:0'), torch.float16)
    _triton._broken_toolchain.cache_clear()
    yield ask
    _triton._broken_toolchain.cache_clear()


@pytest.mark.parametrize('error', [
    RuntimeError('Failed to find C compiler.'),
    TypeError("jit() got an unexpected keyword argument 'do_not_specialize'"),
    PTXASError("Value 'sm_130a' is not defined"),
    subprocess.CalledProcessError(1, ['gcc']),
], ids=repr)
def test_broken_toolchain(broken, caplog, error):
    """One reason, in the log once."""
    def probe(device):
        raise error
    with caplog.at_level(logging.WARNING, logger='smpconv_models'):
        reason, *others = (broken((9, 0), probe) for _ in range(3))
    assert reason.startswith('Triton could not run a kernel: ') and str(error) in reason
    assert others == [reason, reason]
    assert len(caplog.records) == 1 and reason in caplog.text


def test_a_lack_of_memory_is_not_the_toolchains_fault(broken):
    def probe(device):
        raise torch.OutOfMemoryError('full')
    with pytest.raises(torch.OutOfMemoryError):
        broken((9, 0), probe)
    assert broken((9, 0), lambda device: None) is None


def test_an_answer_during_a_capture_is_not_kept(broken, monkeypatch):
    """The toolchain was not tried then."""
    def probe(device):
        raise RuntimeError('no compiler')
    assert broken((9, 0), probe) is not None
    _triton._broken_toolchain.cache_clear()
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    device, dtype = torch.device('cuda:0'), torch.float16
    assert 'triton' in _backends._runnable(device, dtype)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    assert 'triton' not in _backends._runnable(device, dtype)


OTHER_TRITON = """
import logging, sys, torch, triton.runtime.errors
logging.basicConfig(format='LOG %(message)s', stream=sys.stdout)
del triton.runtime.errors.OutOfResources
torch.cuda.is_available = lambda: True
torch.cuda.is_current_stream_capturing = lambda: False
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda device: (9, 0)
from smpconv_models.ops import _backends
for dtype in (torch.float16, torch.bfloat16):
    print(_backends._runnable(torch.device('cuda:0'), dtype))
"""


@pytest.mark.skipif(INTERPRETED, reason='the same there')
def test_a_triton_of_an_unknown_version():
    """A name is not where it was: one line in the log, and conv2d."""
    result = subprocess.run(
        [sys.executable, '-c', OTHER_TRITON], check=True, capture_output=True, text=True, timeout=120)
    first, *others = result.stdout.splitlines()
    assert first.startswith('LOG depthwise_conv2d has no tensor cores on cuda:0: Triton cannot be imported: ')
    assert others == ["('reference',)"] * 2


def test_old_gpu(broken):
    assert broken((7, 5)) == 'it needs compute capability (8, 0), got (7, 5)'


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason='the probe would succeed')
def test_the_probe_itself_fails_without_a_gpu(broken):
    assert broken((9, 0)).startswith('Triton could not run a kernel: ')


def test_no_device(broken, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert _triton.unsupported_reason(torch.device('cuda'), torch.float16) == 'PyTorch sees 0 CUDA devices'


@pytest.mark.skipif(INTERPRETED, reason='not chosen there')
@pytest.mark.parametrize(('size', 'kernel_size', 'dtype', 'reason'), [
    ((64, 128, 56, 56), (31, 31), torch.bfloat16, None),
    ((64, 96, 56, 56), (7, 7), torch.float16, None),
    ((64, 96, 56, 56), (1, 11), torch.float16, None),
    ((64, 128, 56, 56), (5, 5), torch.bfloat16, 'smaller'),
    ((1, 96, 14, 14), (27, 27), torch.bfloat16, 'too little'),
    ((64, 128, 56, 56), (31, 31), torch.float32, 'no tensor cores'),
])
def test_where_auto_skips_triton(fp32_precision, size, kernel_size, dtype, reason):
    fp32_precision('ieee')
    padding = [size // 2 for size in kernel_size for _ in range(2)]
    axes = make_axes(size[2:], kernel_size, [1, 1], padding, [1, 1])
    found = _triton.skip_reason(ConvProblem(size[0], size[1], axes, dtype, needs_weight_grad=True))
    assert (found is None) if reason is None else (reason in found)
