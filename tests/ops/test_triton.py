"""The Triton kernels, under Triton's interpreter or on a GPU; and the reasons for which the backend cannot run.

The interpreter is chosen when Triton is imported, so test_triton_interpreted.py runs this file again in a separate
process; on a machine with a CUDA device, ``pytest -m gpu`` runs it there.
"""
import json
import logging
import mmap
import os
import re
import subprocess
from dataclasses import replace

import pytest
import torch
from grid import LAYOUTS, SHAPES, Shape, assert_as_exact_as, make, plain_conv, terms, with_gradients

from smpconv_models.ops import _backends, _triton, available_backends, depthwise_conv2d

pytest.importorskip('triton', reason='PyTorch brings Triton on Linux only')
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
ALL = {**{name: replace(shape, c=2) for name, shape in SHAPES.items() if shape.dilation == (1, 1)}, **WIDE}


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
        return plain_conv(*args, shape.dilation)
    plain = with_gradients(function, x, weight, bias, grad)
    return plain, with_gradients(function, *(tensor.cpu().double() for tensor in (x, weight, bias, grad)))


def assert_close(got, plain, exact, num_terms, dtype):
    """Products of tf32 have 11 bits on a GPU; the interpreter's are of float32."""
    if launch.matmul_precision(dtype) == 'tf32' and not INTERPRETED:
        assert (got.cpu().double() - exact).norm() <= 2 ** -10 * exact.norm()
    else:
        assert_as_exact_as(got.cpu(), plain.cpu(), exact, num_terms)


FORMS = tuple(launch._FORMS)
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


class TooLarge:
    """Replacement of a kernel that the device cannot launch."""

    def __init__(self, error):
        self.error = error

    def __getitem__(self, grid):
        def launched(*args, **kwargs):
            raise self.error
        return launched


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
        ('map_weight_grad', tuning.MapGradTile(bn=32, bi=512, bo=32)),
        ('block_weight_grad', tuning.BlockGradTile(r=2, s=16, d=16, tc=32, bn=1, bj=16)),
        ('block_weight_grad', tuning.BlockGradTile(r=4, s=32, d=4, tc=64, bn=2, bj=8)),
        ('block_weight_grad', tuning.BlockGradTile(r=1, s=16, d=2, tc=16, bn=16, bj=1)),
    ], ids=str)
    def test_other_tiles(self, form, tile):
        check_form(form, Shape(3, 2, 9, 23 if form.startswith('block') else 13, 9, 11), torch.float32, tile)

    @pytest.mark.parametrize(('kernel', 'error', 'lack'), [
        ('block_forward', OutOfResources(232448, 101376, 'shared memory'), 'shared memory needed 232448, .* 101376'),
        ('block_weight_grad', PTXASError('too many registers'), 'too many registers'),
    ], ids=['forward', 'weight_grad'])
    @pytest.mark.parametrize('backend', ['triton', 'auto'])
    def test_a_kernel_that_the_device_cannot_launch(self, monkeypatch, caplog, backend, kernel, error, lack):
        """A named backend raises with the numbers; auto is plain conv2d, which is logged once."""
        monkeypatch.setattr(_backends, 'AUTO_ORDER', ('triton', 'reference'))
        monkeypatch.setattr(_triton, 'skip_reason', lambda problem: None)
        monkeypatch.setattr(launch.kernels, kernel, TooLarge(error))
        tensors = make(Shape(1, 1, 9, 18, 3, 3), torch.float32, device=DEVICE)

        def call():
            return with_gradients(lambda *args: depthwise_conv2d(*args, backend=backend), *tensors)

        if backend == 'triton':
            with pytest.raises(RuntimeError, match=f"'triton' has no kernel for .* that fits .*: .*{lack}"):
                call()
            return
        plain = with_gradients(lambda *args: plain_conv(*args, (1, 1)), *tensors)
        with caplog.at_level(logging.WARNING, logger='smpconv_models'):
            first, second = call(), call()
        assert [bool(re.search(lack, record.message)) for record in caplog.records] == [True]
        torch.testing.assert_close(first, plain)
        torch.testing.assert_close(second, plain)

    @pytest.mark.parametrize('path', sorted(tuning._CONFIGS.glob('*.json')), ids=lambda path: path.stem)
    def test_tuned_tiles(self, path):
        for entry in json.loads(path.read_text()):
            tile = tuning.TILES[entry['kernel']](**entry['tile'])
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
            lambda *args: depthwise_conv2d(*args, dilation=shape.dilation, backend='triton'), x, weight, bias, grad)
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
    for other in (x[..., 1:5], x.transpose(2, 3), x[:, :, ::2], x.contiguous(memory_format=torch.channels_last)):
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
    for cached in (tuning._entries, tuning._tuned):
        cached.cache_clear()
    yield
    for cached in (tuning._entries, tuning._tuned):
        cached.cache_clear()


def test_a_tuned_tile_serves_from_half_its_batch(monkeypatch, tmp_path, no_cached_tiles):
    entry = dict(kernel='block_forward', mode='half', batch=64, height=56, width=56, kernel_size=[31, 31],
                 tile=dict(r=8, s=16, tc=16, bp=256, num_warps=8), source='a test')
    (tmp_path / 'sm_90.json').write_text(json.dumps([entry]))
    monkeypatch.setattr(tuning, '_CONFIGS', tmp_path)
    monkeypatch.setattr(tuning, '_capability', lambda device: 90)

    def bp(batch, width=56):
        return tuning.get_tile('block_forward', torch.empty(batch, 1, 56, width, device='meta'), [31, 31], 'half').bp
    assert bp(64) == bp(32) == bp(1000) == 256
    assert bp(31) == bp(64, width=57) == 128


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
    found = _triton.skip_reason(_backends.ConvProblem(size, dtype, kernel_size, (1, 1), needs_weight_grad=True))
    assert (found is None) if reason is None else (reason in found)
