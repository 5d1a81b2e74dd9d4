"""Convolutions with points for each filter, and the blocks made of them."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import randomize_, relative_error
from torch import nn

from smpconv_models.layers import (
    CausalConv1d,
    FFTConv2d,
    ReparamConv,
    ResidualBlock,
    SMPConv1d,
    SMPConv2d,
    clip_radius_,
    evaluate_points,
    sampling_grid,
    smp_layers,
)

LAYERS = {
    '1-D': lambda **kwargs: SMPConv1d(3, 4, 40, num_points=8, **kwargs),
    '2-D': lambda **kwargs: SMPConv2d(3, 4, 9, num_points=8, **kwargs),
}


@pytest.mark.parametrize('name', ['smp_filter_1d', 'smp_filter_2d'])
def test_kernels_equal_the_original(golden, name):
    data = golden(name)
    one_dimensional = name.endswith('1d')
    out, points = data['radius'].shape[:2]
    kernel = data['kernel']
    make = SMPConv1d if one_dimensional else SMPConv2d
    layer = make(kernel.shape[1], out, kernel.shape[-1], points, bias=False)
    layer.load_state_dict({
        'coords': data['weight_coord'], 'radius': data['radius'].flatten(1), 'weight': data['weights'],
        '_extra_state': torch.tensor([kernel.shape[-1]])})
    assert relative_error(layer.kernel(), kernel) < 1e-5


@pytest.mark.parametrize('kind', LAYERS)
def test_is_its_convolution(kind):
    layer = randomize_(LAYERS[kind](bias=True, method='direct'))
    x = torch.randn(2, 3, *[17] * layer.ndim)
    kernel = evaluate_points(
        sampling_grid([layer.kernel_size] * layer.ndim), layer.coords, layer.radius, layer.weight,
    ).unflatten(-1, [layer.kernel_size] * layer.ndim)
    if layer.ndim == 1:
        expected = F.conv1d(F.pad(x, (39, 0)), kernel, layer.bias)
    else:
        expected = F.conv2d(x, kernel, layer.bias, padding=4)
    torch.testing.assert_close(layer(x), expected)
    fft = LAYERS[kind](bias=True, method='fft')
    fft.load_state_dict(layer.state_dict())
    assert relative_error(fft(x), expected) < 1e-6


@pytest.mark.parametrize('kind', LAYERS)
def test_initial_points(kind):
    torch.manual_seed(0)
    make = {'1-D': lambda: SMPConv1d(3, 200, 784), '2-D': lambda: SMPConv2d(3, 200, 33)}[kind]
    layer = make()
    if kind == '1-D':  # half a normal of std 0.1, stretched, that ends at the present
        assert layer.coords.min() >= -1 and layer.coords.max() <= 1
        assert abs((1 - layer.coords).square().mean().sqrt() - 0.2) < 0.01
        assert layer.radius.eq(torch.tensor(2 / 784)).all()
    else:
        assert abs(layer.coords.std() - 0.05) < 0.003 and abs(layer.coords.mean()) < 0.003
        assert layer.radius.eq(torch.tensor(4 / 33)).all()
    assert abs(layer.weight.std() - 0.02) < 0.001
    assert not layer.bias.any()


def test_radius_may_be_given():
    assert SMPConv2d(1, 1, 33, init_radius=0.12).radius.eq(torch.tensor(0.12)).all()


@pytest.mark.parametrize('kind', LAYERS)
def test_radii_are_clipped_and_found(kind):
    layer = LAYERS[kind]()
    model = nn.Sequential(nn.Identity(), layer)
    assert list(smp_layers(model).values()) == [layer]
    with torch.no_grad():
        layer.radius[0] = 5.
        layer.radius[1] = -1.
    wide = layer.kernel()
    clip_radius_(model)
    assert layer.radius[0].eq(1).all() and layer.radius[1].eq(1e-4).all()
    torch.testing.assert_close(layer.kernel(), wide)


@pytest.mark.parametrize('kind', LAYERS)
def test_fuses_into_the_same_convolution(kind):
    layer = randomize_(LAYERS[kind](bias=True))
    fused = layer.fuse()
    assert type(fused) is (CausalConv1d if kind == '1-D' else FFTConv2d)
    x = torch.randn(2, 3, *[17] * layer.ndim)
    assert torch.equal(fused(x), layer(x))
    assert fused.weight.requires_grad


@pytest.mark.parametrize('kind', LAYERS)
def test_a_state_dict_has_the_size_that_the_points_are_for(kind):
    layer = LAYERS[kind]()
    state = layer.state_dict()
    layer.resize(2 * layer.base_size + 1)
    layer.load_state_dict(state)  # it fits at every size
    assert layer.state_dict()['_extra_state'].tolist() == [layer.base_size]
    layer.load_state_dict({**state, '_extra_state': torch.tensor([0])})  # of the original before its first step
    size = layer.base_size + 2
    with pytest.raises(ValueError, match=f'expected the points of kernels of size {size - 2}, got those of {size}'):
        layer.load_state_dict({**state, '_extra_state': torch.tensor([size])})


def test_the_size_in_a_state_dict_is_on_the_cpu():
    with torch.device('meta'):
        layer = LAYERS['1-D']()
        assert layer.state_dict()['_extra_state'].tolist() == [40]


def test_sizes_may_be_numpys():
    assert SMPConv1d(np.int64(2), 3, np.int32(9), num_points=np.int64(4)).kernel().shape == (3, 2, 9)


@pytest.mark.parametrize('kind', LAYERS)
def test_resized_kernels_respond_alike_to_a_constant(kind):
    layer = randomize_(LAYERS[kind](bias=False))
    response = layer.kernel().flatten(2).sum(-1)
    for size in (21, 81, 15):
        layer.resize(size)
        assert layer.kernel().shape[-1] == size
        torch.testing.assert_close(layer.kernel().flatten(2).sum(-1), response, rtol=1e-4, atol=1e-5)
    layer.resize(layer.base_size)
    torch.testing.assert_close(layer.kernel().flatten(2).sum(-1), response)
    assert 'base_size' not in repr(layer)


def test_a_resized_long_kernel_is_sampled_in_chunks(monkeypatch):
    from smpconv_models.layers import points
    layer = randomize_(SMPConv1d(2, 3, 90, num_points=6))
    layer.resize(170)
    expected = layer.kernel()
    monkeypatch.setattr(points, '_MAX_PAIRS', 400)
    torch.testing.assert_close(layer.kernel(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', LAYERS)
def test_modes(kind):
    layer = randomize_(LAYERS[kind]())
    x = torch.randn(2, 3, *[17] * layer.ndim)
    expected = layer(x)
    assert relative_error(torch.jit.script(layer)(x), expected) < 1e-6
    assert relative_error(torch.compile(layer, fullgraph=True, backend='aot_eager')(x), expected) < 1e-6
    assert relative_error(torch.fx.symbolic_trace(layer)(x), expected) < 1e-6
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert LAYERS[kind](device='meta')(x.to('meta')).shape == expected.shape


@pytest.mark.parametrize(('make', 'message'), [
    (lambda: SMPConv1d(1, 1, 0), 'kernel_size must be a positive whole number, got 0'),
    (lambda: SMPConv1d(1, 1, 2.5), 'kernel_size must be a positive whole number, got 2.5'),
    (lambda: SMPConv2d(1, 1, 4), 'odd and positive, got 4'),
    (lambda: SMPConv1d(1, 1, 4, num_points=0), 'num_points must be a positive whole number, got 0'),
    (lambda: SMPConv1d(0, 1, 4), 'in_channels must be a positive whole number, got 0'),
    (lambda: SMPConv2d(1, True, 3), 'out_channels must be a positive whole number, got True'),
    (lambda: SMPConv1d(1, 1, 4, init_radius=0.), r'init_radius must lie in radius_range, \(0.0001, 1.0\), got 0.0'),
    (lambda: SMPConv2d(1, 1, 3, init_radius=1.5), r'got 1\.5'),
    (lambda: SMPConv2d(1, 1, 3, coords_std=0), 'coords_std must be positive, got 0'),
    (lambda: SMPConv2d(1, 1, 3, radius_range=(1., 0.5)), r'radius_range must be .*got \(1\.0, 0\.5\)'),
    (lambda: SMPConv1d(1, 1, 4, method='magic'), "got 'magic'"),
    (lambda: SMPConv1d(1, 1, 4).resize(0), 'got 0'),
    (lambda: SMPConv2d(1, 1, 3).resize(4), 'got 4'), (lambda: SMPConv2d(1, 1, 3).resize((3, 5)), r'got \(3, 5\)'),
    (lambda: SMPConv2d(1, 1, True), 'got True'),
])
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- blocks ---


def parallel(ndim, channels=4, small_bias=False):
    if ndim == 1:
        large, small = SMPConv1d(channels, channels, 30, 6), CausalConv1d(channels, channels, 5, bias=small_bias)
        norm = nn.BatchNorm1d
    else:
        large, small = SMPConv2d(channels, channels, 9, 6), FFTConv2d(channels, channels, 3, bias=small_bias)
        norm = nn.BatchNorm2d
    return ReparamConv(large, small, lambda: norm(channels))


@pytest.mark.parametrize('small_bias', [False, True])
@pytest.mark.parametrize('ndim', [1, 2])
def test_parallel_kernels_become_one(ndim, small_bias):
    module = randomize_(parallel(ndim, small_bias=small_bias)).eval()
    x = torch.randn(2, 4, *[20] * ndim)
    expected = module(x)
    merged = module.fuse()
    assert type(merged) is (CausalConv1d if ndim == 1 else FFTConv2d)
    assert relative_error(merged(x), expected) < 1e-5


@pytest.mark.parametrize('is_temporal', [False, True])
def test_residual_block_is_its_formula(is_temporal):
    block = randomize_(ResidualBlock(parallel(1), parallel(1), nn.Conv1d(4, 4, 1), 0.5, is_temporal)).eval()
    x = torch.randn(2, 4, 30)
    y = block.conv2(block.conv1(x).relu())
    y = y.relu() if is_temporal else y
    assert torch.equal(block(x), (y + block.shortcut(x)).relu())


def test_dropout_is_where_it_should_be():
    block = ResidualBlock(parallel(1), parallel(1), nn.Identity(), 0.5, is_temporal=True)
    assert block.drop1.p == block.drop2.p == 0.5
    assert isinstance(ResidualBlock(parallel(2), parallel(2), nn.Identity(), 0.5, False).drop2, nn.Identity)
