"""Kernels drawn a chunk at a time equal those drawn at once, and never hold all pairs of points and elements."""
import pytest
import torch
from common import randomize_

from smpconv_models.layers import SMPConv1d, SMPDepthwiseConv2d, evaluate_points, points, sampling_grid

KERNELS = {'1-D': ((), [97]), 'filters, 1-D': ((4,), [97]), 'filters, 2-D': ((3,), [12, 15]), '3-D': ((2,), [5, 6, 7])}


def make(leading, size, num_points=9, in_channels=2):
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    coords = uniform(*leading, num_points, len(size)) * 2.4 - 1.2
    radius = uniform(*leading, num_points) * 0.3 * len(size) + 0.02
    return [tensor.requires_grad_() for tensor in (coords, radius, uniform(*leading, in_channels, num_points) - 0.5)]


@pytest.fixture
def few_pairs(monkeypatch):
    """Chunks of a few elements even for small kernels."""
    monkeypatch.setattr(points, '_MAX_PAIRS', 400)


@pytest.mark.parametrize('normalize', [False, True])
@pytest.mark.parametrize('kind', KERNELS)
def test_equals_drawing_at_once(few_pairs, kind, normalize):
    leading, size = KERNELS[kind]
    parameters = make(leading, size)
    query = sampling_grid(size, dtype=torch.float64)
    assert points.exceeds_budget(query, parameters[0])
    expected = evaluate_points(query, *parameters, normalize).unflatten(-1, size)
    got = points.sample_kernel(*parameters, size, normalize)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)
    grad = torch.randn(got.shape, dtype=torch.float64)
    gradients = (torch.autograd.grad(kernel, parameters, grad) for kernel in (got, expected))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('normalize', [False, True])
def test_sums_equal_those_at_once(few_pairs, normalize):
    coords, radius, _ = make((3,), [60])
    query = sampling_grid([60], dtype=torch.float64)
    got = points.tent_mass(query, coords, radius, normalize)
    expected = points._tent_mass(query, coords, radius, normalize)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    for ours, theirs in zip(torch.autograd.grad(got.sin().sum(), (coords, radius)),
                            torch.autograd.grad(expected.sin().sum(), (coords, radius))):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_one_set_of_points_for_many_weights(few_pairs):
    coords, radius, _ = make((), [80])
    weights = torch.randn(5, 3, 9, dtype=torch.float64)
    query = sampling_grid([80], dtype=torch.float64)
    got = points._evaluate_in_chunks(query, coords, radius, weights, True)
    torch.testing.assert_close(got, evaluate_points(query, coords, radius, weights, True), rtol=0, atol=1e-15)


def test_points_out_of_reach_leave_zeros(few_pairs):
    layer = SMPConv1d(2, 3, 200, num_points=4)
    with torch.no_grad():
        layer.coords.fill_(9.)
    kernel = layer.kernel()
    assert kernel.shape == (3, 2, 200) and not kernel.any()
    kernel.sum().backward()
    assert not layer.weight.grad.any()


def test_small_kernels_are_drawn_at_once():
    layer = SMPDepthwiseConv2d(4, 51, 51 ** 2 // 8)
    assert not points.exceeds_budget(sampling_grid([51, 51]), layer.coords)


def test_compiled_in_one_graph(few_pairs):
    """Which points reach a chunk is data, on which a graph can't depend."""
    layer = SMPConv1d(2, 3, 12, num_points=5)
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    x = torch.randn(2, 2, 12)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.coords.grad.any()


@pytest.mark.parametrize('radius', [0.0002, 0.3])
def test_pairs_are_never_held_at_once(radius, monkeypatch):
    """No tensor of forward or backward pass is as large as points x elements x filters, at any radius."""
    filters, num_points, length = 6, 30, 16000
    layer = SMPConv1d(2, filters, length, num_points, init_radius=radius)
    monkeypatch.setattr(points, '_MAX_PAIRS', 1 << 19)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        layer.kernel().square().sum().backward()
    assert layer.radius.grad is not None
    assert filters * 2 * length <= largest < filters * num_points * length / 4


@pytest.mark.parametrize('name', ['coords', 'radius'])
def test_what_is_not_finite_is_seen(few_pairs, name):
    layer = SMPConv1d(1, 2, 80, num_points=6)
    with torch.no_grad():
        getattr(layer, name)[0, 2] = torch.nan
    kernel = layer.kernel()
    assert kernel[0].isnan().all() and kernel[1].isfinite().all()


@pytest.mark.parametrize(('coords', 'radius'), [((9, 1), (4, 9)), ((4, 9, 1), (9,))])
def test_places_and_radii_broadcast(few_pairs, coords, radius):
    coords, radius = torch.rand(coords, dtype=torch.float64) - 0.5, torch.rand(radius, dtype=torch.float64)
    weights = torch.randn(4, 2, 9, dtype=torch.float64)
    expected = evaluate_points(sampling_grid([70], dtype=torch.float64), coords, radius, weights)
    torch.testing.assert_close(points.sample_kernel(coords, radius, weights, [70]), expected, rtol=0, atol=1e-15)


def test_nothing_of_the_pairs_is_kept(monkeypatch):
    """What the backward pass needs is computed again."""
    layer = SMPConv1d(2, 6, 16000, 30, init_radius=0.3)
    monkeypatch.setattr(points, '_MAX_PAIRS', 1 << 19)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer.kernel()
    assert sum(kept.values()) < 6 * 30 * 16000 * 4 / 20


@pytest.mark.parametrize('strict', [True, False])
def test_exported(monkeypatch, strict):
    monkeypatch.setattr(points, '_MAX_PAIRS', 1000)
    layer, x = randomize_(SMPConv1d(2, 3, 60, num_points=6)), torch.randn(1, 2, 60)
    assert points.exceeds_budget(sampling_grid([60]), layer.coords)
    torch.testing.assert_close(torch.export.export(layer, (x,), strict=strict).module()(x), layer(x))
