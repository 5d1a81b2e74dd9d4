"""Builds of the kernels for GPUs that are not present: tensor-core instructions, and no spilled registers."""
import pytest
import torch

pytest.importorskip('triton', reason='PyTorch brings Triton on Linux only')
import ahead_of_time

from smpconv_models.ops._triton import launch, tuning

INSTRUCTION = {80: 'mma.sync', 86: 'mma.sync', 90: 'wgmma.mma_async', 100: 'tcgen05.mma', 120: 'mma.sync'}
LARGEST_SHARED = {80: 166912, 86: 101376, 90: 232448, 100: 232448, 120: 101376}      # bytes a program may have
MAIN = (80, 90, 100)
NETWORK = {
    '56': (64, 96, 56, 56, 31), '28': (64, 192, 28, 28, 29), '14': (64, 384, 14, 14, 27), '7': (64, 768, 7, 7, 13),
}
OTHER = {
    'mobile51_56': (64, 64, 56, 56, 51), 'mobile51_28': (64, 128, 28, 28, 49), 'mobile51_14': (64, 256, 14, 14, 47),
    'convnext_56': (64, 96, 56, 56, 7), 'convnext_7': (64, 768, 7, 7, 7),
    'detection_200x304': (2, 96, 200, 304, 31), 'detection_100x152': (2, 192, 100, 152, 29),
    'one_image': (1, 96, 56, 56, 31), 'small': (1, 8, 9, 9, 3),
}


def check(monkeypatch, capability, layer, dtype):
    """Build all kernels that the forward pass and the weight gradient of a layer launch."""
    monkeypatch.setattr(tuning, '_capability', lambda device: capability)
    n, c, h, w, k = layer
    x = torch.empty(n, c, h, w, dtype=dtype, device='meta')
    weight = torch.empty(c, 1, k, k, dtype=dtype, device='meta')
    bias = torch.empty(c, dtype=dtype, device='meta')
    launched = [
        *ahead_of_time.launches(monkeypatch, launch.forward, x, weight, bias),
        *ahead_of_time.launches(monkeypatch, launch.weight_grad, x, x, [k, k]),
    ]
    products = 0
    for one in launched:
        built = ahead_of_time.build(one, capability)
        name = one.kernel.fn.__name__
        assert built.stack == 0, f'{name} spills {built.stack} bytes a thread with {one.arguments}'
        assert built.shared <= LARGEST_SHARED[capability], name
        if name not in ('expand_rows', 'add_parts') and launch.matmul_precision(dtype) != 'ieee':
            assert INSTRUCTION[capability] in built.ptx, name
            assert any(ahead_of_time.PRODUCT.match(instruction) for instruction in built.loop), name
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
