"""Builds of the kernels for GPUs that are not present: tensor-core instructions, no spilled registers, and a launch."""
import math

import pytest
import torch

pytest.importorskip('triton', reason='PyTorch brings Triton on Linux only')
import ahead_of_time

from smpconv_models.ops._triton import launch, limits, tuning

INSTRUCTION = {80: 'mma.sync', 86: 'mma.sync', 90: 'wgmma.mma_async', 100: 'tcgen05.mma', 120: 'mma.sync'}
# What a program may have: bytes of shared memory, columns of tensor memory, registers.
LARGEST_SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
LARGEST_TENSOR_MEMORY, MOST_REGISTERS, MOST_PROGRAMS = 512, 65536, 2 ** 31 - 1
MAIN = (80, 90, 100)
EXPANDING = ('expand_rows', 'expand_fragments', 'add_parts', 'add_splits')    # without products
NETWORK = {
    '56': (64, 96, 56, 56, 31), '28': (64, 192, 28, 28, 29), '14': (64, 384, 14, 14, 27), '7': (64, 768, 7, 7, 13),
}
OTHER = {
    'mobile51_56': (64, 64, 56, 56, 51), 'mobile51_28': (64, 128, 28, 28, 49), 'mobile51_14': (64, 256, 14, 14, 47),
    'convnext_56': (64, 96, 56, 56, 7), 'convnext_7': (64, 768, 7, 7, 7),
    'detection_200x304': (2, 96, 200, 304, 31), 'detection_100x152': (2, 192, 100, 152, 29),
    'one_image': (1, 96, 56, 56, 31), 'small': (1, 8, 9, 9, 3),
    'sequence': (8, 256, 1, 1000, 1, 31), 'long_sequence': (2, 64, 1, 100000, 1, 255),
}


def launches(monkeypatch, capability, layer, dtype):
    """Return what the forward pass and the weight gradient of a layer launch."""
    monkeypatch.setattr(tuning, '_capability', lambda device: capability)
    n, c, h, w, *k = layer
    kh, kw = k if len(k) == 2 else k * 2
    x = torch.empty(n, c, h, w, dtype=dtype, device='meta')
    weight = torch.empty(c, 1, kh, kw, dtype=dtype, device='meta')
    bias = torch.empty(c, dtype=dtype, device='meta')
    return [
        *ahead_of_time.launches(monkeypatch, launch.forward, x, weight, bias),
        *ahead_of_time.launches(monkeypatch, launch.weight_grad, x, x, [kh, kw]),
    ]


def assert_launches(one, built, capability):
    """A device has what the kernel takes."""
    name = one.kernel.fn.__name__
    assert built.shared <= LARGEST_SHARED[capability], name
    assert built.tensor_memory <= LARGEST_TENSOR_MEMORY, name
    assert built.registers * 32 * one.options.get('num_warps', 4) <= MOST_REGISTERS, name
    assert math.prod(one.grid) <= MOST_PROGRAMS, name


def check(monkeypatch, capability, layer, dtype):
    """Build all kernels that a layer launches."""
    products = 0
    for one in launches(monkeypatch, capability, layer, dtype):
        built = ahead_of_time.build(one, capability)
        name = one.kernel.fn.__name__
        assert built.stack == 0, f'{name} spills {built.stack} bytes a thread with {one.arguments}'
        assert_launches(one, built, capability)
        if name not in EXPANDING and launch.matmul_precision(dtype) != 'ieee':
            assert INSTRUCTION[capability] in built.ptx, name
            is_unrolled = name == 'hopper_map_forward'
            assert is_unrolled or any(ahead_of_time.PRODUCT.match(instruction) for instruction in built.loop), name
            products += 1
    assert products == (0 if launch.matmul_precision(dtype) == 'ieee' else 2)


@pytest.mark.parametrize('layer', [
    each if each in ('56', '7') else pytest.param(each, marks=pytest.mark.slow) for each in NETWORK])
@pytest.mark.parametrize('capability', [
    each if each == 90 else pytest.param(each, marks=pytest.mark.slow) for each in MAIN])  # 3 to 9 s a build
def test_network_in_bfloat16(monkeypatch, capability, layer):
    check(monkeypatch, capability, NETWORK[layer], torch.bfloat16)


@pytest.mark.slow    # two minutes of compiling
@pytest.mark.parametrize('layer', NETWORK)
@pytest.mark.parametrize('capability', INSTRUCTION)
@pytest.mark.parametrize(('dtype', 'precision'), [
    (torch.float16, 'tf32'), (torch.float32, 'tf32'), (torch.float32, 'ieee')], ids=str)
def test_network_in_other_types(monkeypatch, fp32_precision, capability, layer, dtype, precision):
    fp32_precision(precision)
    check(monkeypatch, capability, NETWORK[layer], dtype)


@pytest.mark.slow    # two minutes of compiling
@pytest.mark.parametrize('layer', OTHER)
@pytest.mark.parametrize('capability', INSTRUCTION)
def test_other_layers(monkeypatch, capability, layer):
    check(monkeypatch, capability, OTHER[layer], torch.bfloat16)


MAPS, KERNELS = (7, 14, 56, 160, 300), (13, 51, 131, 255)
LARGE = {'float16': torch.float16, 'bfloat16': torch.bfloat16, 'float32': torch.float32}


def check_large(monkeypatch, fp32_precision, capability, size, kernel, dtype):
    """A device launches every tile that is selected for a map and kernel, and few products are unrolled."""
    fp32_precision('tf32')
    for one in launches(monkeypatch, capability, (64, 8, size, size, kernel), LARGE[dtype]):
        assert_launches(one, ahead_of_time.build(one, capability), capability)
        assert one.arguments.get('UNROLL', 1) <= 5      # 17 took four times as long to compile


@pytest.mark.parametrize(('capability', 'size', 'kernel', 'dtype'), [
    (86, 56, 51, 'float32'),        # took 122880 bytes of 101376
    (100, 56, 51, 'bfloat16'),      # took 640 columns of 512
    (90, 300, 255, 'bfloat16'),     # took 417792 bytes of 232448
])
def test_large_kernels_launch(monkeypatch, fp32_precision, capability, size, kernel, dtype):
    check_large(monkeypatch, fp32_precision, capability, size, kernel, dtype)


@pytest.mark.slow    # minutes of compiling
@pytest.mark.parametrize('form', tuning.TILES)
@pytest.mark.parametrize('capability', MAIN)
def test_smaller_tiles_build(monkeypatch, capability, form):
    """Every third one, down to the smallest."""
    if form in launch._EXPERIMENTAL and capability != 90:
        pytest.skip('for 90 alone')
    size, kernel = 7 if 'small' in form else 14 if 'map' in form else 56, 31 if form in launch._EXPERIMENTAL else 51
    x = torch.empty(64, 8, size, size, dtype=torch.bfloat16, device='meta')
    weight = torch.empty(8, 1, kernel, kernel, dtype=torch.bfloat16, device='meta')
    args = (x, weight, None) if form.endswith('forward') else (x, x, [kernel, kernel])
    ladder = list(tuning._ladder(form, 64, size, size, (kernel, kernel), 'half', capability))
    for tile in ladder[::-3]:
        for one in ahead_of_time.launches(monkeypatch, launch._FORMS[form], *args, tile):
            built = ahead_of_time.build(one, capability)
            assert_launches(one, built, capability)
            if one.kernel.fn.__name__ == form:
                available = limits._LIMITS[capability]
                assert built.shared <= tile.shared_memory(available, 2, size, kernel)


@pytest.mark.slow    # half an hour of compiling
@pytest.mark.timeout(1200)
@pytest.mark.parametrize('size', MAPS)
@pytest.mark.parametrize('dtype', LARGE)
@pytest.mark.parametrize('capability', LARGEST_SHARED)
def test_large_kernels_launch_everywhere(monkeypatch, fp32_precision, capability, dtype, size):
    for kernel in KERNELS:
        check_large(monkeypatch, fp32_precision, capability, size, kernel, dtype)
